"""The regret of racing, replayed over an experiment: python benchmarks/race_regret.py RUN_DIRECTORY [--arms A,B].

With `experiment.record_dev_rows: true` the loss of each dev row is recorded at every tenth of a training. A race over
some of the arms is what `trainings.race.decide` says of those rows, at the last tenths before its rungs. It hands out
an arm, whose final test figures the experiment holds. Printed are, over the seeds, the race less plain distillation and
the race less the arm that is best on average, with 95 % t intervals, what was handed out, and the steps that it took.

The last line races plain distillation against its own training on another seed: there is nothing to win, and how often
the other one is handed out says how much of a difference on dev rows is the seed's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ray.trainings.race import PLAIN, RacePlan, decide, plan_rungs
from pocl_ray.trainings.statistics import FIGURES, paired_difference

Records = dict[str, dict[int, dict[str, Any]]]
"""Arm -> seed -> its record."""


def read_records(run_dir: Path, baseline: str) -> Records:
    """Return the judged trainings of an experiment; the baseline's name becomes that of plain distillation."""
    found: Records = defaultdict(dict)
    for path in sorted((run_dir / "experiment/confirm").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["failure"] and record.get("row_losses"):
            found[PLAIN if record["arm"] == baseline else record["arm"]][record["seed"]] = record
    if PLAIN not in found:
        raise SystemExit(
            f"{run_dir}: no training of {baseline} with losses of dev rows; set experiment.record_dev_rows, and run it"
        )
    return dict(found)


def losses_at(record: Mapping[str, Any], figure: str, step: int) -> np.ndarray:
    """Return the losses of the dev rows at the last recorded step up to `step`, or at the first one."""
    steps = sorted(map(int, record["row_losses"][figure]))
    at = max((each for each in steps if each <= step), default=steps[0])
    return np.array(record["row_losses"][figure][str(at)], dtype=np.float64)


def replay(arms: Mapping[str, Mapping[str, Any]], figure: str, plan: RacePlan) -> tuple[str, int]:
    """Return the arm that a race hands out, and the optimizer steps that it takes."""
    left, before, num_steps = tuple(arms), 0, 0
    for rung in plan.rungs:
        num_steps += len(left) * (rung.step - before)
        before = rung.step
        left = decide({arm: losses_at(arms[arm], figure, rung.step) for arm in left}, rung, plan).left
        if len(left) == 1:
            break
    return left[0], num_steps + plan.num_steps - before


def told(ours: Sequence[float], theirs: Sequence[float], figure: str) -> str:
    """Return a paired difference with its interval and its wins."""
    found = paired_difference(ours, theirs, FIGURES[figure])
    return f"{found.mean:+.3f} ({found.t_low:+.3f} to {found.t_high:+.3f}), {found.num_wins}/{found.num_seeds} better"


def race_over(records: Records, names: Sequence[str], figure: str, margin: float, max_cost: float) -> None:
    """Print what races of plain distillation against some arms hand out, and what that is worth."""
    seeds = [seed for seed in records[PLAIN] if all(seed in records[name] for name in names)]
    num_steps = records[PLAIN][seeds[0]]["num_steps"]
    plan = plan_rungs(1 + len(names), num_steps, max_cost, margin=margin)
    outcomes = [replay({arm: records[arm][seed] for arm in (PLAIN, *names)}, figure, plan) for seed in seeds]
    costs = [steps / num_steps for _, steps in outcomes]
    handed_out = ", ".join(f"{arm} {number}" for arm, number in Counter(arm for arm, _ in outcomes).most_common())
    print(f"\n{PLAIN} against {', '.join(names)}: {len(seeds)} seeds, margin {margin:g}, dev {figure}")
    print(f"  handed out: {handed_out}; cost {np.mean(costs):.2f} times a run, at most {max(costs):.2f}")
    first = next(iter(records[PLAIN][seeds[0]]["figures"]))
    for key in (key for key in FIGURES if key in records[PLAIN][seeds[0]]["figures"][first]):
        values = {arm: [records[arm][seed]["figures"][first][key] for seed in seeds] for arm in (PLAIN, *names)}
        raced = [records[arm][seed]["figures"][first][key] for (arm, _), seed in zip(outcomes, seeds, strict=True)]
        best = (max if FIGURES[key] else min)(values, key=lambda arm: float(np.mean(values[arm])))
        print(f"  {key}: race - {PLAIN} {told(raced, values[PLAIN], key)}")
        print(f"  {key}: race - {best}, the best arm: {told(raced, values[best], key)}")


def against_itself(records: Records, figure: str, margin: float, max_cost: float) -> None:
    """Print how often plain distillation on another seed is handed out in place of plain distillation."""
    of_seed = records[PLAIN]
    plan = plan_rungs(2, next(iter(of_seed.values()))["num_steps"], max_cost, margin=margin)
    pairs = [(a, b) for a in of_seed for b in of_seed if a != b]
    wins = sum(replay({PLAIN: of_seed[a], "other": of_seed[b]}, figure, plan)[0] == "other" for a, b in pairs)
    print(f"\n{PLAIN} against {PLAIN} of another seed: {wins} of {len(pairs)} ordered pairs hand out the other")


def main() -> None:
    """Replay races over all arms together, and over each of them alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--arms", default="", help="comma-separated; empty: all that have the figure")
    parser.add_argument("--baseline", default="plain", help="arm that is plain distillation")
    parser.add_argument("--figure", default="kl", choices=("kl", "ce_loss"))
    parser.add_argument("--margin", default=0.05, type=float)
    parser.add_argument("--max-cost", default=1.6, type=float)
    given = parser.parse_args()
    records = read_records(given.run_directory, given.baseline)
    num_steps = next(iter(records[PLAIN].values()))["num_steps"]
    names = [name for name in given.arms.split(",") if name] or [
        name
        for name, of_seed in records.items()
        if name != PLAIN
        and all(given.figure in one["row_losses"] and one["num_steps"] == num_steps for one in of_seed.values())
    ]
    for arms in ([names] if len(names) > 1 else []) + [[name] for name in names]:
        race_over(records, arms, given.figure, given.margin, given.max_cost)
    against_itself(records, given.figure, given.margin, given.max_cost)


if __name__ == "__main__":
    main()
