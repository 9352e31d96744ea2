"""Pushing with huggingface_hub itself, to a server process on loopback that answers for the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.errors import StorageError
from pocl_ray.hub.push import push
from pocl_ray.run_directory.manifest import VERSION
from pocl_ray.run_directory.opening import open_past_run

ROOT = Path(__file__).resolve().parents[3]
STEPS = ("tokenizer", "rows", "teacher", "student", "plan", "scores", "ranking", "distill", "evaluation", "report")
FIGURES = {
    "rouge_l": {"mean": 20.0, "std": 1.0, "by_seed": {"10": 19.0, "20": 21.0}},
    "exact_match": {"mean": 3.0, "std": 0.0, "by_seed": {"10": 3.0}},
    "greedy": {"rouge_l": 21.5, "exact_match": 4.0},
}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "data": {"train": {"path": "owner/rows"}, "dev": {"path": "samples://instructions"}},
    "teacher": {"path": "owner/open"},
    "student": {"path": "owner/small"},
}


class Server:
    """A server process, and the environment of a client that takes it for the Hub."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.folder, self.process = folder, process
        self.endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"

    def call(self, code: str, home: Path, token: str | None = "hf_write") -> subprocess.CompletedProcess[str]:
        """Run a program; huggingface_hub reads its endpoint when it is imported."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**kept, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )

    def requests(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(folder, process)
    finally:
        process.kill()
        process.wait()


def make_run(folder: Path, without: tuple[str, ...] = (), version: int = VERSION, **changes: Any) -> Path:
    """A run directory as a finished run leaves it, with a student that nobody loads."""
    run = folder / "mine"
    (run / "student" / "adapter").mkdir(parents=True)
    files = {
        "student/config.json": '{"model_type": "llama"}',
        "student/generation_config.json": "{}",
        "student/tokenizer.json": "{}",
        "student/README.md": "old",
        "report.html": "<p>report</p>",
        "report.md": "report",
        "config.yaml": yaml.safe_dump({**CONFIG, **changes}),
        "evaluation.json": json.dumps({"sets": {"dev": {"student": FIGURES}}}),
        "manifest.json": json.dumps(
            {
                "version": version,
                "steps": {
                    name: {"status": "done", "fingerprint": "f", "outputs": [], "seconds": 1.0, "counts": {}}
                    for name in STEPS
                    if name not in without
                },
            }
        ),
    }
    for name, text in files.items():
        (run / name).write_text(text)
    for name in ("student/model.safetensors", "student/adapter/adapter_model.safetensors"):
        (run / name).write_bytes(b"weights" * 100)
    return run


def command(*arguments: str) -> str:
    return f"import sys; sys.argv = {['pocl-ray', *arguments]!r}; from pocl_ray.cli import main; main()"


def test_a_student_is_pushed_in_one_commit_with_a_card_that_the_hub_takes(server: Server, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done = server.call(command("push", str(run), "owner/mine", "--private"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"pushed   {server.endpoint}/owner/mine/commit/1" in done.stderr
    pushed = server.folder / "owner" / "mine"
    names = {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "tokenizer.json", "model.safetensors"),
        *("adapter/adapter_model.safetensors", "config.yaml", "evaluation.json", "report.html", "report.md"),
    }
    assert (pushed / "model.safetensors").read_bytes() == b"weights" * 100
    repos = json.loads((server.folder / "repos.json").read_text())
    assert repos["owner/mine"] == {"type": "model", "visibility": "private"}
    asked = [path.partition("?")[0] for method, path in server.requests() if method in ("POST", "PUT")]
    kinds = ["validate-yaml", "repos/create", "preupload", "objects/batch", "lfs/", "commit"]
    assert [next(at for at, path in enumerate(asked) if kind in path) for kind in kinds] == sorted(
        next(at for at, path in enumerate(asked) if kind in path) for kind in kinds
    )
    card = (pushed / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["base_model"], matter["base_model_relation"]) == ("owner/small", "finetune")
    assert matter["datasets"] == ["owner/rows"] and matter["language"] == ["de", "en"]
    assert "license" not in matter, "the rows' and the student's are not known"
    (results,) = matter["model-index"][0]["results"]
    assert {"type": "rouge", "name": "ROUGE-L, greedy", "value": 21.5} in results["metrics"]
    assert 'folder = "owner/mine"' in card
    assert "teacher owner/open: mit" in card and "rows owner/rows: the licence is not known" in card


def test_adapters_and_teacher_cache_are_pushed_alone(server: Server, tmp_path: Path) -> None:
    run = make_run(tmp_path, student={"path": "owner/small", "lora": {"merge": False}})
    (run / "teacher_cache" / "train").mkdir(parents=True)
    (run / "teacher_cache" / "train" / "0.arrow").write_bytes(b"cache")
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    code = "\n".join(
        [
            "from pocl_ray.hub.push import push; from pocl_ray.run_directory.opening import open_past_run",
            f"run = open_past_run({str(run)!r})",
            "push(run, 'owner/adapters', False, 'adapters'); push(run, 'owner/cache', False, 'teacher-cache')",
        ]
    )
    done = server.call(code, tmp_path)
    assert done.returncode == 0, done.stderr
    adapters = server.folder / "owner" / "adapters"
    assert (adapters / "adapter_model.safetensors").exists() and not (adapters / "model.safetensors").exists()
    card = (adapters / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model_relation"] == "adapter"
    assert 'folder = snapshot_download("owner/adapters")' in card and "CausalLM.from_pretrained(folder)" in card
    assert (adapters / "tokenizer.json").exists(), "what others need to ask the student"
    assert (server.folder / "owner" / "cache" / "train" / "0.arrow").read_bytes() == b"cache"
    assert json.loads((server.folder / "repos.json").read_text())["owner/cache"]["type"] == "dataset"


REFUSED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("no/such/name", {}, "hf_write", "'no/such/name' is no repository; write owner/name"),
    ("bad name/x", {}, "hf_write", "push: Repo id must use alphanumeric chars"),
    ("mine", {}, "hf_write", "'mine' is no repository; write owner/name"),
    ("owner/x", {"without": ("evaluation", "report")}, "hf_write", "missing: evaluation, report; go on with"),
    ("owner/x", {"version": 0}, "hf_write", "written by another version of pocl-ray"),
    ("owner/x", {"nosuchkey": 1}, "hf_write", "another version of pocl-ray (config.yaml has other keys)"),
    ("owner/x", {}, "", "there is no token for the Hub; run `hf auth login`, or set HF_TOKEN"),
    ("owner/x", {}, "hf_read", "the Hub refuses to write to owner/x (403)"),
)


def test_what_cannot_be_pushed_is_told_in_one_line(server: Server, tmp_path: Path) -> None:
    """All in one process, since huggingface_hub reads the token at each call."""
    code = ["import os, sys; from pocl_ray.cli import main"]
    for number, (repo, changes, token, _) in enumerate(REFUSED):
        run = make_run(tmp_path / str(number), **changes)
        code += [
            f"os.environ['HF_TOKEN'] = {token!r}; sys.argv = {['pocl-ray', 'push', str(run), repo]!r}",
            "try: main()",
            "except SystemExit as ended: assert ended.code == 2",
        ]
    done = server.call("\n".join(code), tmp_path)
    assert done.returncode == 0, done.stderr
    for line, (_, _, _, says) in zip(done.stderr.splitlines(), REFUSED, strict=True):
        assert line.startswith("error: ") and says in line


UNREACHED = (
    ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "reached at http://127.0.0.1:1 (", "HF_ENDPOINT and HTTPS_PROXY"),
    ({"HF_ENDPOINT": "nonsense"}, "reached at nonsense (", "HF_ENDPOINT and HTTPS_PROXY"),
    ({"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "", "no_proxy": ""}, "reached at http://", "HTTPS_PROXY"),
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it", "the Hub cannot be reached"),
)


def test_a_hub_that_nobody_answers_for_is_one_line_within_seconds(server: Server, tmp_path: Path) -> None:
    """The cards of its models are on the Hub as well: huggingface_hub would ask for each of them for half a minute."""
    run = make_run(tmp_path)
    pushes = command("push", str(run), "owner/x")
    for number, (environment, *says) in enumerate(UNREACHED):
        began = f"import os, time; os.environ.update({environment!r}); began = time.monotonic()"
        timed = "import atexit; atexit.register(lambda: print(time.monotonic() - began))"
        done = server.call(f"{began}; from pocl_ray.hub.push import push; {began}; {timed}; {pushes}", tmp_path)
        assert done.returncode == 2, (number, done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: push: owner/x: ") and all(words in line for words in says), line
        assert float(done.stdout) < 10


def test_a_folder_without_weights_is_not_pushed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for weights in run.rglob("*.safetensors"):
        weights.unlink()
    for what in ("student", "adapters"):
        with pytest.raises(StorageError, match=r"holds no weights .*; delete it, and `pocl-ray run .*makes it again"):
            push(open_past_run(str(run)), "owner/x", False, what)


def test_a_gated_or_private_model_names_itself_and_the_remedy(server: Server, tmp_path: Path) -> None:
    code = "\n".join(
        [
            "from pocl_ray.errors import ModelError; from pocl_ray.models.places import ModelRef, check_place",
            "for name in ('owner/gated', 'owner/private'):",
            "    try: check_place(ModelRef(name))",
            "    except ModelError as error: print(error)",
        ]
    )
    gated, private = server.call(code, tmp_path, None).stdout.splitlines()
    assert gated.startswith("owner/gated: access to this Hub model is restricted; ask for it on the model's page")
    assert "log in with `hf auth login` or set HF_TOKEN" in gated
    assert private.startswith(
        "owner/private: neither a directory here nor a model on the Hub; if it is private, log in"
    )


def test_a_run_with_a_repository_checks_it_before_anything_starts(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "hub": {"repo": "nothing"}, "storage_path": str(tmp_path / "runs")}))
    code = ["import sys; from pocl_ray.cli import main"]
    for more in ([], ["--dry-run"]):
        code += [
            f"sys.argv = {['pocl-ray', 'run', str(path), *more]!r}",
            "try: main()",
            "except SystemExit as ended: assert ended.code == 2",
        ]
    done = server.call("\n".join(code), tmp_path)
    assert done.returncode == 0 and done.stderr.count("error: hub.repo: 'nothing' is no repository") == 2
    assert not (tmp_path / "runs").exists()
