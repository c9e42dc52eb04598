"""A node that dies in the midst of a job costs the tasks that ran there, and the result is the same."""

import glob
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs import batch_score, build_sequences
from longer.config import Settings
from longer.data.scores import max_abs_diff, read_scores
from longer.data.tables import RequestTable, SequenceTable
from longer.storage import Table
from longer.training.content import tally
from tests.cluster.nodes import ROOT, SEEN_DEAD_SOON, Head, kill_node, processes_of, running_head
from tests.data.test_build_on_ray import run_all, settings_of
from tests.data.test_build_survives import NUM_BUCKETS, records, settings_with_events, wait_for_records
from tests.data.test_increments import rows_of
from tests.serving.tables import build_world, publish_requests

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.slow]
_WITHIN_S = 100


@pytest.fixture
def head() -> Iterator[Head]:
    """A head without CPUs, and two nodes of one CPU each."""
    with running_head("--num-cpus=0", environment=SEEN_DEAD_SOON) as started:
        for _ in range(2):
            started.add_node("--num-cpus=1")
        yield started


def start(
    head: Head, module: str, settings: Settings, folder: Path, *flags: str, **environment: str
) -> subprocess.Popen:
    config = folder / "settings.yaml"
    config.write_text(settings.model_dump_json(exclude={"ray"}))
    command = [sys.executable, "-m", module, "--config", str(config), "--ray.address", head.address, *flags]
    env = {**head.environment, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> str:
    """What the job said."""
    _, said = job.communicate(timeout=_WITHIN_S)
    assert job.returncode == 0, said[-3000:]
    return str(said)


def test_a_build_that_loses_a_node_ends_with_the_same_table(head: Head, tmp_path: Path) -> None:
    lost = settings_with_events(tmp_path / "lost")
    job = start(head, "jobs.build_sequences", lost, tmp_path)
    wait_for_records(tmp_path / "lost", 20)
    kill_node(head.nodes[0])
    assert len(records(tmp_path / "lost")) < NUM_BUCKETS, "the build was not in its midst"
    finish(job)
    undisturbed = settings_with_events(tmp_path / "undisturbed")
    version = build_sequences.run(undisturbed)
    table = SequenceTable(lost.path("tables", "sequences"), lost.event_schema)
    assert table.version.id == version.id
    assert rows_of(lost, table.version) == rows_of(undisturbed, version)


def test_batch_scoring_that_loses_a_scorers_node_ends_with_the_same_scores(head: Head, tmp_path: Path) -> None:
    world = build_world(tmp_path / "lost")
    publish_requests(world, Table(world.path("tables", "sequences")).require("jobs.build_sequences"))
    job = start(head, "jobs.batch_score", world, tmp_path)
    deadline = time.monotonic() + _WITHIN_S
    while not any("BucketScorer" in command for command in processes_of(head.nodes[0]).values()):
        assert time.monotonic() < deadline, "no scorer was started there"
        time.sleep(0.05)
    kill_node(head.nodes[0])
    finish(job)
    scored = read_scores(Table(world.path("batch_scores")).require("jobs.batch_score"))
    undisturbed = build_world(tmp_path / "undisturbed")
    publish_requests(undisturbed, Table(undisturbed.path("tables", "sequences")).require("jobs.build_sequences"))
    batch_score.run(undisturbed)
    expected = read_scores(Table(undisturbed.path("batch_scores")).require("jobs.batch_score"))
    assert max_abs_diff(expected, scored, world.train.tasks) == (pytest.approx(0, abs=1e-6), len(expected))


def test_training_that_loses_a_node_goes_on_with_the_workers_that_are_left(head: Head, tmp_path: Path) -> None:
    """Every request is trained once an epoch although the number of workers changes within one.

    Ray counts on a lost node for up to 20 s, which the run waits out.
    """
    built = settings_of(tmp_path, requests={"validation_days_share": 0.1})
    run_all(built)
    elastic = {"num_workers": (1, 2), "tokens_per_step": 320, "epochs": 2, "validate_every_steps": 8, "max_failures": 1}
    small = {**built.model.model_dump(), "item_rows": 211, "user_rows": 31, "event_width": 8, "num_heads": 2}
    settings = Settings(**{**built.model_dump(), "model": small, "train": elastic})
    job = start(head, "jobs.train", settings, tmp_path, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    committed = "training/*/checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + _WITHIN_S
    while not any(json.loads(path.read_text())["checkpoint_results"] for path in Path(settings.root).glob(committed)):
        assert job.poll() is None, "training ended before a checkpoint was committed"
        assert time.monotonic() < deadline, "no checkpoint was committed"
        time.sleep(0.05)
    assert any("RayTrainWorker" in command for command in processes_of(head.nodes[0]).values())
    kill_node(head.nodes[0])
    starts = re.findall(r"(\d+) steps, starting at step (\d+) with (\d) workers", finish(job))
    (num_steps, first, first_workers), (_, second, second_workers) = starts
    assert (first, first_workers, second_workers) == ("0", "2", "1")
    assert 0 < int(second) < int(num_steps), "it was not interrupted in its midst"
    (trained,) = Table(settings.path("checkpoints")).require("jobs.train").manifest["trained"]
    table = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    ids = np.concatenate([table.read("train", bucket).request_id_R for bucket in range(table.num_buckets)])
    assert trained["epochs"] == [tally(ids)] * 2


def test_a_driver_that_is_killed_leaves_no_requests_on_the_nodes_disks(head: Head, tmp_path: Path) -> None:
    """The cluster runs on, and with it the processes in which workers were."""
    built = settings_of(tmp_path, requests={"validation_days_share": 0.1})
    run_all(built)
    small = {**built.model.model_dump(), "item_rows": 211, "user_rows": 31, "event_width": 8, "num_heads": 2}
    endless = {"num_workers": 2, "tokens_per_step": 320, "epochs": 1000, "validate_every_steps": 10**6}
    settings = Settings(**{**built.model_dump(), "model": small, "train": endless})
    job = start(head, "jobs.train", settings, tmp_path, "--ray.scratch", str(tmp_path / "scratch"))
    wait_for_holders(tmp_path / "scratch", lambda holders: len(holders) >= 4, job)  # on each node a keeper and a worker
    job.kill()
    wait_for_holders(tmp_path / "scratch", lambda holders: not holders)
    assert not [*(tmp_path / "scratch").iterdir()]


def wait_for_holders(folder: Path, are_right: Callable[[set[str]], bool], job: subprocess.Popen | None = None) -> None:
    """Until the processes that have a file of this folder open, or mapped, are the right ones."""
    deadline = time.monotonic() + _WITHIN_S
    while not are_right({path.split("/")[2] for path in glob.glob("/proc/[0-9]*/fd/*") if is_in(folder, path)}):
        assert job is None or job.poll() is None, "training ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_in(folder: Path, link: str) -> bool:
    try:
        return os.readlink(link).startswith(f"{folder}/")
    except OSError:  # it has been closed, or is another user's
        return False
