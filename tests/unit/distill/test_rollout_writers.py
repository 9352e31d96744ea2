"""The backends of rollouts: the use of vLLM, tested against a stand-in, and refusals if it is missing."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pocl_ray.config import RolloutConfig
from pocl_ray.distill import rollout_writers
from pocl_ray.errors import ConfigError

CONFIG = RolloutConfig(mode="on", backend="vllm", sampling_temperature=0.7, top_p=0.9)


class Engine:
    """A vLLM engine that answers each prompt with its last token and the end, and remembers what it was told."""

    made: ClassVar[list[Engine]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.calls, self.weights, self.settings = options, [], {}, []
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self.load)))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        Engine.made.append(self)

    def load(self, pairs: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append("load")
        self.weights = dict(pairs)

    def sleep(self, level: int) -> None:
        self.calls.append("sleep")

    def wake_up(self) -> None:
        self.calls.append("wake")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        self.settings = settings
        answers = [[prompt["prompt_token_ids"][-1], 2] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(answer))]) for answer in answers]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM = Engine  # type: ignore[attr-defined]
    module.SamplingParams = lambda **keys: SimpleNamespace(**keys)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(rollout_writers.importlib.util, "find_spec", lambda name: object())


def student_on(device: str) -> Any:
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    engine = SimpleNamespace(device=torch.device(device), module=model)
    return SimpleNamespace(engine=engine, current=lambda: model)


def test_vllm_gets_the_weights_of_now_before_it_writes_and_sleeps_after(vllm: None) -> None:
    writer = rollout_writers.VllmWriter(CONFIG, student_on("cuda"), [2], 5, "student", 64)
    prompts = [np.array([7, 8], np.int32), np.array([9], np.int32)]
    found = writer.write([3, 4], prompts, [10, 20], step=1)
    assert [response.tolist() for response in found] == [[8, 2], [9, 2]]
    engine = Engine.made[-1]
    assert engine.calls == ["sleep", "wake", "load", "reset", "generate", "sleep"]
    assert set(engine.weights) == {"weight", "bias"}
    assert (engine.options["dtype"], engine.options["max_model_len"]) == ("bfloat16", 64)
    first, second = engine.settings
    assert (first.temperature, first.top_p, first.stop_token_ids) == (0.7, 0.9, [2])
    assert (first.max_tokens, second.max_tokens) == (10, 20)


def test_vllm_draws_by_seed_step_and_row(vllm: None) -> None:
    def seeds(step: int, ids: list[int], seed: int = 5) -> list[int]:
        writer = rollout_writers.VllmWriter(CONFIG, student_on("cuda"), [2], seed, "student", 64)
        writer.write(ids, [np.array([1])] * len(ids), [4] * len(ids), step)
        return [settings.seed for settings in Engine.made[-1].settings]

    assert seeds(1, [3, 4]) == seeds(1, [4, 3])[::-1]
    assert len({*seeds(1, [3, 4]), *seeds(2, [3, 4]), *seeds(1, [3, 4], seed=6)}) == 6


def test_vllm_on_a_worker_without_a_gpu_is_refused(vllm: None) -> None:
    with pytest.raises(ConfigError, match=r"rollout.backend: vllm needs a GPU .* set it to transformers"):
        rollout_writers.VllmWriter(CONFIG, student_on("cpu"), [2], 5, "student", 64)


def test_vllm_that_is_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'pocl-ray\[vllm\]'.*to transformers"):
        rollout_writers.check_backend(CONFIG)
    rollout_writers.check_backend(RolloutConfig(mode="on"))


def test_the_vllm_that_is_installed_knows_all_that_it_is_told() -> None:
    """The stand-in above is only as good as its likeness."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm)")
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    told = ("model", "skip_tokenizer_init", "dtype", "max_model_len", "gpu_memory_utilization", "enable_sleep_mode")
    options = {*told, "distributed_executor_backend", "tensor_parallel_size"}
    assert options <= set(inspect.signature(EngineArgs).parameters)
    settings = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=4, stop_token_ids=[2], seed=1, detokenize=False)
    assert (settings.max_tokens, settings.seed, settings.stop_token_ids) == (4, 1, [2])
    assert {"use_tqdm", "sampling_params"} <= set(inspect.signature(LLM.generate).parameters)
    assert "level" in inspect.signature(LLM.sleep).parameters
    assert callable(LLM.wake_up) and callable(LLM.reset_prefix_cache)
