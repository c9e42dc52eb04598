"""deploy/kuberay and deploy/Containerfile: fields, entrypoints and resources that fit each other, the jobs and this Ray."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from longer.cli import parse_settings
from longer.config import Settings
from serve_apps.arguments import TOKEN_VARIABLE, ScoringArgs
from tests.cluster.kuberay import ClusterSpec, PodSpec, RayCluster, RayJob, RayService, SecretKeyRef, Variable
from tests.cluster.nodes import ROOT
from tests.cluster.requests import (
    JOBS,
    NodeType,
    assert_on_nodes_for_it,
    memory_for_work,
    request_of_replicas,
    requests_of,
)

FOLDER = ROOT / "deploy/kuberay"
JOB_FILES = sorted((FOLDER / "jobs").glob("*.yaml"))
DOCUMENTATION = (ROOT / "docs/cluster.md").read_text()
CLUSTER = RayCluster.model_validate(yaml.safe_load((FOLDER / "cluster.yaml").read_text()))
SERVICE = RayService.model_validate(yaml.safe_load((FOLDER / "service.yaml").read_text()))
SPECS = {"cluster": CLUSTER.spec, "service": SERVICE.spec.rayClusterConfig}
SETTINGS = {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "settings.yaml").read_text())}
_RESOURCES = {"cpu": "CPU", "nvidia.com/gpu": "GPU"}
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def kinds_of(spec: ClusterSpec) -> dict[str, NodeType]:
    """As KubeRay starts them: Ray's resources are the Ray container's limits, unless start parameters say otherwise."""
    kinds = {}
    for name, group, most in [
        ("head", spec.headGroupSpec, 1),
        *((group.groupName, group, group.maxReplicas) for group in spec.workerGroupSpecs),
    ]:
        limits = group.template.spec.containers[0].resources.limits
        resources = {_RESOURCES[key]: float(value) for key, value in limits.items() if key in _RESOURCES}
        resources["memory"] = memory_for_work(int(limits["memory"][:-2]) * _UNITS[limits["memory"][-2:]])
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
    named = {kind: document["metadata"]["name"] for kind, document in SETTINGS.items()}
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
        tainted = {"nvidia.com/gpu"} & set(container.resources.limits)
        assert {(t.key, t.operator, t.effect) for t in pod.tolerations} == {
            (key, "Exists", "NoSchedule") for key in tainted
        }, "clouds taint their GPU nodes so"
    for worker in spec.workerGroupSpecs:
        kind = kinds_of(spec)[worker.groupName]
        assert worker.minReplicas <= worker.replicas <= worker.maxReplicas
        assert worker.labels["longer.pool"] == ("gpu" if kind.resources.get("GPU") else "cpu")
        assert kind.bytes_per_cpu >= 2 << 30
    head = kinds_of(spec)["head"]
    assert (head.resources["CPU"], head.labels) == (0, {"longer.pool": "head"})
    assert head.resources["memory"] >= 8 << 30, "drivers and Ray's own services"


def test_the_token_the_bucket_and_the_role_are_where_all_look_for_them() -> None:
    """The secret that is made by hand, the variables that entrypoints read, and the role with the bucket's policy."""
    for text in ((FOLDER / "settings.yaml").read_text(), DOCUMENTATION):
        [secret] = re.findall(r"kubectl create secret generic (\S+) --from-literal=auth_token=", text)
        assert {spec.authOptions.secretName for spec in SPECS.values()} == {secret}
    read = {name for path in JOB_FILES for name in re.findall(r"\$(\w+)", path.read_text())}
    assert read == {"LONGER_ROOT"}
    assert SETTINGS["ConfigMap"]["data"] == {"LONGER_ROOT": "s3://BUCKET/run", "AWS_DEFAULT_REGION": "us-east-1"}
    role = SETTINGS["ServiceAccount"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert role.endswith(":role/longer-worker")
    assert yaml.safe_load(SERVICE.spec.serveConfigV2)["applications"][0]["args"]["checkpoint"] == (
        SETTINGS["ConfigMap"]["data"]["LONGER_ROOT"] + "/checkpoints"
    )


def test_the_service_is_not_open_to_whoever_reaches_its_pods() -> None:
    """It listens on every interface: each pod has the callers' token from a secret, and a replica without it does not start."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE.spec.serveConfigV2))
    assert config.http_options.host == "0.0.0.0"
    assert ScoringArgs.model_validate(config.applications[0].args).requires_token
    spec = SERVICE.spec.rayClusterConfig
    told = {(variable.name, ref.name, ref.key) for ref, variable in variables_of(spec.headGroupSpec.template.spec)}
    for group in spec.workerGroupSpecs:
        assert {(variable.name, ref.name, ref.key) for ref, variable in variables_of(group.template.spec)} == told
    [(name, secret, key)] = told
    assert name == TOKEN_VARIABLE
    for text in ((FOLDER / "service.yaml").read_text(), DOCUMENTATION):
        assert f"kubectl create secret generic {secret} --from-literal={key}=$(openssl rand -hex 32)" in text


def variables_of(pod: PodSpec) -> list[tuple[SecretKeyRef, Variable]]:
    return [(variable.valueFrom.secretKeyRef, variable) for variable in pod.containers[0].env]


def test_the_documentation_says_how_large_a_node_the_pods_need() -> None:
    for group in CLUSTER.spec.workerGroupSpecs:
        limits = group.template.spec.containers[0].resources.limits
        told = re.search(rf"{group.groupName.upper()} workers ask for (\d+) CPUs, (\d+) GiB", DOCUMENTATION)
        assert (told[1], f"{told[2]}Gi") == (limits["cpu"], limits["memory"])
        disk = limits.get("ephemeral-storage")
        assert disk is None or f"{disk.removesuffix('Gi')} GiB of ephemeral storage" in DOCUMENTATION


def test_there_is_a_rayjob_for_each_job_but_those_of_one_machine() -> None:
    assert sorted(settings_of(path)[0] for path in JOB_FILES) == JOBS
    for path in JOB_FILES:
        job = RayJob.model_validate(yaml.safe_load(path.read_text()))
        assert job.metadata.name == path.stem
        assert job.spec.clusterSelector["ray.io/cluster"] == CLUSTER.metadata.name


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_a_jobs_settings_are_valid_and_what_it_asks_for_fits_the_cluster(path: Path) -> None:
    module, settings = settings_of(path)
    assert settings.root == "s3://bucket/run"
    assert settings.ray.pool_label == "longer.pool"
    kinds = kinds_of(CLUSTER.spec)
    for what, (request, number) in requests_of(module, settings).items():
        assert_on_nodes_for_it(request, what)
        assert not kinds["head"].holds(request), what
        assert max(kind.holds(request) for kind in kinds.values()) >= number, f"no group holds {what}"


def test_serve_and_the_builder_accept_the_services_config_and_its_replicas_fit() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE.spec.serveConfigV2))
    [application] = config.applications
    assert application.import_path == "serve_apps.scoring:build_app"
    args = ScoringArgs.model_validate(application.args)
    request, number = request_of_replicas(args)
    assert_on_nodes_for_it(request, "a replica")
    kinds = kinds_of(SERVICE.spec.rayClusterConfig)
    assert not kinds["head"].holds(request)
    assert max(kind.holds(request) for kind in kinds.values()) >= number
    [group] = SERVICE.spec.rayClusterConfig.workerGroupSpecs
    ports = {port.name: port.containerPort for port in group.template.spec.containers[0].ports}
    assert ports["serve"] == config.http_options.port == 8000, "KubeRay's probe and service look there"
    assert group.minReplicas >= args.num_replicas
    assert config.http_options.request_timeout_s is not None
    assert args.timeout_s < config.http_options.request_timeout_s <= 2 * args.timeout_s


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
    final = " ".join(lines[lines.index("FROM ${PYTHON_IMAGE}") :])
    for package in ("wget", "gcc", "g++", "libc6-dev"):
        assert re.search(rf"apt-get install [^&]*\s{re.escape(package)}\s", final), "KubeRay probes, Triton compiles"
    assert "COPY --from=build /opt/venv /opt/venv" in final
    copied = dict(re.findall(r"COPY (\w+) (/opt/longer/\w+)", final))
    assert copied == {folder: f"/opt/longer/{folder}" for folder in ("jobs", "serve_apps", "configs")}
    [environment] = [dict(word.split("=", 1) for word in line.split()[1:]) for line in lines if line.startswith("ENV")]
    assert environment["PATH"].startswith("/opt/venv/bin:")
    assert environment["PYTHONPATH"] == "/opt/longer"
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), f"{source} is not in the project"


_KUBECTL = """#!/bin/bash
case "$*" in
  apply*) echo "$*" >> "$LOG" ;;
  *rayjob/train*jobStatus*) [ -e "$LOG.seen" ] && echo "$ENDS_AS"; touch "$LOG.seen" ;;
  *rayjob/train*jobDeploymentStatus*) echo "$DEPLOYED" ;;
  *rayjob/train*message*) echo "out of luck" ;;
  *jobStatus*) echo SUCCEEDED ;;
esac
"""


@pytest.mark.parametrize(
    ("ends_as", "deployed", "started"),
    [
        ("SUCCEEDED", "Running", ["verify", "train", "evaluate"]),
        ("FAILED", "Running", ["verify", "train"]),
        ("STOPPED", "Running", ["verify", "train"]),
        ("", "Failed", ["verify", "train"]),
    ],
)
def test_jobs_run_one_after_the_other_and_the_first_failure_is_the_last(
    ends_as: str, deployed: str, started: list[str], tmp_path: Path
) -> None:
    (tmp_path / "kubectl").write_text(_KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    told = {"LOG": str(tmp_path / "log"), "ENDS_AS": ends_as, "DEPLOYED": deployed, "SECONDS_BETWEEN_LOOKS": "0.01"}
    done = subprocess.run(
        [FOLDER / "run.sh", "verify", "train", "evaluate"],
        env={**told, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert [Path(line.split()[-1]).stem for line in (tmp_path / "log").read_text().splitlines()] == started
    assert (done.returncode, done.stderr) == ((0, "") if ends_as == "SUCCEEDED" else (1, "train: out of luck\n"))
