"""Draws the candidates of a search: invalid and repeated candidates are recorded, and drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pocl_ray.config import Config, DomainConfig, TuneConfig
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.tuning.candidates import Candidate, PlannedTrial, Planner
from pocl_ray.tuning.results import decisive
from pocl_ray.tuning.space import ConstraintError, Settings, draw, grid_points, listed_values, num_steps_of, tidy

if TYPE_CHECKING:
    import optuna


# The share of the trials that are drawn at random before the estimator is asked, and its bounds.
STARTUP_SHARE, MIN_STARTUP, MAX_STARTUP = 0.3, 4, 10


@dataclass(frozen=True)
class TrialOutcome:
    """The result of a trial.

    Attributes:
        settings: Values of the trial's keys.
        state: State at its end, or `running`.
        values: One value for each objective; None if the trial failed or still runs.
        step: Number of training samples at its end.
    """

    settings: Settings
    state: Literal["finished", "stopped", "failed", "running"]
    values: tuple[float, ...] | None = None
    step: int = 0


def propose(tune: TuneConfig, num_drawn: int, history: Sequence[TrialOutcome], seed: int) -> Settings | None:
    """Return the settings to try next; None if a grid has no more points.

    A pure function of the seed, the number of earlier draws and their results: a killed search continues as if it had
    never stopped.
    """
    if tune.algorithm == "grid":
        points = grid_points(tune.space)
        return points[num_drawn] if num_drawn < len(points) else None
    if tune.algorithm == "optuna":
        return _ask_optuna(tune, num_drawn, history, seed)
    return draw_all(tune, num_drawn, seed)


def draw_all(tune: TuneConfig, num_drawn: int, seed: int) -> Settings:
    """Return random settings."""
    rng = np.random.default_rng([seed, num_drawn])
    return {key: draw(domain, rng) for key, domain in tune.space.items()}


def _ask_optuna(tune: TuneConfig, num_drawn: int, history: Sequence[TrialOutcome], seed: int) -> Settings:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    num_trials = tune.num_trials or 16
    num_startup = min(MAX_STARTUP, max(MIN_STARTUP, round(STARTUP_SHARE * num_trials)))
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=num_startup, seed=int(np.random.SeedSequence([seed, num_drawn]).generate_state(1)[0])
    )
    directions: list[Literal["maximize", "minimize"]] = [
        "maximize" if objective.sign > 0 else "minimize" for objective in tune.objectives
    ]
    study = optuna.create_study(sampler=sampler, directions=directions)
    distributions = {key: _distribution(domain) for key, domain in tune.space.items()}
    study.add_trials([_optuna_trial(tune, trial, distributions) for trial in history])
    asked = study.ask(distributions).params
    return {key: _decode(domain, asked[key]) for key, domain in tune.space.items()}


def _distribution(domain: DomainConfig) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    listed = listed_values(domain)
    if listed is not None:
        return CategoricalDistribution(tuple(range(len(listed))))
    if domain.randint is not None:
        return IntDistribution(*domain.randint)
    if domain.quniform is not None:
        return IntDistribution(0, num_steps_of(*domain.quniform))
    low, high = _float_range(domain)
    return FloatDistribution(low, high, log=domain.loguniform is not None)


def _decode(domain: DomainConfig, given: Any) -> Any:
    listed = listed_values(domain)
    if listed is not None:
        return listed[given]
    if domain.quniform is not None:
        return tidy(domain.quniform[0] + given * domain.quniform[2])
    return given if domain.randint is not None else tidy(given)


def _encode(domain: DomainConfig, value: Any) -> Any:
    listed = listed_values(domain)
    if listed is not None:
        return listed.index(value)
    if domain.quniform is not None:
        return round((value - domain.quniform[0]) / domain.quniform[2])
    if domain.randint is not None:
        return value
    low, high = _float_range(domain)
    return min(max(value, low), high)


def _float_range(domain: DomainConfig) -> tuple[float, float]:
    found = domain.loguniform or domain.uniform
    assert found is not None
    return found


def _optuna_trial(tune: TuneConfig, trial: TrialOutcome, distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """The trial in Optuna's form. For a stopped trial it holds the value and the number of samples at the stop."""
    import optuna

    params = {key: _encode(domain, trial.settings[key]) for key, domain in tune.space.items()}
    states = optuna.trial.TrialState
    common: dict[str, Any] = {"params": params, "distributions": distributions}
    if trial.state == "running":
        return optuna.trial.create_trial(state=states.RUNNING, **common)
    if trial.values is None or trial.state == "failed":
        return optuna.trial.create_trial(state=states.FAIL, **common)
    if trial.state == "finished":
        return optuna.trial.create_trial(state=states.COMPLETE, values=list(trial.values), **common)
    # With several objectives nothing is pruned, and the figure of a stopped trial would mislead.
    if len(trial.values) > 1:
        return optuna.trial.create_trial(state=states.FAIL, **common)
    return optuna.trial.create_trial(state=states.PRUNED, intermediate_values={trial.step: trial.values[0]}, **common)


NUM_TRIED = 200  # at least one of so many draws must be valid for a search to start, or to go on
NUM_ASKED = 20  # so many of these come from the algorithm, which may repeat an invalid proposal; the others are random

Plan = Callable[[Candidate], PlannedTrial]


class Drawing:
    """The state of a search: the candidates and their results. A resumed search needs nothing but its JSON."""

    def __init__(self, config: Config, plan: Plan) -> None:
        """Take the base config, and the function that plans a candidate or raises ConfigError."""
        assert config.tune is not None
        self.tune, self.seed, self.plan = config.tune, config.seed, plan
        self.num_drawn = 0
        self.control_drawn = not config.tune.control
        self.outcomes: list[TrialOutcome] = []
        self.skipped: list[dict[str, Any]] = []

    @property
    def limit(self) -> int:
        """The maximum number of trials, without the control."""
        if self.tune.algorithm == "grid":
            return min(self.tune.num_trials or len(grid_points(self.tune.space)), len(grid_points(self.tune.space)))
        return self.tune.num_trials or 16

    def candidates(self) -> list[Candidate]:
        """Return all candidates so far, the control first."""
        control = [Candidate("control", -1, {})] if self.tune.control and self.control_drawn else []
        return [*control, *(Candidate("trial", number, trial.settings) for number, trial in enumerate(self.outcomes))]

    def next(self) -> PlannedTrial | None:
        """Return the next candidate, the control first; None when there are no more."""
        if not self.control_drawn:
            self.control_drawn = True
            return self.plan(Candidate("control", -1, {}))
        seen = [trial.settings for trial in self.outcomes]
        for attempt in range(NUM_TRIED):
            if len(self.outcomes) >= self.limit:
                return None
            settings = self._draw(attempt)
            if settings is None:
                return None
            reason = "was tried before" if settings in seen else None
            if reason is None:
                try:
                    planned = self.plan(Candidate("trial", len(self.outcomes), settings))
                except UserError as error:
                    reason = str(error)
                else:
                    self.outcomes.append(TrialOutcome(settings, "running"))
                    return planned
            self.skipped.append({"settings": settings, "reason": reason})
        return None

    def _draw(self, attempt: int) -> Settings | None:
        self.num_drawn += 1
        if attempt >= NUM_ASKED and self.tune.algorithm != "grid":
            return draw_all(self.tune, self.num_drawn - 1, self.seed)
        return propose(self.tune, self.num_drawn - 1, self.outcomes, self.seed)

    def tell(self, number: int, result: Mapping[str, Any] | None) -> None:
        """Record the end of a trial: its last report, or None if it failed."""
        if number < 0:
            return
        settings = self.outcomes[number].settings
        if result is None or any(o.metric not in result for o in self.tune.objectives):
            self.outcomes[number] = TrialOutcome(settings, "failed")
            return
        values = tuple(decisive(result, o) for o in self.tune.objectives)
        state = "finished" if result.get("is_finished") else "stopped"
        self.outcomes[number] = TrialOutcome(settings, state, values, int(result["num_samples"]))  # type: ignore[arg-type]

    def dump(self) -> str:
        """Return the state as JSON."""
        outcomes = [[t.settings, t.state, t.values, t.step] for t in self.outcomes]
        content = {"drawn": self.num_drawn, "control": self.control_drawn, "told": outcomes, "skipped": self.skipped}
        return json.dumps(content)

    def load(self, text: str) -> None:
        """Take the state of an earlier process."""
        content = json.loads(text)
        self.num_drawn, self.control_drawn = content["drawn"], content["control"]
        self.skipped = content["skipped"]
        self.outcomes = [
            TrialOutcome(s, state, None if v is None else tuple(v), step) for s, state, v, step in content["told"]
        ]


def check_drawable(config: Config, planner: Planner) -> None:
    """Refuse a space in which no candidate, or almost none, can be trained.

    Raises:
        ConfigError: None of many draws is valid; the message names the reason of the last.
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
