"""Responses of the decoding loop: what the library's own logits say, token by token, however rows are put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_answers import CONFIGS, EOS, VOCAB, some_prompts, tiny_model
from transformers import PreTrainedModel

from pocl_ray.answers import batch as module
from pocl_ray.answers.batch import groups_of
from pocl_ray.answers.decode import GenerationSettings, decode
from pocl_ray.answers.families import means_of
from pocl_ray.answers.sampling import draw


def numbers(limits: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(limit, dtype=np.float32) for limit in limits]


def written(model: PreTrainedModel, prompts: list[np.ndarray], limits: list[int], **changes: Any) -> list[list[int]]:
    stop_ids = changes.pop("stop_ids", [EOS])
    settings = GenerationSettings(**{"batch_rows": 5, **changes})
    (responses,) = decode(model, prompts, limits, [numbers(limits)], stop_ids, settings)
    return [response.tolist() for response in responses]


@torch.no_grad()
def by_definition(
    model: PreTrainedModel, prompt: np.ndarray, limit: int, uniform: np.ndarray, temperature: float, top_p: float
) -> list[int]:
    """One row without padding, cache or blocks, in float64; EOS is kept."""
    tokens = prompt.tolist()
    for step in range(limit):
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p, order = torch.softmax(logits / temperature, -1), torch.arange(VOCAB)
            if top_p < 1:
                p, order = p.sort(descending=True, stable=True)
                p = torch.where(p.cumsum(-1) - p < top_p, p, torch.zeros_like(p))
            mass = p.cumsum(-1)
            token = int(order[int((mass <= float(uniform[step]) * mass[-1]).sum())])
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.3, 1.0), (1.0, 0.7)])
def test_responses_are_those_of_each_row_alone_by_definition(family: str, temperature: float, top_p: float) -> None:
    model, prompts = tiny_model(family), some_prompts(12, 19)
    limits = [6 + 2 * row for row in range(len(prompts))]
    found = written(model, prompts, limits, sampling_temperature=temperature, top_p=top_p)
    rows = zip(prompts, limits, numbers(limits), strict=True)
    assert found == [by_definition(model, *row, temperature, top_p) for row in rows]


def test_a_response_keeps_its_end_and_one_that_ran_out_has_none() -> None:
    limits = [40] * 12
    found = written(tiny_model(), some_prompts(12, 19), limits)
    ended = [response for response in found if response[-1] == EOS]
    assert ended and len(ended) < len(found)
    assert all(EOS not in response[:-1] for response in found)
    assert all(len(response) == 40 for response in found if response[-1] != EOS)


def test_batches_change_no_response() -> None:
    model, prompts, limits = tiny_model(), some_prompts(12, 19), [30] * 12
    assert written(model, prompts, limits, batch_rows=1) == written(model, prompts, limits, batch_rows=12)


@pytest.mark.parametrize("family", ["llama", "gemma2_softcapped"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.0, 0.7)])
def test_slices_of_the_head_change_no_response(
    family: str, temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, limits, sampling = tiny_model(family), [30] * 12, {"sampling_temperature": temperature, "top_p": top_p}
    with monkeypatch.context() as whole:
        whole.setattr(module.Batch, "_logits", lambda batch, hidden_BH: batch.parts.logits(hidden_BH))
        expected = written(model, some_prompts(12, 19), limits, **sampling)
    monkeypatch.setattr(module, "_HEAD_ROWS", 7)
    assert written(model, some_prompts(12, 19), limits, **sampling) == expected


def test_slices_of_the_head_keep_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    model, limits = tiny_model(), [9] * 12
    model.lm_head.bias = torch.nn.Parameter(torch.full((VOCAB,), -9.0).index_fill(0, torch.tensor([17]), 9.0))
    monkeypatch.setattr(module, "_HEAD_ROWS", 16)
    found = written(model, some_prompts(12, 19), limits, sampling_temperature=0.0)
    assert {token for response in found for token in response} == {17}


def test_any_stop_token_ends_a_response() -> None:
    model, prompts, limits = tiny_model(), some_prompts(12, 19), [30] * 12
    also = next(response[1] for response in written(model, prompts, limits) if len(response) > 2)
    for response in written(model, prompts, limits, stop_ids=[EOS, also]):
        assert not {EOS, also} & set(response[:-1])


def test_rows_that_ended_are_computed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model(), []
    means_of(model)
    body = model.base_model
    original = body.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        widths.append(tuple(input_ids.shape))
        return original(input_ids=input_ids, **options)

    counted.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(body, "forward", counted)
    found = written(model, some_prompts(12, 19), [60] * 12, batch_rows=12)
    reading, writing = [w for w in widths if w[1] > 1], [w for w in widths if w[1] == 1]
    assert widths == reading + writing and sum(width[0] for width in reading) == 12, "each prompt is read once"
    assert writing[0][0] > writing[-1][0]
    assert len(writing) == max(map(len, found)) - 1, "nothing runs on after the last row has ended"


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 2, 40, 41, 100], list(range(1, 60, 3)), [7] * 9 + [300]])
def test_prompts_are_read_in_groups_of_little_padding(lengths: list[int]) -> None:
    groups = groups_of(lengths)
    assert [place for rows, _ in groups for place in range(len(lengths))[rows]] == list(range(len(lengths)))
    for rows, longest in groups:
        assert longest == max(lengths[rows])
        assert sum(lengths[rows]) >= 0.8 * longest * len(lengths[rows])


def test_draws_have_the_models_distribution() -> None:
    torch.manual_seed(0)
    logits_V = 2 * torch.randn(600)
    uniform_B = (torch.arange(200_000) + 0.5) / 200_000
    counts_V = torch.bincount(draw(logits_V.repeat(200_000, 1), uniform_B), minlength=600) / 200_000
    torch.testing.assert_close(counts_V, torch.softmax(logits_V, -1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_the_ends_of_the_unit_interval_draw_tokens_that_exist(vocabulary: int) -> None:
    logits_BV = torch.randn(3, vocabulary)
    logits_BV[1, -1] = -torch.inf if vocabulary > 1 else 0.0
    logits_BV[2, : vocabulary // 2] = -torch.inf
    for number in (0.0, 1 - 2**-24):
        token_B = draw(logits_BV.clone(), torch.full((3,), number))
        assert bool((token_B < vocabulary).all())
        assert bool((logits_BV.gather(1, token_B[:, None]) > -torch.inf).all())


def test_training_goes_on_from_where_it_was() -> None:
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    written(model, some_prompts(12, 19), [9] * 12)
    assert torch.rand(2).tolist() == expected, "the global generator is not used"
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("batch_rows", [2, 5, 100])
def test_draws_of_a_prompt_share_its_prefill_and_change_no_response(
    family: str, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, limits = tiny_model(family), some_prompts(12, 19), [20 + row for row in range(12)]
    settings = GenerationSettings(no_repeat_ngram_size=3, batch_rows=batch_rows)
    draws = [numbers(limits, 1), None, numbers(limits, 2)]
    alone = [decode(model, prompts, limits, [draw], [EOS], settings)[0] for draw in draws]
    read = []
    original = module.Batch._forward

    def counted(batch: Any, ids_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(tuple(ids_BT.shape))
        return original(batch, ids_BT, *rest)

    monkeypatch.setattr(module.Batch, "_forward", counted)
    together = decode(model, prompts, limits, draws, [EOS], settings)
    assert [[r.tolist() for r in one] for one in together] == [[r.tolist() for r in one] for one in alone]
    if batch_rows >= len(draws):
        assert sum(rows for rows, width in read if width > 1) == len(prompts), "each prompt is read once"


def test_no_ngram_repeats_in_prompt_and_answer_as_the_library_bans_them() -> None:
    model, prompts, limits = tiny_model("gpt2"), some_prompts(12, 19), [30] * 12
    found = written(model, prompts, limits, sampling_temperature=0.0, no_repeat_ngram_size=2)
    for prompt, response in zip(prompts, found, strict=True):
        ids_BT = torch.from_numpy(prompt)[None]
        options = {"do_sample": False, "max_new_tokens": 30, "no_repeat_ngram_size": 2, "pad_token_id": EOS}
        expected = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), eos_token_id=EOS, **options)
        assert response == expected[0, len(prompt) :].tolist()
