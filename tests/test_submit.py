"""`longer.submit` before a job interface that breaks in the ways that clusters, tunnels and people do."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longer import submit
from tests.dashboard import JOB, Dashboard, serving

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # set by `connect`; so it is put back
    monkeypatch.setattr(submit, "_SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(submit, "_RECONNECTS_FOR_S", 0.5)
    monkeypatch.setattr(submit, "_ANSWERS_WITHIN_S", 0.5)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with serving(Dashboard()) as started:
        yield started


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with little in it, as the working folder."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train.py").touch()
    (tmp_path / "platform/longer").mkdir(parents=True)
    (tmp_path / "platform/longer/__init__.py").write_text("# edited here")
    for name in (".gitignore", ".rayignore", "platform/longer/.rayignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(dashboard: Dashboard) -> int:
    return submit.main(["--address", dashboard.url, "--", "jobs.train"])


def ending(dashboard: Dashboard, **end: object) -> None:
    """The job ends so when its log has been sent."""

    def end_now(_: Dashboard) -> None:
        for name, value in end.items():
            setattr(dashboard, name, value)

    dashboard.at_tail = end_now


@pytest.mark.usefixtures("checkout")
def test_each_line_is_printed_once_though_the_connection_breaks_between(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.log = "one\ntw"

    def breaks(_: Dashboard) -> None:
        if dashboard.num_tails < 3:
            dashboard.log += "o\n" if dashboard.num_tails == 1 else "three\n"
        else:
            dashboard.status, dashboard.log = "SUCCEEDED", dashboard.log + "last"

    dashboard.at_tail = breaks
    assert submitted(dashboard) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nlast"


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("status", "exit_code", "expected", "told"),
    [("STOPPED", None, 1, True), ("FAILED", None, 1, True), ("FAILED", -9, 1, True), ("FAILED", 2, 2, False)],
)
def test_a_job_that_was_stopped_or_never_started_is_told_with_ray_s_reason(
    dashboard: Dashboard,
    capsys: pytest.CaptureFixture[str],
    status: str,
    exit_code: int | None,
    expected: int,
    told: bool,
) -> None:
    ending(dashboard, status=status, exit_code=exit_code, message="the reason")
    assert submitted(dashboard) == expected
    assert (f"{JOB} {status}: the reason" in capsys.readouterr().err) == told


@pytest.mark.usefixtures("checkout")
def test_a_cluster_that_answers_again_in_time_is_followed_on(dashboard: Dashboard) -> None:
    dashboard.failures["job"] = [(500, "restarting")] * 3
    dashboard.failures["logs"] = [(502, "tunnel")] * 2
    ending(dashboard, status="SUCCEEDED")
    assert submitted(dashboard) == 0


@pytest.mark.usefixtures("checkout")
def test_a_lost_cluster_is_one_line_and_not_the_exit_code_of_a_mistake(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.failures["job"] = [(500, "gone")] * 1000
    assert submitted(dashboard) == 3
    submission, line = capsys.readouterr().err.splitlines()
    assert JOB in submission
    assert line.startswith("lost the cluster: ")
    assert f"the job may go on: see `ray job logs --follow {JOB}`" in line


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("kind", ["upload", "submit"])
def test_a_cluster_that_does_not_take_the_job_is_one_line_and_exit_code_3(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    dashboard.failures[kind] = [(500, "No available agent to submit job\nTraceback")]
    assert submitted(dashboard) == 3
    said = capsys.readouterr().err
    assert "the cluster did not take the job: Request failed with status code 500: No available agent" in said
    assert said.count("\n") == 1


def test_a_folder_that_is_too_large_is_one_line_that_names_the_remedy(
    dashboard: Dashboard, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "jobs/large.py").write_bytes(os.urandom(101 << 20))
    assert submitted(dashboard) == 2
    said = capsys.readouterr().err
    assert "100 MB of code and settings: name what need not travel in .rayignore" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("answer", [(404, "none"), (500, "broken"), (200, "<html>"), (200, "{}")])
def test_a_server_that_is_not_ray_is_one_line(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], answer: tuple[int, str]
) -> None:
    dashboard.failures["version"] = [answer]
    assert submitted(dashboard) == 2
    said = capsys.readouterr().err
    assert f"--address {dashboard.url}: not a Ray dashboard" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("checkout")
def test_a_port_that_is_none_and_one_that_is_silent_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--address", "http://127.0.0.1:99999", "jobs.train"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert submit.main(["--address", f"http://127.0.0.1:{silent.getsockname()[1]}", "jobs.train"]) == 2
    none, no_answer = capsys.readouterr().err.splitlines()
    assert "not a Ray dashboard (Failed to parse" in none
    assert "no Ray cluster answers there" in no_answer


def test_ctrl_c_is_exit_code_130_before_during_and_after_the_upload(dashboard: Dashboard, checkout: Path) -> None:
    """Each time the server sends the signal at that stage, then hangs, as far as the client can tell."""
    command = [sys.executable, "-m", "longer.submit", "--address", dashboard.url, "jobs.train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    for kind, line in (
        ("version", "`ray job list` tells"),
        ("upload", "`ray job list` tells"),
        ("job", "the job goes on"),
    ):
        client = subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True)

        class Interrupt(list):
            def pop(self, _: int) -> tuple[int, str]:
                client.send_signal(signal.SIGINT)  # noqa: B023
                return (503, "")

        dashboard.failures = {kind: Interrupt([None])}
        _, said = client.communicate(timeout=60)
        assert client.returncode == 130, said
        assert line in said
        assert "Traceback" not in said


def test_the_package_of_the_checkout_runs_not_the_one_installed_here(
    dashboard: Dashboard, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending(dashboard, status="SUCCEEDED")
    assert submitted(dashboard) == 0
    _, package = dashboard.uploaded
    assert package == {"longer/__init__.py"}  # the edited one has no other file
    shutil.rmtree(checkout / "platform")
    assert submitted(dashboard) == 2
    assert f"{checkout}: no platform/longer here" in capsys.readouterr().err


_STAYS = """
.env .netrc .pypirc my-key.pem sub/.env sub/data/a.txt a.csv jobs/a.csv configs/b.safetensors checkpoints/a.py
mlruns/a.yaml configs/.env jobs/.hidden.py configs/.aws/credentials.yaml configs/secrets.yaml jobs/id_rsa
jobs/id_ed25519 configs/key.pem configs/service-account.json runs/a.py .venv/a.py .secrets/a.yaml data/a.yaml
jobs/__pycache__/a.pyc jobs/a.parquet platform/longer/.env platform/longer/data/.env platform/longer/key.pem
platform/longer/a.parquet tests/a.py docs/a.md notes.txt
"""
_TRAVELS = ["configs/mine.yaml", "configs/datasets/a.yaml", "jobs/train.py", "jobs/more/mine.py", "serve_apps/a.py"]


def test_keys_data_and_results_stay_here_hidden_or_not(dashboard: Dashboard, checkout: Path) -> None:
    for name in [*_STAYS.split(), *_TRAVELS]:
        (checkout / name).parent.mkdir(exist_ok=True, parents=True)
        (checkout / name).touch()
    ending(dashboard, status="SUCCEEDED")
    assert submitted(dashboard) == 0
    folder, package = ({name for name in names if not name.endswith("/")} for names in dashboard.uploaded)
    assert folder == {*_TRAVELS, "platform/longer/__init__.py"}
    assert package == {"longer/__init__.py"}


def test_all_that_jobs_need_travels(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ending(dashboard, status="SUCCEEDED")
    assert submitted(dashboard) == 0
    folder, package = dashboard.uploaded
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {name for name in listed if name.split("/")[0] in {"configs", "jobs", "platform", "serve_apps"}}
    assert code - folder <= {"platform/longer/.rayignore"}
    assert {name.removeprefix("platform/") for name in code if name.startswith("platform/longer/")} - package <= {
        "longer/.rayignore"
    }
