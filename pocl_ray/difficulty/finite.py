"""Refuses rows on which a model overflows: they would be ranked, cached and learnt wrongly without a word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.ranking import TEACHER_SIGNALS
from pocl_ray.difficulty.signals import Signals
from pocl_ray.errors import ModelError
from pocl_ray.teacher_cache.top_k import TopK
from pocl_ray.teacher_cache.writer import is_finite, listed

CHECKED = {"ce_loss", "student_confidence", *TEACHER_SIGNALS}  # plug-ins' signals are checked where they are measured


def check_finite(
    role: str,
    name: str,
    rows: RowStore,
    ids: npt.NDArray[np.int64],
    hidden_NH: torch.Tensor,
    lengths_R: npt.NDArray[np.int64],
    signals: Signals,
    outputs: Sequence[torch.Tensor | TopK] = (),
) -> None:
    """Refuse rows of a micro-batch with a hidden state, a signal or a cached output that is not finite.

    Args:
        role: `teacher` or `student`.
        name: Name of the set.
        rows: Rows of the set.
        ids: Row ids of the micro-batch, shape (R,).
        hidden_NH: Hidden states of the N response tokens.
        lengths_R: Number of response tokens of each row.
        signals: Signals of the rows.
        outputs: Outputs of each row that go to the cache, in its dtype.

    Raises:
        ModelError: Some are not finite; it names their source rows and the dtype.
    """
    own = np.array([is_finite(part) for part in hidden_NH.split(lengths_R.tolist())])
    own &= np.all([np.isfinite(values_R) for key, values_R in signals.items() if key in CHECKED], axis=0)
    stored = np.array([is_finite(output) for output in outputs]) if outputs else own
    if (own & stored).all():
        return
    found = f"{listed(sorted(rows.source_rows(ids[~(own & stored)])))} of {name}"
    if own.all():
        raise ModelError(
            f"distill.cache_dtype: the teacher's outputs for {found} overflow in it; set it to auto or float32"
        )
    dtype = str(hidden_NH.dtype).removeprefix("torch.")
    raise ModelError(
        f"{role}: its outputs for {found} are not finite in {dtype}; set {role}.dtype to bfloat16 or float32, or look "
        "at its weights"
    )
