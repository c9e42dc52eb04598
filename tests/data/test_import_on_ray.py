"""Imports as Ray tasks: the same table whatever their number, no duplicates when one is killed, and the same on S3."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import s3fs

from jobs import build_sequences, import_events
from longer.data import ray_events
from longer.data.import_report import PartReport
from longer.data.ray_events import PartImporter
from longer.datasets.source import Part
from longer.runner import user_error_in
from longer.storage import Table, Version
from tests.data.import_logs import day, settings_of, write_day
from tests.data.test_imports import rows_of, tables_left

ROOT = Path(__file__).parents[2]


def listed(version: Version) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in version.data_files()]


@pytest.fixture
def always_on_ray(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setattr(ray_events, "_FEW_PARTS", 0)


def test_an_import_queues_its_tasks_on_a_cluster_that_has_no_cpus_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    small, large = (Part("a", "a", "", num_bytes) for num_bytes in (1, 256 << 20))
    assert ray_events.num_tasks([small] * 20) == 20
    assert ray_events.num_tasks([small] * 100) == 32
    assert ray_events.num_tasks([small] * 6400) == 200
    assert ray_events.num_tasks([large] * 100) == 100
    assert ray_events.num_tasks([large] + [small] * 399) == 32


class KilledOnce(PartImporter):
    """Its process dies as the second day's file has just been written, the first time."""

    def import_part(self, part: Part) -> PartReport:
        report = super().import_part(part)
        marker = Path(self.events_path).parents[2] / "killed"
        if part.name == "day-1.parquet" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return report


@pytest.mark.ray
@pytest.mark.usefixtures("always_on_ray")
def test_the_table_is_the_same_in_one_process_in_few_tasks_and_in_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_day(tmp_path / "log", number, user_id=[None] * number + [1] * (20 - number))
    monkeypatch.setattr(ray_events, "_FEW_TASKS", 2)
    tasks = [import_events.run(settings_of(tmp_path / "tasks", tmp_path / "log"))]
    monkeypatch.setattr(ray_events, "_TASK_BYTES", 1)
    tasks.append(import_events.run(settings_of(tmp_path / "many", tmp_path / "log")))
    monkeypatch.setattr(ray_events, "_TASK_BYTES", 1 << 30)
    monkeypatch.setattr(ray_events, "_FEW_PARTS", 100)
    alone = import_events.run(settings_of(tmp_path / "alone", tmp_path / "log"))
    for version in tasks:
        assert version.id == alone.id
        assert listed(version) == listed(alone)
        assert version.manifest["reasons"] == alone.manifest["reasons"] == {"null user_id": 15}


@pytest.mark.ray
@pytest.mark.usefixtures("always_on_ray")
def test_a_task_killed_after_it_wrote_is_tried_again_and_no_row_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_day(tmp_path / "log", number)
    monkeypatch.setattr(import_events, "PartImporter", KilledOnce)
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert (tmp_path / "run/killed").exists()
    assert [row["item_id"] for row in rows_of(version)] == [item for n in range(4) for item in day(n)["item_id"]]
    assert {str(path) for path in (tmp_path / "run/tables/events").rglob("*.parquet")} == set(version.files())


@pytest.mark.ray
@pytest.mark.usefixtures("always_on_ray")
def test_a_mistake_found_in_a_task_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for number in range(4):
        write_day(tmp_path / "log", number)
    (tmp_path / "log/day-2.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(Exception, match="day-2") as caught:
        import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    mistake = user_error_in(caught.value)
    assert str(mistake).startswith(f"{tmp_path}/log/day-2.parquet: not a readable Parquet file")
    assert "\n" not in str(mistake)
    assert tables_left(tmp_path / "run") == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_what_an_increment_of_events_adds_is_what_an_increment_of_sequences_reads(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", tmp_path / "log")
    for number in range(2):
        write_day(tmp_path / "log", number)
    import_events.run(settings, since_last=True)
    first = build_sequences.run(settings, since_last=True)
    write_day(tmp_path / "log", 2)
    import_events.run(settings, since_last=True)
    second = build_sequences.run(settings, since_last=True)
    assert second.manifest["inputs"]["base"] == first.id
    assert (first.manifest["num_events"], second.manifest["num_events"]) == (40, 60)


def test_a_job_killed_between_data_and_manifest_leaves_the_old_version_and_a_rerun_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path / "run", tmp_path / "log")
    write_day(tmp_path / "log", 0)
    first = import_events.run(settings)
    write_day(tmp_path / "log", 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "publish", killed)
        patch.setattr(Table, "discard", lambda *_: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            import_events.run(settings, since_last=True)
    table = Table(f"{tmp_path}/run/tables/events")
    served = table.current()
    assert served is not None
    assert served.id == first.id
    second = import_events.run(settings, since_last=True)
    assert [row["item_id"] for row in rows_of(second)] == [*day(0)["item_id"], *day(1)["item_id"]]


@pytest.mark.ray
def test_a_log_on_s3_becomes_a_table_on_s3_in_tasks_of_a_ray_of_its_own(s3: str, tmp_path: Path) -> None:
    """As a user runs it; so many files that the job starts a Ray."""
    num_days = 34
    for number in range(num_days):
        write_day(tmp_path, number, user_id=[-1] + [1] * 19)
    files = s3fs.S3FileSystem()
    files.put([str(path) for path in tmp_path.glob("*.parquet")], f"{s3}/log/")
    features = '[{"name": "price", "kind": "numeric", "of": "event"}]'
    command = [sys.executable, "-m", "jobs.import_events", "--root", f"{s3}/run", "--event_schema.features", features]
    command += ["--import_events.dataset", "generic", "--import_events.source", f"{s3}/log"]
    command += ["--import_events.max_quarantined_share", "0.1", "--ray.num_cpus", "2"]
    command += ["--ray.object_store_bytes", str(256 << 20)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    version = Table(f"{s3}/run/tables/events").require("jobs.import_events")
    assert version.manifest["num_rows"] == num_days * 19
    assert version.manifest["reasons"] == {"negative user_id": num_days}
    assert all(content_id.startswith("etag:") for content_id in version.manifest["inputs"])

    settings = settings_of(f"{s3}/run", f"{s3}/log/*.parquet", max_quarantined_share=0.1)
    assert import_events.run(settings, since_last=True).id == version.id
    files.put(str(write_day(tmp_path, num_days)), f"{s3}/log/")
    files.cp_file(f"{s3}/log/day-0.parquet", f"{s3}/log/day-0-again.parquet")
    added = import_events.run(settings, since_last=True)
    assert added.manifest["num_new_rows"] == 20
    assert set(version.files()) < set(added.files())
    table = pa.concat_tables([pa.parquet.read_table(files.open(path)) for path in added.files()])
    assert sorted(table["item_id"].to_pylist()) == sorted(
        [item for n in range(num_days) for item in day(n)["item_id"][1:]] + day(num_days)["item_id"]
    )
