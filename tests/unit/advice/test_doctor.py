"""`pocl-ray doctor`: each check alone, and the exit code."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.advice import doctor
from pocl_ray.config import Config

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "samples://instructions"}, "holdout_rows": 8},
    "teacher": {"path": "samples://quickstart-teacher"},
    "student": {"num_layers": 1},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in (*doctor.PROXIES, "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_packages_and_pins_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.python().state == "ok"
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    found = doctor.python()
    assert found.state == "stop" and ">=3.11" in found.remedy
    monkeypatch.setattr(doctor, "requires", lambda _: ["ray[data]>=99", "torch>=1", "nothing-such; extra == 'dev'"])
    found = doctor.packages()
    assert found.state == "stop" and "needed: >=99" in found.what and "nothing-such" not in found.what
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path / "constraints.txt")
    (tmp_path / "constraints.txt").write_text("numpy==0.1  # old\nnothing-such==1\n", encoding="utf-8")
    found = doctor.pins()
    assert found.state == "note" and "pinned: ==0.1" in found.what and "nothing-such" not in found.what


def test_a_gpu_that_is_asked_for_and_missing_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    assert doctor.gpus(True).state == "stop"
    assert doctor.gpus(None).state == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert doctor.gpus(None).state == "note"


@pytest.mark.parametrize(("free_gib", "state"), [(0.5, "stop"), (5, "note"), (50, "ok")])
def test_little_disk_is_said(free_gib: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": int(free_gib * doctor.GIB)})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = doctor.disk("runs/below/this")
    assert found.state == state and bool(found.remedy) == (state != "ok")
    assert doctor.shared_memory().state in ("ok", "note")


@pytest.mark.parametrize(("limits", "state"), [((256, 512), "stop"), ((1024, 4096), "note"), ((1024, -1), "ok")])
def test_the_limit_of_open_files_is_looked_at(
    limits: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: limits)
    assert doctor.file_limit().state == state


def test_a_wrong_address_of_ray_stops_a_run() -> None:
    assert doctor.ray_place("http://head:8265").state == "stop"
    assert doctor.ray_place(None).state == "ok"


def test_the_token_that_a_variable_names_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.token().state == "ok"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "none")
    assert doctor.token().state == "stop"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_AUTH_TOKEN" in doctor.token().remedy


def test_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert doctor.storage_writable("runs").state == "ok"
    assert sorted(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.storage_writable("file/runs").state == "stop"


def test_a_proxy_without_an_exception_for_this_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.proxies().state == "ok"
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert "add 127.0.0.1 to NO_PROXY" in doctor.proxies().remedy
    monkeypatch.setenv("NO_PROXY", "localhost, 127.0.0.1")
    assert doctor.proxies().state == "ok"


def test_the_hub_is_asked_for_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.utils.get_session", unreachable)
    found = doctor.hub()
    assert found.state == "note" and "mirror" in found.remedy


def test_a_repository_that_the_run_would_refuse_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl_ray.hub.push.get_token", lambda: None)
    named = "no owner"
    assert doctor.target(named).state == "stop" and "hub.repo" in doctor.target(named).what
    assert "set HF_TOKEN" in doctor.target("me/mine").what
    monkeypatch.setattr("pocl_ray.hub.push.get_token", lambda: "hf_write")
    assert doctor.target("me/mine").state == "ok"
    config = Config.model_validate({**TREE, "hub": {"repo": "me/mine"}})
    monkeypatch.setattr(doctor, "hub", lambda: doctor.Finding("Hub", "ok", "answers"))
    assert "repository" in {one.name for one in doctor.examine(config)}


def test_a_config_adds_its_inputs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "hub", lambda: doctor.Finding("Hub", "ok", "answers"))
    config = Config.model_validate(TREE)
    assert doctor.inputs(config).state == "ok" and doctor.compiler(config).state == "ok"
    wrong = Config.model_validate({**TREE, "teacher": {"path": "./none"}})
    assert doctor.inputs(wrong).state == "stop"
    assert not doctor.doctor(wrong)
    shown = capsys.readouterr().out
    assert "stop  inputs" in shown and "./none" in shown
    assert shown.splitlines()[-1] == "a run would stop at the lines marked stop"
