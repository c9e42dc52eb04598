"""Jobs on a real cluster of one head that knows nothing of this package: by `longer.submit` and by `ray job submit`."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import BIN, ROOT, Head, free_ports, running_head
from tests.test_pipeline import write_purchases
from tests.test_runner import CONNECT

SUBMIT = [sys.executable, "-m", "longer.submit"]
RAY = str(BIN / "ray")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head("--num-cpus=2") as started:
        yield started


def submit(head: Head, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return head.run(*SUBMIT, "--address", head.url, "--", *words, cwd=cwd, **environment)


@pytest.mark.ray
def test_a_submitted_job_ends_as_it_would_here_and_by_the_command_line_finds_its_result(
    head: Head, tmp_path: Path
) -> None:
    source, root = tmp_path / "log", tmp_path / "run"
    source.mkdir()
    write_purchases(source, num_users=6, num_days=10)
    chosen = ["--config", "configs/quickstart.yaml", "--import_events.source", str(source), "--root", str(root)]
    done = submit(head, "jobs.import_events", *chosen)
    assert done.returncode == 0, done.stderr
    assert "import_events: version" in done.stdout
    done = submit(head, "jobs.build_sequences", *chosen, "--since-last")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 users" in done.stdout
    assert done.stderr.count("\n") == 1, "Ray's own lines come between"

    by_ray = [RAY, "job", "submit", "--address", head.url, "--working-dir", "."]
    modules = json.dumps({"py_modules": ["platform/longer"]})
    job = ["--", "python", "-m", "jobs.build_sequences"]
    again = head.run(*by_ray, "--runtime-env-json", modules, *job, *chosen)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is already built, nothing changed" in again.stdout


@pytest.mark.ray
def test_a_mistake_there_is_its_line_and_exit_code_2(head: Head, tmp_path: Path) -> None:
    done = submit(head, "jobs.import_events", "--root", str(tmp_path), "--import_events.source", "no where")
    assert done.returncode == 2
    assert "import_events.source: no where/transactions.parquet: no such file" in done.stdout


@pytest.mark.ray
def test_a_job_here_on_the_cluster_there_is_told_of_a_wrong_token_and_of_a_label_that_no_node_has(head: Head) -> None:
    """Takes long: Ray tries a wrong token for twenty seconds."""
    connect = [sys.executable, "-c", CONNECT, f"address={head.address}", "pool_label=longer.poool"]
    told = head.run(*connect)
    assert "no node has the label longer.poool=cpu (ray.pool_label) so far" in told.stderr, told.stderr
    refused = head.run(*connect, RAY_AUTH_TOKEN="0" * 64)
    assert "no Ray answers there, or it wants another token" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.ray
def test_a_mistake_here_is_one_line_and_exit_code_2(head: Head) -> None:
    [port] = free_ports(1)
    mistakes = [
        (submit(head, "jobs.trian"), "jobs.trian: no such job in"),
        (
            head.run(*SUBMIT, "jobs.train", "--config", "my.yaml"),
            "--config my.yaml: the job comes with its flags after --",
        ),
        (submit(head, "jobs.train", RAY_AUTH_TOKEN="0" * 64), "the cluster wants its token"),
        (submit(head, "jobs.train", RAY_AUTH_MODE="disabled"), "the cluster wants its token"),
        (head.run(*SUBMIT, "--address", f"127.0.0.1:{port}", "jobs.train"), "expected the dashboard's URL"),
        (head.run(*SUBMIT, "--address", f"http://127.0.0.1:{port}", "jobs.train"), "no Ray cluster answers there"),
    ]
    for done, line in mistakes:
        assert done.returncode == 2
        assert line in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of jobs with what must not travel in it."""
    (tmp_path / "jobs").mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "platform/longer", tmp_path / "platform/longer")
    stays = [
        "runs/a",
        ".venv/a",
        "data/a",
        ".secrets/a",
        "tests/a",
        "configs/a.parquet",
        ".env",
        "jobs/.env",
        "my-key.pem",
    ]
    for path in ("configs/mine.yaml", *stays):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


@pytest.mark.ray
def test_data_results_and_environments_do_not_travel(head: Head, project: Path) -> None:
    script = (
        "import os, longer.data.ray_tasks\nfor path, _, names in os.walk('.'):\n  for n in names: print('has', path, n)"
    )
    (project / "jobs/show.py").write_text(script)
    done = submit(head, "jobs.show", cwd=project)
    assert done.returncode == 0, done.stdout
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("has") and "pycache" not in line)
    assert [line for line in lines if "./platform/longer" not in line] == [
        "has ./configs mine.yaml",
        "has ./jobs show.py",
    ]


@pytest.mark.ray
def test_an_interrupted_submission_leaves_the_job_and_a_stopped_job_is_told(head: Head, project: Path) -> None:
    (project / "jobs/wait.py").write_text("import time\nprint('waiting', flush=True)\ntime.sleep(600)")
    command = [*SUBMIT, "--address", head.url, "jobs.wait"]
    followed = subprocess.Popen(
        command, cwd=project, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "waiting" not in followed.stdout.readline():  # type: ignore[union-attr]
        assert followed.poll() is None
    followed.send_signal(signal.SIGINT)
    _, said = followed.communicate(timeout=60)
    assert followed.returncode == 130
    submission = said.splitlines()[0].split()[1]
    assert f"the job goes on: see `ray job logs --follow {submission}`" in said
    assert "RUNNING" in head.run(RAY, "job", "status", "--address", head.url, submission).stdout
    stopped = head.run(RAY, "job", "stop", "--address", head.url, submission)
    assert stopped.returncode == 0, stopped.stderr


@pytest.mark.ray
def test_a_killed_jobs_exit_code_is_the_shells(head: Head, project: Path) -> None:
    (project / "jobs/die.py").write_text(f"import os\nprint('now', flush=True)\nos.kill(os.getpid(), {signal.SIGKILL})")
    done = submit(head, "jobs.die", cwd=project)
    assert done.returncode == 128 + signal.SIGKILL
    assert "now" in done.stdout
