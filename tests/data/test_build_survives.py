"""A build of sequences that loses its driver or a worker ends with the same table, and does nothing twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import build_sequences
from longer.config import Settings
from longer.data.ray_sequences import Build
from longer.data.records import Record
from longer.data.tables import SequenceTable
from tests.data.logs import generated_log, naive_sequences
from tests.data.test_increments import STRIDE, add_events, rows_of, settings_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
EVENTS = generated_log(num_users=300, num_days=8, seed=5)
NUM_BUCKETS = 250


def settings_with_events(root: Path) -> Settings:
    chosen = settings_of(root, keep_events=1000, num_buckets=NUM_BUCKETS)
    add_events(chosen, EVENTS, None)
    return chosen


def records(root: Path) -> dict[Path, int]:
    """What the build has finished, with the time it was written."""
    return {path: path.stat().st_mtime_ns for path in root.glob("tables/sequences/*/_scratch/*.json")}


def wait_for_records(root: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(records(root)) < number:
        assert time.monotonic() < deadline, "the build never got that far"
        time.sleep(0.005)


def test_a_build_killed_half_way_goes_on_where_it_was(tmp_path: Path) -> None:
    """Starts a job of its own, on a Ray of its own, and kills both: some ten seconds."""
    chosen = settings_with_events(tmp_path / "killed")
    config = tmp_path / "settings.yaml"
    config.write_text(chosen.model_dump_json(exclude={"ray"}))
    command = [sys.executable, "-m", "jobs.build_sequences", "--config", str(config), "--ray.num_cpus", "1"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for_records(tmp_path / "killed", 20)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    before = records(tmp_path / "killed")
    assert 20 <= len(before) < NUM_BUCKETS, "the build was not interrupted in its midst"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("bucket=*/part-0.parquet")}

    version = build_sequences.run(chosen)
    done = {
        tmp_path / "killed/tables/sequences" / version.id / f"bucket={path.stem[-4:]}/part-0.parquet" for path in before
    }
    kept = {path: path.stat().st_mtime_ns for path in files if path in done}
    assert len(kept) >= 19
    assert kept == {path: files[path] for path in kept}, "a bucket that was done was built again"
    undisturbed = settings_with_events(tmp_path / "undisturbed")
    assert build_sequences.run(undisturbed).id == version.id
    assert rows_of(chosen, version) == rows_of(
        undisturbed, SequenceTable(undisturbed.path("tables", "sequences"), undisturbed.event_schema).version
    )


class Dying(Build):
    """Of all tasks that cut a block or build a bucket, the first of each kind kills its worker when half is done."""

    def _remember(self, name: str, record: Record) -> Record:
        mark = Path(f"{self.version_path}.{name.split('-')[0]}-died")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._remember(name, record)


def test_a_killed_worker_costs_its_tasks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings_with_events(tmp_path)
    monkeypatch.setattr(build_sequences, "Build", Dying)
    version = build_sequences.run(chosen)
    assert len(list(tmp_path.rglob("*-died"))) == 2, "no worker was killed"
    assert rows_of(chosen, version) == naive_sequences(EVENTS, chosen.event_schema, 1000, STRIDE)
