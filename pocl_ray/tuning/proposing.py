"""Where the next trial looks: pure functions of the seed, of how many were drawn before, and of what came of them.

Nothing is kept between calls, so a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pocl_ray.config import DomainConfig, TuneConfig
from pocl_ray.tuning.space import Settings, draw, grid_points, listed_values, num_steps_of, tidy

if TYPE_CHECKING:
    import optuna

# Shares of the trials drawn at random before the estimator is asked, and their bounds.
STARTUP_SHARE, MIN_STARTUP, MAX_STARTUP = 0.3, 4, 10


@dataclass(frozen=True)
class Told:
    """What became of a trial.

    Attributes:
        settings: Its values.
        state: How it ended; `running` where it has not.
        values: One value an objective; None where it failed or runs.
        step: Training samples after which it ended.
    """

    settings: Settings
    state: Literal["finished", "stopped", "failed", "running"]
    values: tuple[float, ...] | None = None
    step: int = 0


def propose(tune: TuneConfig, num_drawn: int, history: Sequence[Told], seed: int) -> Settings | None:
    """Return the settings to try next; None where a grid has no more points."""
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


def _ask_optuna(tune: TuneConfig, num_drawn: int, history: Sequence[Told], seed: int) -> Settings:
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
    study.add_trials([_optuna_trial(tune, told, distributions) for told in history])
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


def _optuna_trial(tune: TuneConfig, told: Told, distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """Return a trial as Optuna keeps it. Of one that was stopped it learns the value and how far that got."""
    import optuna

    params = {key: _encode(domain, told.settings[key]) for key, domain in tune.space.items()}
    states = optuna.trial.TrialState
    common: dict[str, Any] = {"params": params, "distributions": distributions}
    if told.state == "running":
        return optuna.trial.create_trial(state=states.RUNNING, **common)
    if told.values is None or told.state == "failed":
        return optuna.trial.create_trial(state=states.FAIL, **common)
    if told.state == "finished":
        return optuna.trial.create_trial(state=states.COMPLETE, values=list(told.values), **common)
    if len(told.values) > 1:  # with several objectives there is no pruning, and a figure cut short would mislead
        return optuna.trial.create_trial(state=states.FAIL, **common)
    return optuna.trial.create_trial(state=states.PRUNED, intermediate_values={told.step: told.values[0]}, **common)
