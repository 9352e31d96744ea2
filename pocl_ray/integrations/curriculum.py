"""A curriculum as an object: the rows that another library's trainer sees, their order, and the settings of each step.

It is made from a finished run of pocl-ray (`from_run`), from signals in memory (`from_signals`), or from ranks
(`from_ranks`). Everything in it is a function of the optimizer step, so an interrupted training needs no stored state
to go on. Frontier pacing alone depends on what training sees: `integrations.frontier` has that side.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from pocl_ray.config import CurriculumConfig, load_config
from pocl_ray.config.race import RACE
from pocl_ray.config.training import FRONTIER, FrontierConfig
from pocl_ray.curriculum.schedule import plan_curriculum
from pocl_ray.data.batching import global_batches, random_order
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.ranking import Easy, rank_rows
from pocl_ray.errors import ConfigError, DataError
from pocl_ray.records import GAP, RANK, Stage
from pocl_ray.run_directory.storage import RunDirectory

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Point:
    """The place of an optimizer step in the curriculum.

    Attributes:
        stage: Index of the stage.
        stage_step: Step within the stage, from 0.
        kd_temperature: Temperature that softens both distributions of the distillation loss.
        kd_ratio: Weight of the distillation loss; the rest is cross-entropy.
    """

    stage: int
    stage_step: int
    kd_temperature: float
    kd_ratio: float


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Stages over a ranking of the rows of a data set.

    Each stage continues with the last weights of the stage before, as in the authors' released runs;
    `curriculum.hand_off` does not apply. A rerun in pocl-ray with the same ranking, seed and batch sees the same rows
    in every step.

    Attributes:
        stages: Stages of the plan.
        ranked: Row ids, the easiest first, shape (rows,).
        dataset_rows: Place of each row id in the training data set, shape (rows,).
        global_batch_rows: Rows of an optimizer step, over all processes and accumulated batches.
        seed: Seed of the order of rows within each epoch.
        frontier: How rows are drawn by their gaps; None for rules that take slices of the ranking.
        gaps: Gap of each row before training, in nats per token, shape (rows,); None without `frontier`.
    """

    stages: tuple[Stage, ...]
    ranked: IntArray
    dataset_rows: IntArray
    global_batch_rows: int
    seed: int
    frontier: FrontierConfig | None = None
    gaps: npt.NDArray[np.float64] | None = None

    @classmethod
    def from_ranks(
        cls,
        rank: npt.ArrayLike,
        curriculum: CurriculumConfig,
        global_batch_rows: int,
        seed: int = 42,
        dataset_rows: npt.ArrayLike | None = None,
    ) -> Curriculum:
        """Return a curriculum over rows of known rank.

        Args:
            rank: Rank of each row, shape (rows,); rank 1 is the easiest.
            curriculum: Buckets, pacing and schedules, as in a config of pocl-ray.
            global_batch_rows: Rows of an optimizer step.
            seed: Seed of the order of rows within each epoch.
            dataset_rows: Place of each row in the data set; None if they are its rows in order.

        Raises:
            DataError: The ranks are not each number from 1 to the number of rows once.
            ConfigError: The plan is not possible with this number of rows, or it ends stages on a dev figure,
                or draws rows by their gaps, which a ranking does not hold.
        """
        if curriculum.pacing == FRONTIER:
            raise ConfigError(
                "curriculum.pacing frontier draws rows by their gaps, which a ranking does not hold; give "
                f"Curriculum.from_signals the signal {GAP}, which is the mean KL(teacher || student) of each row"
            )
        return cls._planned(rank, curriculum, global_batch_rows, seed, dataset_rows)

    @classmethod
    def _planned(
        cls,
        rank: npt.ArrayLike,
        curriculum: CurriculumConfig,
        global_batch_rows: int,
        seed: int,
        dataset_rows: npt.ArrayLike | None = None,
    ) -> Curriculum:
        ranks = np.asarray(rank, dtype=np.int64)
        if not np.array_equal(np.sort(ranks), np.arange(1, ranks.size + 1)):
            raise DataError(f"rank must hold each of 1 to {ranks.size} once, 1 for the easiest row")
        if curriculum.advance == "plateau":
            raise ConfigError(
                "curriculum.advance plateau leaves the length of a stage open, which a trainer's sampler must know; "
                "set it to interval"
            )
        if curriculum.pacing == RACE:
            raise ConfigError(
                "curriculum.pacing race trains several students and drops all but one, which pocl-ray's own trainer "
                "does; give Curriculum a CurriculumConfig with another rule, such as baby_step"
            )
        stages = plan_curriculum(curriculum, ranks.size, global_batch_rows)
        places = np.arange(ranks.size) if dataset_rows is None else np.asarray(dataset_rows, dtype=np.int64)
        return cls(stages, np.argsort(ranks, kind="stable"), places, global_batch_rows, seed)

    @classmethod
    def from_signals(
        cls,
        signals: Mapping[str, npt.ArrayLike],
        curriculum: CurriculumConfig,
        global_batch_rows: int,
        seed: int = 42,
        pacing: str | None = None,
        weights: Mapping[str, float] | None = None,
        easy: Mapping[str, Easy] | None = None,
        rrf_k: float = 60.0,
        tie_break: Literal["file_order", "seeded"] = "file_order",
    ) -> Curriculum:
        """Return a curriculum over rows that are ranked by difficulty signals of your own.

        Args:
            signals: Mapping of signal names to the values of the data set's rows, in their order.
            curriculum: Config of the curriculum, as in `from_ranks`; so are `global_batch_rows` and `seed`.
            pacing: Rule in place of the config's, such as `frontier`, which needs the signal `teacher_student_kl`.
            weights: Mapping of signal names to weights in the fusion; a signal left out has weight 1.
            easy: Values of an easy row, `high` or `low`, for signals that pocl-ray does not know.
            rrf_k: Constant of reciprocal rank fusion.
            tie_break: Order of equally hard rows.

        Raises:
            UserError: A signal is unknown, or NaN for some row; or as in `from_ranks`.
        """
        if pacing is not None:  # what is not set takes the defaults of the new rule
            given = curriculum.model_dump(exclude_unset=True)
            curriculum = CurriculumConfig.model_validate({**given, "pacing": pacing})
        _, rank = rank_rows(signals, rrf_k, tie_break, seed, weights=weights, easy=easy)
        planned = cls._planned(rank, curriculum, global_batch_rows, seed)
        return planned._with_gaps(curriculum, signals.get(GAP))

    @classmethod
    def from_run(
        cls,
        storage_path: str,
        name: str,
        curriculum: CurriculumConfig | None = None,
        global_batch_rows: int | None = None,
    ) -> Curriculum:
        """Return the curriculum of a run that `pocl-ray score` has finished.

        The training data set must be the complete source of the run's training rows, in its order. Rows that the run
        left out or held out are not used.

        Args:
            storage_path: Local or remote place of the runs.
            name: Name of the run.
            curriculum: Config of the curriculum that replaces the run's.
            global_batch_rows: Rows of an optimizer step, in place of the run's.

        Raises:
            UserError: The run is missing or not scored, or a row of its source became several rows; or as in
                `from_ranks`.
        """
        run_dir = RunDirectory.open(storage_path, name, create=False)
        for needed in ("config.yaml", "scores.parquet", "rows/train.arrow"):
            if not run_dir.exists(needed):
                raise DataError(f"{run_dir.uri_of(needed)}: no such file; run `pocl-ray score` with its config first")
        config = load_config(run_dir.local("config.yaml"))
        chosen = curriculum or config.curriculum
        if config.data.responses == "teacher":
            raise ConfigError(
                f"{run_dir.uri_of('config.yaml')}: data.responses teacher ranks other responses than the data set "
                "holds; put them into your data set and rank it with Curriculum.from_ranks"
            )
        scores = run_dir.read_table("scores.parquet")
        rows = RowStore.open(run_dir.local("rows/train.arrow"))
        places = np.asarray(rows.source_rows(np.arange(len(rows))), dtype=np.int64) - 1
        if len(np.unique(places)) < len(places):
            raise DataError(
                f"{run_dir.uri_of('rows/train.arrow')}: several training rows have the same number in their source "
                "(many files, or a text in parts), so they have no place in one data set; "
                "rank it with Curriculum.from_ranks"
            )
        seed = config.seed if config.train.seed is None else config.train.seed
        batch_rows = global_batch_rows or config.train.global_batch_rows
        planned = cls._planned(scores[RANK].to_numpy(), chosen, batch_rows, seed, places)
        return planned._with_gaps(chosen, scores[GAP].to_numpy() if GAP in scores.column_names else None)

    def _with_gaps(self, curriculum: CurriculumConfig, gaps: npt.ArrayLike | None) -> Curriculum:
        """The curriculum with the gaps that frontier pacing starts from; itself for other rules."""
        if curriculum.pacing != FRONTIER:
            return self
        if gaps is None:
            raise ConfigError(
                f"curriculum.pacing frontier draws rows by their gaps: give the signal {GAP} as well, which is the "
                "mean KL(teacher || student) of each row's response tokens before training"
            )
        if curriculum.frontier.refresh != "training":
            raise ConfigError(
                "curriculum.frontier.refresh rescore reads rows between stages, which other trainers do not; set it to "
                "training"
            )
        values = np.asarray(gaps, dtype=np.float64)
        if values.shape != self.dataset_rows.shape or not np.isfinite(values).all():
            raise DataError(f"{GAP} must hold one finite number for each of {len(self.dataset_rows)} rows")
        return replace(self, frontier=curriculum.frontier, gaps=values)

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of all stages."""
        return self._ends[-1]

    @property
    def restarts(self) -> bool:
        """Return whether each stage starts with new moments and its own LR schedule, as in the paper."""
        return any(stage.restart_optimizer for stage in self.stages[1:])

    def at(self, step: int) -> Point:
        """Return the place of an optimizer step, counted from 0; after the end, the place of the last step."""
        step = max(0, min(step, self.num_steps - 1))
        index = bisect.bisect_right(self._ends, step)
        stage = self.stages[index]
        within = step - (self._ends[index - 1] if index else 0)
        return Point(index, within, stage.kd_temperature_at(within), stage.kd_ratio_at(within))

    def batches(self) -> Iterator[IntArray]:
        """Yield the indices of the data set's rows for each optimizer step, shape (global_batch_rows,)."""
        assert self.frontier is None, "rows that are drawn by gaps are not known beforehand"
        orders = {"rank": self.ranked, "random": random_order(len(self.ranked), self.seed)}
        for stage in self.stages:
            rows = orders[stage.order][stage.first_rank : stage.end_rank]
            for ids in global_batches(stage, rows, self.global_batch_rows, self.seed):
                yield self.dataset_rows[ids]

    def sampler(self) -> CurriculumSampler:
        """Return a sampler of the rows of all stages, for a `DataLoader`."""
        return CurriculumSampler(self)

    def check(self, num_dataset_rows: int, rows_per_step: int) -> None:
        """Check that a trainer's data set and batch fit the plan.

        Raises:
            DataError: The data set has too few rows.
            ConfigError: An optimizer step takes another number of rows.
        """
        if num_dataset_rows <= int(self.dataset_rows.max()):
            raise DataError(
                f"the curriculum ranks row {int(self.dataset_rows.max())} (from 0), but the data set has "
                f"{num_dataset_rows} rows; rank the very data set that is trained on (packing and filtering "
                "change rows)"
            )
        if rows_per_step != self.global_batch_rows:
            raise ConfigError(
                f"an optimizer step takes {rows_per_step} rows (per_device_train_batch_size x "
                f"gradient_accumulation_steps x processes), but the curriculum is planned with "
                f"{self.global_batch_rows}; make them equal"
            )

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything that decides the order of rows and the settings of steps."""
        plan = [[stage.to_json() for stage in self.stages], self.global_batch_rows, self.seed]
        content = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
        for array in (self.ranked, self.dataset_rows):
            content.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        if self.frontier is not None and self.gaps is not None:
            content.update(self.frontier.model_dump_json().encode() + self.gaps.tobytes())
        return content.hexdigest()

    @cached_property
    def _ends(self) -> list[int]:
        """The optimizer step at which each stage ends."""
        return list(itertools.accumulate(stage.num_steps for stage in self.stages))


class CurriculumSampler(Sampler[int]):
    """A sampler of the data set's rows for all stages of a curriculum, in order, epoch after epoch.

    One pass over it is the whole training. `accelerate` distributes consecutive batches over the processes and
    accumulates them, so that an optimizer step sees one global batch.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        """Take the curriculum; nothing is drawn before iteration."""
        self.curriculum = curriculum

    def __len__(self) -> int:
        return self.curriculum.num_steps * self.curriculum.global_batch_rows

    def __iter__(self) -> Iterator[int]:
        for rows in self.curriculum.batches():
            yield from rows.tolist()
