"""deploy/kuberay and deploy/Containerfile: fields, entrypoints and resources that fit each other, the jobs and this Ray."""

import re
import shlex
from pathlib import Path

import pytest
import ray
import yaml
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from longer.cli import parse_settings
from longer.config import Settings
from serve_apps.scoring import ScoringArgs
from tests.cluster.kuberay import ClusterSpec, PodSpec, RayCluster, RayJob, RayService
from tests.cluster.nodes import ROOT
from tests.cluster.requests import NodeType, request_of_replicas, requests_of

FOLDER = ROOT / "deploy/kuberay"
JOBS = sorted((FOLDER / "jobs").glob("*.yaml"))
CLUSTER = RayCluster.model_validate(yaml.safe_load((FOLDER / "cluster.yaml").read_text()))
SERVICE = RayService.model_validate(yaml.safe_load((FOLDER / "service.yaml").read_text()))
SPECS = {"cluster": CLUSTER.spec, "service": SERVICE.spec.rayClusterConfig}
_RESOURCES = {"cpu": "CPU", "nvidia.com/gpu": "GPU"}


def kinds_of(spec: ClusterSpec) -> dict[str, NodeType]:
    """As KubeRay starts them: Ray's resources are the Ray container's limits, unless start parameters say otherwise."""
    kinds = {}
    for name, group, most in [
        ("head", spec.headGroupSpec, 1),
        *((group.groupName, group, group.maxReplicas) for group in spec.workerGroupSpecs),
    ]:
        limits = group.template.spec.containers[0].resources.limits
        resources = {_RESOURCES[key]: float(value) for key, value in limits.items() if key in _RESOURCES}
        if "num-cpus" in group.rayStartParams:
            resources["CPU"] = float(group.rayStartParams["num-cpus"])
        kinds[name] = NodeType(resources, group.labels, most)
    return kinds


def settings_of(path: Path) -> tuple[str, Settings]:
    """Module and settings of a RayJob's entrypoint, as its shell reads it."""
    job = RayJob.model_validate(yaml.safe_load(path.read_text()))
    python, flag, module, *words = shlex.split(job.spec.entrypoint.replace("$LONGER_ROOT", "s3://bucket/run"))
    assert (python, flag) == ("python", "-m")
    return module, parse_settings(module, [word.replace("/opt/longer", str(ROOT)) for word in words])[0]


@pytest.mark.parametrize("name", SPECS)
def test_a_cluster_has_this_ray_a_token_and_consistent_groups(name: str) -> None:
    spec = SPECS[name]
    assert spec.rayVersion == ray.__version__
    settings = list(yaml.safe_load_all((FOLDER / "settings.yaml").read_text()))
    named = {document["kind"]: document["metadata"]["name"] for document in settings}
    known = {option for parameter in start.params for option in parameter.opts}
    pods: list[PodSpec] = []
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        assert {f"--{flag}" for flag in group.rayStartParams} <= known
        pods.append(group.template.spec)
    for pod in pods:
        [container] = pod.containers
        assert container.resources.requests == container.resources.limits, "Ray counts on all of it"
        assert container.envFrom[0].configMapRef.name == named["ConfigMap"]
        assert pod.serviceAccountName == named["ServiceAccount"]
        assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
        assert container.image == ("longer:cuda" if "nvidia.com/gpu" in container.resources.limits else "longer:cpu")
    for worker in spec.workerGroupSpecs:
        assert worker.minReplicas <= worker.replicas <= worker.maxReplicas
        assert worker.labels["longer.pool"] == (
            "gpu" if kinds_of(spec)[worker.groupName].resources.get("GPU") else "cpu"
        )


def test_there_is_a_rayjob_for_each_job_but_those_of_one_machine() -> None:
    modules = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("[a-z]*.py")}
    of_one_machine = {"jobs.pipeline", "jobs.serve", "jobs.serve_check"}
    assert {settings_of(path)[0] for path in JOBS} == modules - of_one_machine
    for path in JOBS:
        job = RayJob.model_validate(yaml.safe_load(path.read_text()))
        assert job.metadata.name == path.stem
        assert job.spec.clusterSelector["ray.io/cluster"] == CLUSTER.metadata.name


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_jobs_settings_are_valid_and_what_it_asks_for_fits_the_cluster(path: Path) -> None:
    _, settings = settings_of(path)
    assert settings.root == "s3://bucket/run"
    assert settings.ray.pool_label == "longer.pool"
    kinds = kinds_of(CLUSTER.spec)
    for what, (request, number) in requests_of(settings).items():
        assert not kinds["head"].holds(request), what
        assert max(kind.holds(request) for kind in kinds.values()) >= number, f"no group holds {what}"


def test_serve_and_the_builder_accept_the_services_config_and_its_replicas_fit() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE.spec.serveConfigV2))
    [application] = config.applications
    assert application.import_path == "serve_apps.scoring:build_app"
    args = ScoringArgs.model_validate(application.args)
    request, number = request_of_replicas(args)
    assert max(kind.holds(request) for kind in kinds_of(SERVICE.spec.rayClusterConfig).values()) >= number
    [group] = SERVICE.spec.rayClusterConfig.workerGroupSpecs
    ports = {port.name: port.containerPort for port in group.template.spec.containers[0].ports}
    assert ports["serve"] == config.http_options.port == 8000, "KubeRay's probe and service look there"
    assert group.minReplicas >= args.num_replicas


def test_the_image_is_built_in_stages_pinned_and_runs_as_the_pods_user() -> None:
    text = (ROOT / "deploy/Containerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM ${PYTHON_IMAGE} AS build",
        "FROM ${PYTHON_IMAGE}",
    ]
    assert re.search(r"ARG PYTHON_IMAGE=\S+:3\.\d+\.\d+-\S+$", text, re.MULTILINE), "the base image is not pinned"
    assert any(line.startswith("RUN TORCH_INDEX=") and "deploy/install.sh /opt/venv" in line for line in lines)
    assert "constraints.txt" in (ROOT / "deploy/install.sh").read_text()
    [user] = [line.split()[1] for line in lines if line.startswith("USER")]
    for spec in SPECS.values():
        assert {spec.headGroupSpec.template.spec.securityContext.runAsUser} == {int(user)}
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), f"{source} is not in the project"
