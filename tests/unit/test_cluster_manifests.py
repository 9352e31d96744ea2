"""Every file of cluster/ is one that its reader takes, and says what constraints.txt and the command line say."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts as ray_scripts
from ray.scripts.symmetric_run import symmetric_run

from pocl_ray.cli import app
from pocl_ray.config import load_config
from pocl_ray.ray_cluster.submit import EXCLUDES

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
AUTOSCALER = ("aws.yaml", "gcp.yaml", "onprem.yaml")
KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml")
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def image() -> str:
    """The only image that manifests may name: the project's version, Ray's and Python's."""
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    python = re.search(r"^ARG BASE=python:3\.(\d+)-", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert project is not None
    assert python is not None
    return f"registry.example.com/pocl-ray:{project[1]}-ray{pinned('ray')}-py3{python[1]}"


def ray_resource(name: str, kind: str) -> dict[str, Any]:
    documents = list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))
    (found,) = [document for document in documents if document["kind"] == kind]
    return dict(found)


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "kuberay-rayjob.yaml", ray_resource("kuberay-rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]
    yield "kuberay-raycluster.yaml", ray_resource("kuberay-raycluster.yaml", "RayCluster")["spec"]


def check_command(words: list[str]) -> None:
    """Hold a command of ours against the command line, and its overrides against the config."""
    assert words[:3] == ["python", "-m", "pocl_ray"]
    command = typer.main.get_command(app).commands[words[3]]  # type: ignore[attr-defined]
    command.make_context(words[3], list(words[4:]))
    load_config(QUICKSTART, words[5:])


def check_ray_options(command: click.Command, options: list[str]) -> None:
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {option.partition("=")[0] for option in options if option.startswith("--")}
    assert given <= known, f"`ray {command.name}` has no {', '.join(sorted(given - known))}"


@pytest.mark.parametrize("name", AUTOSCALER)
def test_ray_itself_accepts_the_cluster(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    assert config["docker"]["image"] == image()
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", AUTOSCALER)
def test_the_start_commands_are_ones_that_ray_has_and_ask_for_a_token(name: str) -> None:
    config = read(name)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        assert "RAY_AUTH_MODE=token ray" in line
        words = shlex.split(line.rpartition(";")[2].replace("RAY_AUTH_MODE=token", ""))
        assert words[0] == "ray"
        check_ray_options(ray_scripts.cli.commands[words[1]], words[2:])


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_cloud_head_takes_no_work_and_spot_workers_can_be_asked_for(name: str) -> None:
    config = read(name)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in line for line in config["head_start_ray_commands"])
    spot = yaml.safe_dump(config["available_node_types"]["gpu-spot"])
    assert "MarketType: spot" in spot or "preemptible: true" in spot
    for node_type in config["available_node_types"].values():
        assert node_type.get("max_workers", 0) <= config["max_workers"]


@pytest.mark.parametrize(("name", "spec"), ray_clusters(), ids=KUBERAY)
def test_a_kuberay_cluster_has_all_that_its_api_requires(name: str, spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in workers] == ["gpu", "gpu-spot"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *workers):
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values()), "KubeRay takes strings alone"
        check_ray_options(ray_scripts.cli.commands["start"], [f"--{key}" for key in params])
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never", "the autoscaler, not the kubelet, replaces a pod"
        (container,) = pod["containers"]
        assert container["image"] == image()
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"]
        assert ("nvidia.com/gpu" in limits) == (group is not head)
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


@pytest.mark.parametrize(("name", "kind"), zip(KUBERAY, ("RayJob", "RayCluster"), strict=True))
def test_a_kuberay_resource_is_of_the_stable_api_and_queued_by_kueue(name: str, kind: str) -> None:
    resource = ray_resource(name, kind)
    assert resource["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", resource["metadata"]["name"])
    assert "kueue.x-k8s.io/queue-name" in resource["metadata"]["labels"]
    assert resource["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true", "or no autoscaling"


def test_the_queue_is_the_one_that_the_manifests_name_and_lends_all_that_their_pods_ask_for() -> None:
    queues = {each["kind"]: each for each in yaml.safe_load_all((CLUSTER / "kueue.yaml").read_text(encoding="utf-8"))}
    local, shared, flavor = queues["LocalQueue"], queues["ClusterQueue"], queues["ResourceFlavor"]
    assert local["spec"]["clusterQueue"] == shared["metadata"]["name"]
    (group,) = shared["spec"]["resourceGroups"]
    assert [each["name"] for each in group["flavors"]] == [flavor["metadata"]["name"]]
    lent = {each["name"] for each in group["flavors"][0]["resources"]}
    assert lent == set(group["coveredResources"])
    for name, kind in zip(KUBERAY, ("RayJob", "RayCluster"), strict=True):
        queued = ray_resource(name, kind)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert queued == local["metadata"]["name"]
    for _, spec in ray_clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            for container in group["template"]["spec"]["containers"]:
                assert set(container["resources"]["requests"]) <= lent


def test_the_ray_job_runs_a_command_that_there_is_and_ends_its_cluster() -> None:
    spec = ray_resource("kuberay-rayjob.yaml", "RayJob")["spec"]
    check_command(shlex.split(spec["entrypoint"]))
    assert spec["shutdownAfterJobFinishes"] is True
    assert "storage_path=s3://" in spec["entrypoint"], "pods share no disk here"


def test_the_slurm_script_is_bash_and_starts_ray_with_options_that_it_has() -> None:
    path = CLUSTER / "slurm.sbatch"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    subprocess.run([bash, "-n", str(path)], check=True)
    script = path.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^srun .*ray symmetric-run (.*)$", script, re.MULTILINE)
    options, _, command = line.partition(" -- ")
    known_here = {option for parameter in symmetric_run.params for option in parameter.opts}
    for_ray_start = [word for word in shlex.split(options) if word.startswith("--") and word not in known_here]
    check_ray_options(ray_scripts.cli.commands["start"], for_ray_start)
    words = shlex.split(command)
    assert words[0] == "env"
    check_command([*words[2:-1], str(QUICKSTART), "storage_path=/shared/runs"])
    assert "#SBATCH --ntasks-per-node=1" in script, "one Ray process a node"


def test_what_a_job_leaves_behind_is_the_same_by_either_way_of_submitting() -> None:
    environment = read("runtime_env.yaml")
    assert environment["excludes"] == list(EXCLUDES)
    assert all(isinstance(value, str) for value in environment["env_vars"].values())


def test_the_image_installs_what_constraints_pin_and_copies_only_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    script = text.replace("\\\n", " ")
    for install in re.findall(r"pip install ([^&\n]*)", script):
        assert "-c constraints.txt" in install
    for sources in re.findall(r"^COPY (.*)$", script, re.MULTILINE):
        for source in sources.split()[:-1]:
            assert source == "README.md" or (ROOT / source).exists()
    assert image() in text


def test_the_readme_names_every_file_and_only_commands_that_there_are() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or path.name in text, f"cluster/README.md does not name {path.name}"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^ *(pocl-ray .*)$", text.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line, comments=True)
        commands[words[1]].make_context(words[1], words[2:])
    for line in re.findall(r"^ *(?:RAY_AUTH_MODE=token )?(ray .*)$", text.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line.partition(" -- ")[0], comments=True)
        command: click.Command = ray_scripts.cli.commands[words[1]]
        while isinstance(command, click.Group):
            words = words[1:]
            command = command.commands[words[1]]
        check_ray_options(command, words[2:])
