"""A job ends in one line for a user's mistake, and Ray comes up on any machine."""

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longer.config import RaySettings
from longer.errors import UserError
from longer.runner import user_error_in
from tests.cluster.nodes import free_ports

ROOT = Path(__file__).parent.parent
CONNECT = """
import sys
from longer.config import RaySettings
from longer.errors import UserError
from longer.runner import start_ray
try:
    start_ray(RaySettings(**dict(given.split("=") for given in sys.argv[1:])))
except UserError as error:
    print(error, file=sys.stderr)
"""

ALONE = """
from ray._private import services
services._find_address_from_flag = lambda flag: set()
"""
"""`auto` does not find the Rays of other tests, though they run on this machine."""


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": "platform", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1: see --help"),
        (
            ["--import_events.columns", "{user_id: customer"],
            "--import_events.columns {user_id: customer: not valid JSON",
        ),
        (["--train", "nonsense"], "--train nonsense: not valid JSON"),
        (["--root", "r", "--seed", "1", "--train.num_workers", "[2, 8"], "--train.num_workers [2, 8: not valid JSON"),
        (["--root", "r", "--train.tasks", "[{name: click}]"], "--train.tasks [{name: click}]: not valid JSON"),
        (["--config", "no.yaml"], "no.yaml: no such settings file; configs/ holds ready ones"),
        (["--import_events.source", "nowhere"], "import_events.source: nowhere/transactions.parquet: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], line: str) -> None:
    done = run_python("-m", "jobs.import_events", *args)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "no.such.host.invalid:6379", "nonsense", "auto"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address: str) -> None:
    """Ray itself tries for more than ten minutes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        left_behind = Path(folder) / "ray/ray_current_cluster"  # by a cluster that is gone, where `auto` looks
        left_behind.parent.mkdir()
        left_behind.write_text("127.0.0.1:9")
        done = run_python("-c", ALONE + CONNECT, f"address={address}", RAY_TMPDIR=folder)
    assert done.stderr.startswith(f"ray.address={address}: no Ray answers there"), done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_missing_is_told_before_a_ray_is_started_or_looked_for(tmp_path: Path) -> None:
    """All jobs in one process: to import them takes longer than to refuse."""
    wanted = {
        "build_sequences": ("tables/events", "import_events"),
        "build_requests": ("tables/sequences", "build_sequences"),
        "train": ("tables/requests", "build_requests"),
        **dict.fromkeys(
            ("evaluate", "serve_check", "serve", "batch_score", "export_embeddings"), ("checkpoints", "train")
        ),
    }
    each = """
import runpy, sys
root, port, *jobs = sys.argv[1:]
for job in jobs:
    sys.argv = [job, "--root", root, "--serve.port", port, "--ray.address", "127.0.0.1:1"]
    try:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""
    done = run_python("-W", "ignore", "-c", each, str(tmp_path), str(free_ports(1)[0]), *wanted)
    assert done.stdout.split() == ["2"] * len(wanted)
    why = "no published version of this table: run `python -m jobs.{}` first, with the same --config and --root"
    assert done.stderr.splitlines() == [f"{tmp_path}/{table}: {why.format(first)}" for table, first in wanted.values()]


@pytest.mark.parametrize(
    ("name", "code", "with_ray"),
    [
        ("SIGINT", 130, False),
        ("SIGTERM", 143, False),
        pytest.param("SIGTERM", 143, True, marks=pytest.mark.ray),
    ],
)
def test_ctrl_c_and_an_orderly_stop_end_a_job_in_one_line_with_the_exit_code_that_shells_give_it(
    name: str, code: int, with_ray: bool
) -> None:
    """Ten seconds where a Ray is started: with one, SIGTERM would print a stack of C++ and abort."""
    start = "start_ray(settings.ray), " if with_ray else ""  # a job may start it itself, as `jobs.serve` does
    stop = f"lambda settings: ({start}os.kill(os.getpid(), signal.{name}), time.sleep(60))"
    job = f"import os, signal, time; from longer.runner import run_job, start_ray; run_job('', {stop}, needs_ray=False)"
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    done = run_python("-c", job, *(["--ray.num_cpus", "1"] if with_ray else []), **with_token)
    assert done.returncode == code
    assert done.stderr == "interrupted: what is finished stays, and the same command does the rest\n"


@pytest.mark.parametrize("root", ["", "runs/mine", "../out", "../../../../../shared/run", "configs/../../out"])
def test_a_submitted_job_has_no_relative_root(root: str) -> None:
    done = run_python("-m", "jobs.import_events", *(["--root", root] if root else []), RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{'--' if root else ''}root: a submitted job runs in a folder of Ray's")
    assert f"(got '{root or 'runs/default'}')" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_submitted_job_takes_a_root_on_s3_and_an_absolute_one(tmp_path: Path) -> None:
    for root in ("s3://bucket/run", str(tmp_path)):
        chosen = ["--root", root, "--import_events.source", "nowhere"]
        done = run_python("-m", "jobs.import_events", *chosen, RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
        assert done.stderr.startswith("import_events.source: nowhere")


@pytest.mark.parametrize("root", [f"{ROOT}/runs", f"{ROOT}/../{ROOT.name}/out", "/tmp/ray/s/working_dir_files/out"])
def test_a_submitted_job_does_not_write_beside_its_code_where_it_would_be_lost(root: str) -> None:
    done = run_python("-m", "jobs.import_events", "--root", root, RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"root={root}: what a submitted job writes")


def test_help_names_every_setting_of_the_job() -> None:
    done = run_python("-m", "jobs.build_sequences", "--help", "sequences")
    assert done.returncode == 0
    assert "--sequences.keep_events" in done.stdout


def test_a_mistake_is_found_under_what_wrapped_it_and_a_bug_is_not_one() -> None:
    mistake = UserError("file x: repair it")
    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = mistake
    assert user_error_in(wrapped) is mistake
    assert user_error_in(ValueError("a bug")) is None


_SCRIPT = """
import platform
import ray.data  # as jobs do, before the settings are known
from longer.config import RaySettings
from longer.runner import start_ray
start_ray(RaySettings(num_cpus=1, object_store_bytes=80 << 20))

@ray.remote
def seen():
    import platform, longer
    return platform.system(), platform.__file__

print([platform.system(), platform.__file__], list(ray.get(seen.remote())))
ray.shutdown()
"""


@pytest.mark.ray
def test_a_local_job_starts_a_ray_of_its_own_beside_a_cluster_that_runs_here() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets lie under it, whose paths must be short
        started = Path(folder) / "ray/ray_current_cluster"  # what `ray start --head` leaves
        started.parent.mkdir()
        started.write_text("127.0.0.1:1")
        done = run_python("-c", _SCRIPT, HOME=folder, RAY_TMPDIR=folder)
    assert done.returncode == 0, done.stderr


def test_ray_address_of_the_environment_counts_unless_the_settings_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert RaySettings().cluster is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert RaySettings().cluster == "10.0.0.1:6379"
    assert RaySettings(address="10.0.0.2:6379").cluster == "10.0.0.2:6379"


@pytest.mark.ray
@pytest.mark.parametrize("ran_before", [False, True], ids=["first Ray here", "Ray has run here"])
def test_ray_starts_and_workers_import_the_package_and_the_standard_platform(tmp_path: Path, ran_before: bool) -> None:
    if ran_before:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("0123456789abcdef0123456789abcdef")
    done = run_python("-c", _SCRIPT, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    import platform

    here = [platform.system(), platform.__file__]
    assert done.stdout.strip().splitlines()[-1] == f"{here} {here}"


def test_the_standard_librarys_platform_wins_at_the_repository_root() -> None:
    import platform

    assert not (ROOT / "platform/__init__.py").exists()
    assert callable(platform.system)  # in pytest
    done = run_python("-c", "import platform; print(platform.system())")
    assert done.stdout.strip() == platform.system()
