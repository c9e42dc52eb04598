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

from longer.cli import parse_settings
from tests.cluster.nodes import ROOT
from tests.cluster.requests import NodeType, requests_of

CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
START = [command for kind in ("head", "worker") for command in CONFIG[f"{kind}_start_ray_commands"]]
ON_GPUS = "--ray.pool_label longer.pool --train.use_gpu --batch_score.num_gpus_per_scorer 1"


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    config = prepare_config(copy.deepcopy(CONFIG))
    validate_config(config)
    return config


@pytest.mark.parametrize("flags", ["--ray.pool_label longer.pool", ON_GPUS], ids=["CPU", "GPU"])
def test_all_that_jobs_ask_for_fits_some_kind_of_node_and_no_task_fits_the_head(flags: str) -> None:
    kinds = {
        name: NodeType(kind["resources"], kind["labels"], kind.get("max_workers", 1))
        for name, kind in CONFIG["available_node_types"].items()
    }
    settings, _ = parse_settings("a job", ["--config", str(ROOT / "configs/quickstart.yaml"), *flags.split()])
    for what, (request, number) in requests_of(settings).items():
        assert not kinds["head"].holds(request), what
        assert max(kind.holds(request) for kind in kinds.values()) >= number, f"no kind of node holds {what}"
    assert sum(kind.most for name, kind in kinds.items() if name != "head") == CONFIG["max_workers"]


def test_only_the_bucket_and_the_key_pair_are_to_be_filled_in() -> None:
    text = "\n".join(line.split("#")[0] for line in (ROOT / "cluster.yaml").read_text().splitlines())
    words = set(re.findall(r"(?<!\$)\b[A-Z][A-Z_]{4,}\b", text))
    assert words == {"KEY_PAIR", "BUCKET", "PYTHONPATH", "RAY_AUTH_MODE"}
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
    assert "~/.ray/auth_token" in CONFIG["file_mounts"]


def test_policies_name_the_profiles_roles_that_the_nodes_have() -> None:
    kinds = CONFIG["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert profiles == {"head": "longer-head", "cpu": "longer-worker", "gpu": "longer-worker"}
    head, worker = (json.loads((ROOT / f"deploy/aws/{kind}-policy.json").read_text()) for kind in ("head", "worker"))
    [passed] = [s["Resource"] for s in head["Statement"] if s["Action"] == "iam:PassRole"]
    assert passed.endswith(":role/longer-worker"), "the head could not launch workers"
    assert [s for s in worker["Statement"] if not any(a.startswith("s3:") for a in s["Action"])] == []


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
