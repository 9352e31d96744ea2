"""The backends that write rollouts: transformers on any device, or vLLM on GPUs.

vLLM is the extra `vllm`, limited to releases whose pinned torch is ours. It holds a second copy of the student. The
copy gets the current weights before each rollout, and its memory is released in between.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pocl_ray.answers.batch import Tokens
from pocl_ray.answers.decode import GenerationSettings, decode
from pocl_ray.config import RolloutConfig
from pocl_ray.distill.engine import InferenceStudent
from pocl_ray.distill.rollout_schedule import token_draws, writing_seed
from pocl_ray.errors import ConfigError


class RolloutWriter(Protocol):
    """A backend that writes responses with the current student.

    Attributes:
        stop_ids: Tokens that end a response.
    """

    stop_ids: Sequence[int]

    def write(
        self, ids: Sequence[int], prompts: Sequence[Tokens], limits: Sequence[int], step: int
    ) -> list[np.ndarray]:
        """Return the response to each prompt, including the token that ends it; collective under ZeRO-3.

        Args:
            ids: Row ids, which decide the sampling together with seed and step.
            prompts: Token ids of each row's prompt.
            limits: Maximum tokens of each response.
            step: Number of optimizer steps done so far.
        """


class TransformersWriter:
    """Runs the student itself, or its copy under ZeRO-3."""

    def __init__(self, config: RolloutConfig, student: InferenceStudent, stop_ids: Sequence[int], seed: int) -> None:
        self.config, self.student, self.stop_ids, self.seed = config, student, stop_ids, seed

    def write(
        self, ids: Sequence[int], prompts: Sequence[Tokens], limits: Sequence[int], step: int
    ) -> list[np.ndarray]:
        """See `RolloutWriter`. A row's draws are its own: it is written alike on any worker and in any batch."""
        draws = [token_draws(self.seed, step, row, limit) for row, limit in zip(ids, limits, strict=True)]
        config = self.config
        settings = GenerationSettings(config.sampling_temperature, config.top_p, batch_rows=config.batch_rows)
        (written,) = decode(self.student.current(), prompts, limits, [draws], self.stop_ids, settings)
        return written


class VllmWriter:
    """Runs a vLLM engine in the worker's own process, on the worker's own GPU."""

    def __init__(
        self,
        config: RolloutConfig,
        student: InferenceStudent,
        stop_ids: Sequence[int],
        seed: int,
        directory: str,
        max_tokens: int,
    ) -> None:
        """Start the engine.

        Args:
            config: Settings of the sampling.
            student: Source of the weights.
            stop_ids: Tokens that end a response.
            seed: Seed of all random draws.
            directory: Local directory with the student's config; its weights are replaced before each rollout.
            max_tokens: Maximum tokens of prompt and response together.

        Raises:
            ConfigError: vLLM is not installed, or the worker has no GPU.
        """
        check_backend(config)
        if student.engine.device.type != "cuda":
            raise ConfigError("rollout.backend: vllm needs a GPU for each worker; set it to transformers")
        import vllm

        self.config, self.student, self.seed = config, student, seed
        self.stop_ids: Sequence[int] = stop_ids
        self.params = vllm.SamplingParams
        self.engine: Any = vllm.LLM(
            model=directory,
            skip_tokenizer_init=True,
            dtype=str(next(student.engine.module.parameters()).dtype).removeprefix("torch."),
            max_model_len=max_tokens,
            gpu_memory_utilization=config.vllm_gpu_share,
            enable_sleep_mode=True,
            # The process group of the training workers exists already; each worker is a separate engine in it.
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=1,
        )
        self.engine.sleep(level=1)

    def write(
        self, ids: Sequence[int], prompts: Sequence[Tokens], limits: Sequence[int], step: int
    ) -> list[np.ndarray]:
        """See `RolloutWriter`. Each row has its own seed, but rounding may differ with what else is in vLLM's batch."""
        model = self.student.current()
        self.engine.wake_up()
        inner = self.engine.llm_engine.model_executor.driver_worker.model_runner.model
        with torch.no_grad():
            inner.load_weights([(name, parameter.detach()) for name, parameter in model.named_parameters()])
        self.engine.reset_prefix_cache()  # it holds keys and values of the old weights
        settings = [
            self.params(
                temperature=self.config.sampling_temperature,
                top_p=self.config.top_p,
                max_tokens=limit,
                stop_token_ids=list(self.stop_ids),
                seed=writing_seed(self.seed, step, row),
                detokenize=False,
            )
            for row, limit in zip(ids, limits, strict=True)
        ]
        inputs = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
        outputs = self.engine.generate(inputs, settings, use_tqdm=False)
        self.engine.sleep(level=1)
        return [np.array(output.outputs[0].token_ids, np.int32) for output in outputs]


def check_backend(config: RolloutConfig) -> None:
    """Refuse a backend that is not installed.

    Raises:
        ConfigError: The backend is vLLM, and vLLM is missing.
    """
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.backend: vllm is not installed: pip install 'pocl-ray[vllm]' on every node, or set it to "
            "transformers"
        )
