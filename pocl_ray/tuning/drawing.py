"""Draws candidates until there are as many as asked for: invalid and repeated ones are drawn again, and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocl_ray.config import Config
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.tuning.candidates import Candidate, Planned, Planner
from pocl_ray.tuning.constraints import ConstraintError
from pocl_ray.tuning.proposing import Told, draw_all, propose
from pocl_ray.tuning.space import Settings, grid_points

NUM_TRIED = 200  # draws of which at least one must be valid before a search starts, or goes on
NUM_ASKED = 20  # of these, so many are asked of the algorithm, which may insist; the rest are random

Plan = Callable[[Candidate], Planned]


class Drawing:
    """The state of a search: what was drawn, and what came of it. Its JSON is all that a resumed search needs."""

    def __init__(self, config: Config, plan: Plan) -> None:
        """Take the base config, and the function that plans a candidate or raises ConfigError."""
        assert config.tune is not None
        self.tune, self.seed, self.plan = config.tune, config.seed, plan
        self.num_drawn = 0
        self.control_drawn = not config.tune.control
        self.told: list[Told] = []
        self.skipped: list[dict[str, Any]] = []

    @property
    def limit(self) -> int:
        """How many trials there will be at most, without the control."""
        if self.tune.algorithm == "grid":
            return min(self.tune.num_trials or len(grid_points(self.tune.space)), len(grid_points(self.tune.space)))
        return self.tune.num_trials or 16

    def candidates(self) -> list[Candidate]:
        """Return all that was drawn so far, the control first."""
        control = [Candidate("control", -1, {})] if self.tune.control and self.control_drawn else []
        return [*control, *(Candidate("trial", number, told.settings) for number, told in enumerate(self.told))]

    def next(self) -> Planned | None:
        """Return the next candidate, the control first; None when there are no more."""
        if not self.control_drawn:
            self.control_drawn = True
            return self.plan(Candidate("control", -1, {}))
        seen = [told.settings for told in self.told]
        for attempt in range(NUM_TRIED):
            if len(self.told) >= self.limit:
                return None
            settings = self._draw(attempt)
            if settings is None:
                return None
            reason = "was tried before" if settings in seen else None
            if reason is None:
                try:
                    planned = self.plan(Candidate("trial", len(self.told), settings))
                except UserError as error:
                    reason = str(error)
                else:
                    self.told.append(Told(settings, "running"))
                    return planned
            self.skipped.append({"settings": settings, "reason": reason})
        return None

    def _draw(self, attempt: int) -> Settings | None:
        self.num_drawn += 1
        if attempt >= NUM_ASKED and self.tune.algorithm != "grid":
            return draw_all(self.tune, self.num_drawn - 1, self.seed)
        return propose(self.tune, self.num_drawn - 1, self.told, self.seed)

    def tell(self, number: int, result: Mapping[str, Any] | None) -> None:
        """Note how a trial ended: its last report, or None where it failed."""
        if number < 0:
            return
        settings = self.told[number].settings
        if result is None or any(o.metric not in result for o in self.tune.objectives):
            self.told[number] = Told(settings, "failed")
            return
        values = tuple(float(result[o.metric]) for o in self.tune.objectives)
        state = "finished" if result.get("is_finished") else "stopped"
        self.told[number] = Told(settings, state, values, int(result["num_samples"]))  # type: ignore[arg-type]

    def dump(self) -> str:
        """Return the state as JSON."""
        told = [[t.settings, t.state, t.values, t.step] for t in self.told]
        content = {"drawn": self.num_drawn, "control": self.control_drawn, "told": told, "skipped": self.skipped}
        return json.dumps(content)

    def load(self, text: str) -> None:
        """Take the state of an earlier process."""
        content = json.loads(text)
        self.num_drawn, self.control_drawn = content["drawn"], content["control"]
        self.skipped = content["skipped"]
        self.told = [Told(s, state, None if v is None else tuple(v), step) for s, state, v, step in content["told"]]


def check_drawable(config: Config, planner: Planner) -> None:
    """Refuse a space of which nothing, or next to nothing, can be trained.

    Raises:
        ConfigError: None of many draws is valid; the message holds the reason of the last.
    """
    assert config.tune is not None
    if config.tune.control:
        planner.plan(Candidate("control", -1, {}))
    if config.tune.algorithm == "grid":
        drawn: Sequence[Settings] = grid_points(config.tune.space)
    else:
        drawn = [draw_all(config.tune, number, config.seed) for number in range(NUM_TRIED)]
    reasons: dict[str, None] = {}
    for settings in drawn:
        try:
            planner.plan(Candidate("trial", 0, settings))
        except ConstraintError:
            raise
        except UserError as error:
            reasons[str(error)] = None
        else:
            return
    shortest = min(reasons, key=len)
    raise ConfigError(f"tune.space: none of {len(drawn)} samples can be trained: {shortest}")
