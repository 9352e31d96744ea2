"""The step under real DeepSpeed: every ZeRO stage and number of workers trains the same student.

One process group of 1 and one of 2 workers go through all cases, as starting processes is what takes the time.
"""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pocl_ray.data.batching import MicroBatch, TeacherOutput
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.models.heads import head_of, response_hidden

V, STEPS, ACCUMULATION, CLIP = 61, 3, 2, 0.5
# (prompt tokens, response tokens) of a global batch: unequal, so that a mean of means would be wrong.
ROWS = ((3, 9), (6, 2), (2, 7), (5, 1))
NUM_RESPONSE_TOKENS = sum(response for _, response in ROWS)
SETTINGS = StepSettings(kd_temperature=2.0, kd_ratio=0.7, kd=resolve_loss("forward_kl"))
FP32_CASES = [(zero, tied, "fp32") for zero, tied in itertools.product((0, 1, 2, 3), (True, False))]
# ZeRO-0 with bf16 gets another optimizer wrapper from DeepSpeed, whose results differ; the engine does not use it.
BF16_CASES = [(zero, tied, "bf16") for zero, tied in itertools.product((1, 2, 3), (True, False))]


def llama(seed: int, hidden: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def micro_batches(teacher: LlamaForCausalLM, rank: int, num_workers: int) -> list[MicroBatch]:
    """The rows of one worker, in `ACCUMULATION` micro-batches."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, V, (prompt + response,), generator=generator) for prompt, response in ROWS]
    mine = list(range(len(ROWS)))[rank::num_workers]
    size = len(mine) // ACCUMULATION
    return [collate(ids, mine[start : start + size], teacher) for start in range(0, len(mine), size)]


def collate(ids: list[Tensor], rows: list[int], teacher: LlamaForCausalLM) -> MicroBatch:
    length = max(len(ids[row]) for row in rows)
    ids_BT, mask_BT = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    index: list[int] = []
    for place, row in enumerate(rows):
        ids_BT[place, : len(ids[row])], mask_BT[place, : len(ids[row])] = ids[row], 1
        start = place * length + ROWS[row][0] - 1
        index += range(start, start + ROWS[row][1])
    index_N = torch.tensor(index)
    batch = MicroBatch(ids_BT, mask_BT, index_N, ids_BT.flatten()[index_N + 1])
    with torch.no_grad():
        teacher_outputs = TeacherOutput(response_hidden(teacher, ids_BT, mask_BT, index_N))
    return MicroBatch(ids_BT, mask_BT, index_N, batch.targets_N, (teacher_outputs,))


def module_and_teacher(tied: bool) -> tuple[DistillationModule, LlamaForCausalLM]:
    teacher = llama(1, 24, tied=False)
    module = DistillationModule(llama(0, 16, tied), chunk_bytes=4 * V * 4)
    module.attach_teacher_heads(head_of(teacher))
    return module, teacher


def optimizer_for(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.01)


def train_plainly(tied: bool) -> dict[str, Tensor]:
    """The reference: PyTorch alone, one process, no micro-batches."""
    module, teacher = module_and_teacher(tied)
    batches = micro_batches(teacher, 0, 1)
    optimizer, losses, norms = optimizer_for(module), [], []
    for _ in range(STEPS):
        loss = sum(module(batch, SETTINGS)[0] for batch in batches) / NUM_RESPONSE_TOKENS
        assert isinstance(loss, Tensor)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}


def train_with_deepspeed(zero: int, tied: bool, precision: str, rank: int, num_workers: int) -> dict[str, Tensor]:
    import deepspeed

    module, teacher = module_and_teacher(tied)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": len(ROWS) // num_workers // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        # Persistent small parameters would hide what partitioning does to this small model.
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer_for(module), config=config)
    losses, norms = [], []
    for _ in range(STEPS):
        total = torch.zeros(())
        for batch in micro_batches(teacher, rank, num_workers):
            loss_sum, *_ = engine(batch, SETTINGS)
            engine.backward(loss_sum / NUM_RESPONSE_TOKENS * num_workers * ACCUMULATION)
            engine.step()
            total += loss_sum.detach()
        torch.distributed.all_reduce(total)
        losses.append(total / NUM_RESPONSE_TOKENS)
        norm = engine.get_global_grad_norm()
        norms.append(torch.tensor(torch.nan if norm is None else float(norm)))
    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    engine.destroy()
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}


def worker(rank: int, num_workers: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHDYNAMO_DISABLE="1",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use, and not needed
    deepspeed.init_distributed("gloo", verbose=False)
    for zero, tied, precision in FP32_CASES + BF16_CASES:
        result = train_with_deepspeed(zero, tied, precision, rank, num_workers)
        if rank == 0:
            save_file(result, Path(folder) / f"{zero}-{tied}-{precision}-{num_workers}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for num_workers in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (num_workers, port, str(folder))
        torch.multiprocessing.start_processes(worker, arguments, num_workers, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def reference() -> dict[bool, dict[str, Tensor]]:
    return {tied: train_plainly(tied) for tied in (True, False)}


pytestmark = pytest.mark.slow
with_workers = pytest.mark.parametrize("num_workers", [1, 2])


@with_workers
@pytest.mark.parametrize(("zero", "tied", "precision"), FP32_CASES)
def test_fp32_losses_norms_and_weights_equal_plain_pytorch(
    results: Path, reference: dict[bool, dict[str, Tensor]], zero: int, tied: bool, precision: str, num_workers: int
) -> None:
    got, expected = load_file(results / f"{zero}-{tied}-{precision}-{num_workers}.safetensors"), reference[tied]
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-6, atol=0.0)
    if zero > 0:  # in fp32, DeepSpeed does not report the norm of ZeRO-0
        torch.testing.assert_close(got["norms"], expected["norms"], rtol=1e-5, atol=0.0)
    assert set(got) == set(expected)
    for name in set(expected) - {"losses", "norms"}:
        torch.testing.assert_close(got[name], expected[name], rtol=0.0, atol=1e-5, msg=name)


@with_workers
@pytest.mark.parametrize(("zero", "tied", "precision"), BF16_CASES)
def test_bf16_stays_near_fp32_and_the_zero_stages_near_each_other(
    results: Path, reference: dict[bool, dict[str, Tensor]], zero: int, tied: bool, precision: str, num_workers: int
) -> None:
    got = load_file(results / f"{zero}-{tied}-{precision}-{num_workers}.safetensors")
    torch.testing.assert_close(got["losses"], reference[tied]["losses"], rtol=1e-2, atol=0.0)
    first = load_file(results / f"1-{tied}-{precision}-1.safetensors")
    torch.testing.assert_close(got["losses"], first["losses"], rtol=1e-3, atol=0.0)
