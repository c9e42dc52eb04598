"""cluster.yaml: what Ray's launcher checks, and what it does not: that work fits the nodes and that the commands run."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # private, and pinned with Ray
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from longer.cli import parse_settings
from serve_apps.scoring import ScoringArgs
from tests.cluster.instances import INSTANCE_TYPES
from tests.cluster.nodes import ROOT
from tests.cluster.requests import (
    JOBS,
    NodeType,
    Request,
    assert_on_nodes_for_it,
    memory_for_work,
    request_of_replicas,
    requests_of,
)

CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
START = [command for kind in ("head", "worker") for command in CONFIG[f"{kind}_start_ray_commands"]]
DOCUMENTATION = (ROOT / "docs/cluster.md").read_text()
ON_CPUS = "--ray.pool_label longer.pool"
ON_GPUS = f"{ON_CPUS} --train.use_gpu --batch_score.num_gpus_per_scorer 1 --export_embeddings.num_gpus_per_scorer 1"
KINDS = {
    name: NodeType(
        {
            **kind["resources"],
            "memory": memory_for_work(INSTANCE_TYPES[kind["node_config"]["InstanceType"]].memory_bytes),
        },
        kind["labels"],
        kind.get("max_workers", 1),
    )
    for name, kind in CONFIG["available_node_types"].items()
}

# What Ray's node provider calls on the head, and what S3's clients of the project call, each with what it is done to.
LAUNCHING = {(f"ec2:{action}", "*") for action in ("RunInstances", "TerminateInstances", "CreateTags", "Describe*")} | {
    ("iam:PassRole", "arn:aws:iam::*:role/longer-worker"),
    ("ssm:GetParameters", "arn:aws:ssm:*::parameter/aws/service/deeplearning/*"),
}
ON_BUCKET = {(f"s3:{action}", "arn:aws:s3:::BUCKET") for action in ("ListBucket", "GetBucketLocation")} | {
    (f"s3:{action}", "arn:aws:s3:::BUCKET/*")
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")
}


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    config = prepare_config(copy.deepcopy(CONFIG))
    validate_config(config)
    return config


@pytest.mark.parametrize("flags", [ON_CPUS, ON_GPUS], ids=["CPU", "GPU"])
@pytest.mark.parametrize("module", JOBS)
def test_all_that_a_job_asks_for_fits_some_kind_of_node_and_not_the_head(module: str, flags: str) -> None:
    settings, _ = parse_settings(module, ["--config", str(ROOT / "configs/quickstart.yaml"), *flags.split()])
    for what, (request, number) in requests_of(module, settings).items():
        assert_fits(request, number, what)


def test_the_service_of_the_documentation_fits_and_names_a_path_that_nodes_see() -> None:
    command = re.search(r"^\$ (sed 's#runs/quickstart#s3:.*?) > /tmp/scoring\.yaml$", DOCUMENTATION, re.S | re.M)
    done = subprocess.run(["bash", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    config = ServeDeploySchema.model_validate(yaml.safe_load(done.stdout))
    args = ScoringArgs.model_validate(config.applications[0].args)
    assert args.checkpoint == "s3://my-bucket/run/checkpoints"
    assert args.num_gpus == 1
    assert_fits(*request_of_replicas(args), "a replica")
    assert f"--port-forward {config.http_options.port} " in DOCUMENTATION, "nothing asks the service"


def assert_fits(request: Request, number: int, what: str) -> None:
    assert_on_nodes_for_it(request, what)
    assert not KINDS["head"].holds(request), f"{what} runs beside Ray's own services"
    assert max(kind.holds(request) for kind in KINDS.values()) >= number, f"no kind of node holds {what}"


def test_nodes_are_of_instance_types_that_have_what_they_tell_ray() -> None:
    for name, kind in CONFIG["available_node_types"].items():
        instance = INSTANCE_TYPES[kind["node_config"]["InstanceType"]]
        has = {"CPU": instance.num_cpus, "GPU": instance.num_gpus}
        assert kind["labels"]["longer.pool"] == name
        if name == "head":
            assert kind["resources"] == {"CPU": 0}
        else:
            assert kind["resources"] == {kind: number for kind, number in has.items() if number}, name
            assert bool(instance.num_gpus) == (name == "gpu")
            assert instance.nvme_bytes > instance.memory_bytes, "objects spill there"
            assert KINDS[name].bytes_per_cpu >= 2 << 30


def test_nodes_come_from_zero_go_when_idle_and_only_those_without_states_may_be_taken() -> None:
    kinds = dict(CONFIG["available_node_types"])
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) == CONFIG["max_workers"]
    assert not kinds.pop("head")["node_config"].get("InstanceMarketOptions"), "all jobs' drivers run there"
    assert {name: kind["min_workers"] for name, kind in kinds.items()} == {"cpu": 0, "gpu": 0}
    spot = {name: kind["node_config"].get("InstanceMarketOptions") for name, kind in kinds.items()}
    assert spot == {"cpu": {"MarketType": "spot"}, "gpu": None}, "a replica takes its users' states with it"
    idle_s = {name: kind.get("idle_timeout_s", 60 * CONFIG["idle_timeout_minutes"]) for name, kind in kinds.items()}
    minutes = re.search(r"go after (\d+) and (\d+) idle\s+minutes", DOCUMENTATION)
    assert idle_s == {"cpu": 60 * int(minutes[1]), "gpu": 60 * int(minutes[2])}


def test_only_the_bucket_and_the_key_pair_are_to_be_filled_in() -> None:
    text = "\n".join(line.split("#")[0] for line in (ROOT / "cluster.yaml").read_text().splitlines())
    words = set(re.findall(r"(?<!\$)\b[A-Z][A-Z_]{4,}\b", text))
    assert words == {"KEY_PAIR", "BUCKET", "PYTHONPATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}
    assert text.count("KEY_PAIR") == 2
    assert text.count("BUCKET") == 1


def test_start_commands_use_flags_that_ray_start_has_and_a_token() -> None:
    known = {name for parameter in start.params for name in parameter.opts}
    started = [command for command in START if "ray start" in command]
    assert len(started) == 2
    for command in started:
        flags = {word.split("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert flags <= known
        assert {"--object-spilling-directory", "--metrics-export-port"} <= flags
        assert "RAY_AUTH_MODE=token" in command
    assert "--num-cpus=0 " in started[0], "the head's flag, not its node type, is what Ray goes by"
    assert "~/.ray/auth_token" in CONFIG["file_mounts"]


def test_policies_name_the_profiles_roles_that_the_nodes_have() -> None:
    kinds = CONFIG["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert profiles == {"head": "longer-head", "cpu": "longer-worker", "gpu": "longer-worker"}
    head, worker = (json.loads((ROOT / f"deploy/aws/{kind}-policy.json").read_text()) for kind in ("head", "worker"))
    assert allowed(worker) == ON_BUCKET, "no more and no less than S3"
    assert allowed(head) == ON_BUCKET | LAUNCHING


def allowed(policy: dict[str, Any]) -> set[tuple[str, str]]:
    """Each action with what it may be done to."""
    assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}
    pairs = [(actions, s["Resource"]) for s in policy["Statement"] for actions in [s["Action"]]]
    return {(a, on) for actions, on in pairs for a in ([actions] if isinstance(actions, str) else actions)}


@pytest.fixture
def home() -> Iterator[Path]:
    """A new user's home with the project in it, and a `sudo` that does nothing."""
    folder = Path(tempfile.mkdtemp())  # not pytest's: the environment is large, and removed at once
    (folder / "longer").symlink_to(ROOT)
    (folder / ".bashrc").write_text("# first line\n")
    (folder / "bin").mkdir()
    (folder / "bin/sudo").write_text("#!/bin/sh\necho sudo $@\n")
    (folder / "bin/sudo").chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def left_by_builds() -> set[Path]:
    return {*ROOT.glob("build"), *ROOT.glob("platform/*.egg-info")}


@pytest.mark.slow
def test_setup_commands_run_in_order_for_a_new_user_and_install_what_is_pinned(
    home: Path, prepared: dict[str, Any], s3: str
) -> None:
    """About a minute: it installs all that a node has, torch too."""
    unset = {"VIRTUAL_ENV", "PYTHONPATH"}
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    env = {**clean, "HOME": str(home), "PATH": f"{home}/bin:{clean['PATH']}"}

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        return done.stdout

    assert prepared["head_setup_commands"] == prepared["setup_commands"], "Ray's defaults are in"
    before = left_by_builds()
    outputs = [run(command.replace("BUCKET", s3.removeprefix("s3://"))) for command in prepared["setup_commands"]]
    assert left_by_builds() == before, "installing left folders in the checkout"
    assert "sudo apt-get update -qq" in outputs[0]
    assert {"gcc", "g++", "libc6-dev", "python3-dev", "python3-venv"} <= set(outputs[1].split()), "Triton compiles"
    assert "sudo chmod 1777 /mnt/scratch" in outputs[2]
    assert (home / ".bashrc").read_text() == 'export PATH="$HOME/venv/bin:$PATH"\n# first line\n'
    installed = set(run("~/venv/bin/python -m pip freeze --exclude longer").splitlines())
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    assert {line.replace("+cpu", "") for line in installed} <= pinned
    run("cd ~/longer && ~/venv/bin/python -m jobs.train --help")
    run("cd /tmp && PYTHONPATH=~/longer ~/venv/bin/python -c 'import boto3, serve_apps.scoring'")
