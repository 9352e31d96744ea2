"""The order of training, and the tensors of a micro-batch.

The order is a function of (seed, stage, epoch) alone. A global batch is drawn first, and then cut into the ranks'
micro-batches, so a run that resumes with another number of workers trains on the same global batches. The rows of a
global batch are sorted by length before the cut. Since the loss is a sum over response tokens, the cut changes only the
padding, and packed rows, which follow each other without any, are trained on like padded ones.

Legend: B rows, T tokens, N response tokens of the micro-batch in one flat axis, K width of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pocl_ray.data.dealing import PAD_MULTIPLE, deal_rows, deal_tokens
from pocl_ray.data.row_store import Pairs
from pocl_ray.records import Stage
from pocl_ray.teacher_cache.top_k import TopK


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output at the response tokens of a batch.

    Attributes:
        tokens: Final hidden states, shape (N, K), for the teacher's LM head; or its likeliest tokens.
        teacher: Index of the teacher among the run's teachers.
        weight: Weight of the teacher's divergence in the loss.
        paired_N: Mask, on the CPU, of the batch's response tokens that have a counterpart in another tokenizer of the
            teacher; `tokens` then holds only these counterparts, in their order. None: all have one.
    """

    tokens: torch.Tensor | TopK
    teacher: int = 0
    weight: float = 1.0
    paired_N: torch.Tensor | None = None


@dataclass(frozen=True)
class TeacherRows:
    """The rows of a batch in the tokens of a live teacher with another tokenizer.

    Attributes:
        batch: Input of the teacher.
        pairs: Pairs of the teacher's and the student's response tokens.
    """

    batch: MicroBatch
    pairs: Pairs


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one worker: padded on the right, or packed into a batch of one without padding.

    Attributes:
        input_ids_BT: Token ids of prompt and response, int64.
        attention_mask_BT: Mask with 1 for tokens and 0 for padding; all 1 for packed rows.
        response_index_N: Flat positions in `B*T` whose *next* token is a response token, row by row.
        targets_N: Ids of these next tokens.
        teacher_outputs: Outputs of the teachers at the same positions; empty without a teacher.
        is_rollout: Whether the student wrote the responses.
        teacher_rows: Input of a live teacher with another tokenizer; None: the student's input.
        row_ids_B: Rows that the responses belong to, on the CPU; None for responses that the student wrote.
        row_lengths: Number of tokens of each row, if the rows are packed; None if they are padded.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    response_index_N: torch.Tensor
    targets_N: torch.Tensor
    teacher_outputs: tuple[TeacherOutput, ...] = ()
    is_rollout: bool = False
    teacher_rows: TeacherRows | None = None
    row_ids_B: np.ndarray | None = None
    row_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the batch on a device."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            attention_mask_BT=self.attention_mask_BT.to(device, non_blocking=True),
            response_index_N=self.response_index_N.to(device, non_blocking=True),
            targets_N=self.targets_N.to(device, non_blocking=True),
            teacher_outputs=tuple(
                replace(one, tokens=one.tokens.to(device, non_blocking=True)) for one in self.teacher_outputs
            ),
        )

    @property
    def num_response_tokens(self) -> int:
        """The number of response tokens in the batch."""
        return self.targets_N.numel()

    @property
    def rows_input(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
        """The arguments of a function that reads the rows: ids, mask, response positions, lengths of packed rows."""
        return self.input_ids_BT, self.attention_mask_BT, self.response_index_N, self.row_lengths

    def padded(self) -> MicroBatch:
        """Return the batch with padded rows, for a model that cannot read packed ones."""
        if self.row_lengths is None:
            return self
        lengths_B = torch.tensor(self.row_lengths, device=self.input_ids_BT.device)
        position_T = torch.arange(max(self.row_lengths), device=lengths_B.device)
        mask_BT = position_T < lengths_B[:, None]
        ids_BT = torch.zeros_like(mask_BT, dtype=self.input_ids_BT.dtype).masked_scatter(mask_BT, self.input_ids_BT)
        flat_of_packed = mask_BT.flatten().nonzero().squeeze(-1)
        return replace(
            self,
            input_ids_BT=ids_BT,
            attention_mask_BT=mask_BT.long(),
            response_index_N=flat_of_packed[self.response_index_N],
            row_lengths=None,
        )


def random_order(num_rows: int, seed: int) -> np.ndarray:
    """Return all row ids in an order drawn by the seed, independent of the orders of the epochs."""
    # A key that no (seed, stage, epoch) of `epoch_order` has: the two orders must not be correlated.
    sequence = np.random.SeedSequence(seed, spawn_key=(1,))
    return np.random.Generator(np.random.PCG64(sequence)).permutation(num_rows)


def epoch_order(stage_rows: np.ndarray, seed: int, stage: int, epoch: int) -> np.ndarray:
    """Return the stage's row ids in the order of one epoch, which is a function of (seed, stage, epoch)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stage, epoch])))
    return stage_rows[rng.permutation(len(stage_rows))]


def global_batches(
    stage: Stage, stage_rows: np.ndarray, global_batch_rows: int, seed: int, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Yield the row ids of each optimizer step of a stage, from step `first_step` on.

    Args:
        stage: The stage.
        stage_rows: Row ids of the stage.
        global_batch_rows: Rows of an optimizer step; rows left over at the end of an epoch are skipped in that epoch.
        seed: Seed of the run.
        first_step: Number of optimizer steps of the stage that are already done.
    """
    order, epoch_of_order = stage_rows, -1
    for step in range(first_step, stage.num_steps):
        # A step's rows follow from its number, so a resumed run needs no list of what was seen.
        epoch, within = divmod(step, stage.steps_per_epoch)
        if epoch != epoch_of_order:
            order, epoch_of_order = epoch_order(stage_rows, seed, stage.index, epoch), epoch
        yield order[within * global_batch_rows : (within + 1) * global_batch_rows]


@dataclass
class Layout:
    """How rows share forward passes: how they are dealt and cut into micro-batches, and whether these are packed.

    One object serves the training rows, the dev rows and the rollouts of a run.

    Attributes:
        pad_id: Token id of the padding.
        micro_batch_rows: Maximum rows of a micro-batch, if there is no token budget.
        micro_batch_tokens: Maximum tokens of a micro-batch, padding included; None: rows are counted.
        is_packed: Whether rows are packed; it changes only before the first step.
    """

    pad_id: int
    micro_batch_rows: int
    micro_batch_tokens: int | None = None
    is_packed: bool = False

    def deal(self, lengths_R: np.ndarray, rank: int, world_size: int) -> list[np.ndarray]:
        """Return the places of the rows in each micro-batch of a rank, equally many micro-batches on every rank."""
        if self.micro_batch_tokens is None:
            return deal_rows(lengths_R, rank, world_size, self.micro_batch_rows)
        return deal_tokens(lengths_R, rank, world_size, self.micro_batch_tokens, self.is_packed)

    def collate(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> MicroBatch:
        """Return rows as a micro-batch; prompts and responses have at least one token each."""
        return pack(prompts, responses) if self.is_packed else collate(prompts, responses, self.pad_id)


def collate(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], pad_id: int, multiple: int = PAD_MULTIPLE
) -> MicroBatch:
    """Return a micro-batch of rows, padded on the right.

    Args:
        prompts: Token ids of each prompt, at least one.
        responses: Token ids of each response, at least one.
        pad_id: Token id of the padding. It is masked, so it may be the end-of-sequence token.
        multiple: Number of which T is made a multiple.
    """
    num_prompt = np.fromiter(map(len, prompts), np.int64, len(prompts))[:, None]
    total = num_prompt + np.fromiter(map(len, responses), np.int64, len(responses))[:, None]
    width = -(-int(total.max()) // multiple) * multiple
    position_T = np.arange(width)
    mask_BT = position_T < total
    ids_BT = np.full(mask_BT.shape, pad_id, np.int64)
    ids_BT[mask_BT] = np.concatenate([part for pair in zip(prompts, responses, strict=True) for part in pair])
    # From the last token of the prompt, which predicts the response's first, to the last but one.
    predicts_BT = (position_T >= num_prompt - 1) & (position_T < total - 1)
    index_N = np.flatnonzero(predicts_BT)
    return MicroBatch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(mask_BT.astype(np.int64)),
        torch.from_numpy(index_N),
        torch.from_numpy(ids_BT.ravel()[index_N + 1]),
    )


def pack(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> MicroBatch:
    """Return a micro-batch of rows that follow each other without padding.

    Args:
        prompts: Token ids of each prompt, at least one.
        responses: Token ids of each response, at least one.
    """
    rows = [part for pair in zip(prompts, responses, strict=True) for part in pair]
    sizes_R2 = np.fromiter(map(len, rows), np.int64, len(rows)).reshape(-1, 2)
    lengths_R = sizes_R2.sum(1)
    ids_T = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    place_T = np.arange(len(ids_T)) - np.repeat(np.cumsum(lengths_R) - lengths_R, lengths_R)
    num_prompt_T, length_T = np.repeat(sizes_R2[:, 0], lengths_R), np.repeat(lengths_R, lengths_R)
    index_N = torch.from_numpy(np.flatnonzero((place_T >= num_prompt_T - 1) & (place_T < length_T - 1)))
    return MicroBatch(
        ids_T.unsqueeze(0),
        torch.ones(1, len(ids_T), dtype=torch.int64),
        index_N,
        ids_T[index_N + 1],
        row_lengths=tuple(lengths_R.tolist()),
    )
