"""Imports run downward only, and the pure rooms stay pure (DESIGN.md), held by walking the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pocl_ray"

# From the bottom up. A room may import rooms of its own layer and of those below, but no circle may close.
LAYERS = (
    {
        "config",
        "console",
        "errors",
        "heartbeat",
        "plugins",
        "ray_cluster",
        "records",
        "run_directory",
    },
    {"curriculum", "data", "models", "answers", "teacher_cache", "tracking"},
    {"difficulty", "distill", "evaluation", "ray_train", "responses", "trainings"},
    {
        "advice",
        "arms",
        "chat",
        "comparison",
        "experiments",
        "fingerprints",
        "hub",
        "inputs",
        "integrations",
        "pipeline",
        "preflight",
        "preview",
        "report",
        "running",
        "tuning",
    },
    {"cli", "__main__"},
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}

# What these modules may not import, whether directly, inside a function, or through a module they load.
NEVER_IMPORTS = {
    "curriculum": {"torch", "ray"},
    "integrations": {"ray"},
    "difficulty/ranking.py": {"torch", "ray"},
    "distill": {"ray"},
    "distill/rollout_schedule.py": {"torch", "ray"},
    "trainings/statistics.py": {"torch", "ray"},
    "trainings/race.py": {"torch", "ray"},
    "ray_train/progress.py": {"torch", "transformers", "deepspeed"},
}

# What Ray does not promise to keep, and the only file of the package that may name it.
INTERNALS = {
    "ray.train.v2._internal": "ray_train/internals.py",
    "ray._private": "ray_cluster/internals.py",
    "ray._raylet": "ray_cluster/internals.py",
    "ray.experimental.internal_kv": "ray_cluster/internals.py",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def named_by(node: ast.AST, module: str) -> list[str]:
    """The modules that one import statement may load, as absolute names; of `from a import b` both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        is_package = MODULES[module].name == "__init__.py"
        package = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        source = ".".join([*package, *([source] if source else [])])
    return [source, *(f"{source}.{alias.name}" for alias in node.names)]


def imports_of(module: str) -> set[str]:
    """Every import in the file, those inside functions and under TYPE_CHECKING too."""
    return {name for node in ast.walk(syntax_tree(MODULES[module])) for name in named_by(node, module)}


def loaded_with(module: str) -> set[str]:
    """The modules that an import runs at once: the module's imports outside functions, and its parent packages."""
    parents = module.split(".")
    loaded = {".".join(parents[:end]) for end in range(1, len(parents))}
    waiting: list[ast.AST] = [syntax_tree(MODULES[module])]
    while waiting:
        node = waiting.pop()
        loaded.update(named_by(node, module))
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return loaded


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "pocl_ray" and len(parts) > 1 else None


def room_imports() -> dict[str, dict[str, str]]:
    """The rooms that each room imports, each with one module that does so."""
    edges: dict[str, dict[str, str]] = {}
    for module in MODULES:
        room = room_of(module)
        if room is None:
            continue
        targets = {room_of(name) for name in imports_of(module)} & set(LAYER_OF) - {room}
        edges.setdefault(room, {}).update({target: module for target in targets if target})
    return edges


def test_every_room_has_its_layer() -> None:
    rooms = {room for room in map(room_of, MODULES) if room}
    assert rooms <= set(LAYER_OF), f"give these a layer: {sorted(rooms - set(LAYER_OF))}"


def test_imports_run_downward_only() -> None:
    upward = [
        f"{module} imports {target}, of a higher layer"
        for room, targets in room_imports().items()
        for target, module in targets.items()
        if LAYER_OF[target] > LAYER_OF[room]
    ]
    assert not upward, "\n".join(upward)


def test_no_circle_of_rooms() -> None:
    try:
        TopologicalSorter({room: set(targets) for room, targets in room_imports().items()}).prepare()
    except CycleError as error:
        pytest.fail(f"rooms import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("place", NEVER_IMPORTS)
def test_pure_rooms_never_import_the_heavy_ones(place: str) -> None:
    path = PACKAGE / place
    assert path.exists(), f"{place} is gone: correct NEVER_IMPORTS"
    inside = [module for module, file in MODULES.items() if path in (file, *file.parents)]
    came_from = dict.fromkeys(inside, place)
    waiting = list(inside)
    while waiting:
        module = waiting.pop()
        names = imports_of(module) if module in inside else loaded_with(module)
        heavy = {name.split(".")[0] for name in names} & NEVER_IMPORTS[place]
        assert not heavy, f"{module} (reached from {came_from[module]}) imports {', '.join(sorted(heavy))}"
        for name in names & set(MODULES) - set(came_from):
            came_from[name] = module
            waiting.append(name)


@pytest.mark.parametrize("inside", INTERNALS)
def test_only_one_file_uses_each_part_that_ray_does_not_promise(inside: str) -> None:
    allowed = PACKAGE / INTERNALS[inside]
    users = [
        module for module, path in MODULES.items() if path != allowed and inside in "\n".join(dotted_names(module))
    ]
    assert not users, f"{inside} is for {INTERNALS[inside]} alone; import from there in {', '.join(users)}"


def dotted_names(module: str) -> set[str]:
    """What a module imports, and its dotted expressions such as `ray._private.state`."""
    nodes = ast.walk(syntax_tree(MODULES[module]))
    return imports_of(module) | {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


def test_the_process_of_ray_trains_controller_loads_no_torch() -> None:
    """It starts with every training run, and reads its callbacks, policies and worker function from this module."""
    code = (
        "import sys, pocl_ray.ray_train.driver; "
        "print(*({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


HEAVY = {"torch", "transformers", "tokenizers", "deepspeed", "ray", "pandas", "datasets", "huggingface_hub", "fsspec"}
NETWORK = {"requests", "urllib3", "httpx", "aiohttp", "boto3", "http.client", "urllib.request"}


def loaded_by(*command: str) -> tuple[set[str], str]:
    """The modules that are loaded after a command of the shell, and what it printed."""
    code = f"import sys; sys.argv = {['pocl-ray', *command]!r}\n"
    code += "from pocl_ray.cli import main\ntry: main()\n"
    code += "finally: print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    printed, _, modules = done.stdout.partition("LOADED ")
    assert done.returncode == 0, done.stderr
    return set(modules.split()), printed + done.stderr


@pytest.mark.parametrize(
    "config", [("quickstart",), ("quickstart", "storage_path=s3://no-such-bucket/runs"), ("quickstart", "paced.yaml")]
)
def test_a_plan_loads_nothing_heavy_and_no_network_library(config: tuple[str, ...], tmp_path: Path) -> None:
    race = tmp_path / "paced.yaml"
    constant = "kd_temperature: {start: 1.0, end: 1.0}"
    race.write_text(f"curriculum: {{pacing: race, {constant}}}\ncontrol: {{seeds: []}}\n", encoding="utf-8")
    given = [str(race) if key == race.name else key for key in config]
    loaded, printed = loaded_by("plan", *given)
    assert not loaded & (HEAVY | NETWORK)
    assert "optimizer steps" in printed and "teacher cache" in printed
    assert ("does not open s3://no-such-bucket/runs" in printed) == any("s3://" in key for key in config)


def test_help_and_the_shells_completion_load_no_arrays() -> None:
    loaded, printed = loaded_by("--help")
    assert "Distil large language models" in printed
    assert not loaded & (HEAVY | NETWORK | {"pyarrow", "numpy"})
