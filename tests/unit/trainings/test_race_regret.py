"""The benchmark that replays races over an experiment's records: who would have been handed out, at which step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "race_regret.py"


@pytest.fixture
def regret() -> Any:
    spec = importlib.util.spec_from_file_location("race_regret", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_experiment(folder: Path) -> None:
    """Write three seeds of plain distillation, of an arm that is ahead on each row, and of one that is behind."""
    (folder / "experiment/confirm").mkdir(parents=True)
    rows = np.linspace(0.2, 1.0, 40)
    for seed in (1, 2, 3):
        for arm, gain in (("base", 0.0), ("good", 0.1), ("bad", -0.1)):
            losses = {str(10 * part): (rows * (1 - gain) + 0.01 * seed).tolist() for part in range(1, 11)}
            figures = {"test": {"rouge_l": 60 + 10 * gain + seed, "kl": 0.5 - gain}}
            record = {
                "arm": arm, "seed": seed, "num_steps": 100, "failure": "", "figures": figures,
                "row_losses": {"kl": losses, "ce_loss": losses},
            }  # fmt: skip
            (folder / f"experiment/confirm/{arm}-seed-{seed}.json").write_text(json.dumps(record))


def test_races_are_replayed_over_what_an_experiment_recorded(
    regret: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment(tmp_path)
    monkeypatch.setattr("sys.argv", ["race_regret.py", str(tmp_path), "--baseline", "base", "--margin", "0"])
    regret.main()
    both, bad, good, itself = capsys.readouterr().out.strip().split("\n\n")
    assert "handed out: good 3; cost 1.60 times a run" in both
    assert "kl: race - plain -0.100" in both and "kl: race - good, the best arm: +0.000" in both
    assert "handed out: plain 3; cost 1.60" in bad and "handed out: good 3" in good
    assert "3 of 6 ordered pairs hand out the other" in itself


def test_an_experiment_without_dev_rows_is_named(regret: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no training of plain with losses of dev rows"):
        regret.read_records(tmp_path, "plain")
