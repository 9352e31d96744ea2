"""The rules of the house that a linter does not hold: sizes, safe loading, and no path of somebody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "pocl_ray").rglob("*.py"))
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib"}
# Absolute only: such a folder in a bucket or next to the checkout belongs to somebody. Split, so that this file does
# not match itself.
DEVELOPER_PATH = re.compile(r"(?<![\w.}/:-])/(?:" + "|".join(("work", "tmp/wt", "root")) + r")(?:/|\b(?![\w.-]))")


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every node of the package's syntax trees, with its place."""
    return [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls of the functions with these dotted names."""
    for place, node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield place, node


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((given.value for given in call.keywords if given.arg == name), None)


def safe_loaders(place: str) -> set[str]:
    """The loaders that are safe in this file: yaml's own, and classes there that are built on them."""
    safe = set(SAFE_LOADERS)
    tree = ast.parse((ROOT / place.split(":")[0]).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and all(ast.unparse(base).split(".")[-1] in safe for base in node.bases):
            safe.update({node.name} if node.bases else ())
    return safe


def sets_trust(node: ast.AST) -> bool:
    """Whether the node sets `trust_remote_code` to a literal True: an argument, a default, a field or a dict key."""
    name = "trust_remote_code"
    if isinstance(node, ast.keyword):
        return node.arg == name and is_true(node.value)
    if isinstance(node, ast.AnnAssign):
        default = keyword(node.value, "default") if isinstance(node.value, ast.Call) else node.value
        return ast.unparse(node.target).split(".")[-1] == name and is_true(default)
    if isinstance(node, ast.Assign):
        return is_true(node.value) and any(ast.unparse(target).split(".")[-1] == name for target in node.targets)
    if isinstance(node, ast.Dict):
        return any(
            isinstance(key, ast.Constant) and key.value == name and is_true(value)
            for key, value in zip(node.keys, node.values, strict=True)
        )
    if isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaulted = positional[len(positional) - len(node.defaults) :]
        pairs = [*zip(defaulted, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        return any(argument.arg == name and is_true(value) for argument, value in pairs)
    return False


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ENTRY = re.compile(r" {4}\*{0,2}[\w.`]+(?: \([^)]*\))?: (Of|What) ")
COINED = re.compile(r"\banew\b", re.IGNORECASE)


def docstrings() -> Iterator[tuple[str, str]]:
    """Every docstring of the package, with its place."""
    for place, node in nodes():
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield f"{place} {getattr(node, 'name', '')}".rstrip(), text


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert not long, "look for the second thing these do:\n" + "\n".join(long)


def test_functions_stay_short() -> None:
    long = [
        f"{place} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for place, node in nodes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "look for the second thing these do:\n" + "\n".join(long)


def test_docstrings_name_the_thing_itself() -> None:
    """No first line and no entry of a section starts with "Of" or "What"; each says what the thing is or returns."""
    wrong = [place for place, text in docstrings() if text.startswith(("Of ", "What "))]
    for place, text in docstrings():
        wrong += [f"{place}: {line.strip()}" for line in text.splitlines() if ENTRY.match(line)]
    assert not wrong, "say what the thing is, such as `seed: Seed of all random draws.`:\n" + "\n".join(wrong)


def test_nothing_is_done_anew() -> None:
    """Comments, docstrings and messages say "again"."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*SOURCES, *(ROOT / "pocl_ray").rglob("*.j2")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if COINED.search(line)
    ]
    assert not found, found


@pytest.mark.parametrize(("text", "is_wrong"), [("Of all draws.", True), ("Seed of all random draws.", False)])
def test_an_entry_that_names_no_thing_is_recognised(text: str, is_wrong: bool) -> None:
    assert bool(ENTRY.match(f"    seed: {text}")) is is_wrong


def test_no_except_catches_everything_unnamed() -> None:
    bare = [place for place, node in nodes() if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare, bare


def test_yaml_is_loaded_safely() -> None:
    unsafe = [place for place, _ in calls("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.full_load_all")]
    for place, call in calls("yaml.load"):
        loader = keyword(call, "Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or ast.unparse(loader).split(".")[-1] not in safe_loaders(place):
            unsafe.append(place)
    assert not unsafe, unsafe


def test_nothing_is_unpickled() -> None:
    pickling = [
        place
        for place, node in nodes()
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PICKLES for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES)
    ]
    loads = [place for place, call in calls("torch.load") if not is_true(keyword(call, "weights_only"))]
    assert not pickling + loads, pickling + loads


def test_code_of_a_model_is_trusted_by_its_user_only() -> None:
    trusting = [place for place, node in nodes() if sets_trust(node)]
    assert not trusting, trusting


@pytest.mark.parametrize("text", ["~work/main/x", "cd ~root", "path=~tmp/wt/x", "'~root/.cache'"])
def test_a_path_of_a_developers_machine_is_recognised(text: str) -> None:
    assert DEVELOPER_PATH.search(text.replace("~", "/"))


@pytest.mark.parametrize("text", ["s3://bucket~work/x", "..~work/x", "frame~work/", "~rooted", "$HOME~work/x"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not DEVELOPER_PATH.search(text.replace("~", "/"))


def test_committed_files_name_no_path_of_a_developers_machine() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the committed files: {error}")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        lines = content.decode("utf-8", errors="replace").splitlines()
        found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if DEVELOPER_PATH.search(line)]
    assert not found, found
