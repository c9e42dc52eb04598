"""A node that dies in the midst of a job costs the tasks that ran there, and the result is the same."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import batch_score, build_sequences
from longer.config import Settings
from longer.data.scores import max_abs_diff, read_scores
from longer.data.tables import SequenceTable
from longer.storage import Table
from tests.cluster.nodes import ROOT, SEEN_DEAD_SOON, Head, kill_node, processes_of, running_head
from tests.data.test_build_survives import NUM_BUCKETS, records, settings_with_events, wait_for_records
from tests.data.test_increments import rows_of
from tests.serving.tables import build_world, publish_requests

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
_WITHIN_S = 100


@pytest.fixture
def head() -> Iterator[Head]:
    """A head without CPUs, and two nodes of one CPU each."""
    with running_head("--num-cpus=0", environment=SEEN_DEAD_SOON) as started:
        for _ in range(2):
            started.add_node("--num-cpus=1")
        yield started


def start(head: Head, module: str, settings: Settings, folder: Path) -> subprocess.Popen:
    config = folder / "settings.yaml"
    config.write_text(settings.model_dump_json(exclude={"ray"}))
    command = [sys.executable, "-m", module, "--config", str(config), "--ray.address", head.address]
    return subprocess.Popen(command, cwd=ROOT, env=head.environment, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> None:
    _, said = job.communicate(timeout=_WITHIN_S)
    assert job.returncode == 0, said[-3000:]


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
