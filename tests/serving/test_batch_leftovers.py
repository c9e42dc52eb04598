"""On S3, what a run that failed or was killed has left is not in the version that the next one publishes: readers list folders."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longer.config import Settings
from longer.data.records import Record
from longer.files import arrow_filesystem, exists, file_sizes, read_bytes, write_bytes
from longer.serving import batch as batch_runs
from longer.serving import batch_alive, batch_input, batch_output, batch_scorer
from longer.serving.batch import batch_score
from longer.serving.batch_alive import marked_alive, silent
from longer.serving.batch_check import OnlineCheck
from longer.serving.batch_plan import Plan
from longer.serving.batch_scorer import BucketScorer
from longer.storage import Table, Version, checked_output
from tests.serving.batch_runs import asking, rows_of, score_here
from tests.serving.tables import NUM_USERS, build_world


def world_on(s3: str, folder: Path) -> Settings:
    local = build_world(folder / "run")
    for file in (folder / "run").rglob("*.*"):
        if file.is_file():
            write_bytes(f"{s3}/run/{file.relative_to(folder / 'run')}", file.read_bytes())
    return local.model_copy(update={"root": f"{s3}/run"})


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_run_that_ends_in_a_bucket_leaves_no_row_twice(
    how: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_on(s3, tmp_path)
    monkeypatch.setattr(batch_runs, "_score_buckets", score_here)
    monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 1)
    monkeypatch.setattr(batch_output, "_ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(batch_alive, "_RENEWED_AFTER_S", 0.1)
    monkeypatch.setattr(batch_alive, "_SILENT_S", 0.5)
    asked = asking(world, catalogue=True, top_k=3)
    with monkeypatch.context() as broken:
        if how == "fails":  # of the check, or of a GPU without memory
            parts_of = BucketScorer._parts

            def parts(self: BucketScorer, bucket: int, check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
                for n, rows in enumerate(parts_of(self, bucket, check, record)):
                    if n == 2:
                        raise ArithmeticError("scores differ")
                    yield rows

            broken.setattr(BucketScorer, "_parts", parts)
        else:

            def remember(*_: object) -> None:
                raise KeyboardInterrupt

            broken.setattr(batch_scorer, "remember_bucket", remember)
        with pytest.raises((ArithmeticError, KeyboardInterrupt)):
            batch_score(asked)
    left = file_sizes(f"{world.root}/top_items")
    num_files, num_done = (sum(part in path for path in left) for part in ("/bucket=", "/bucket-"))
    assert num_files == num_done + (how == "is killed"), "a part of a file is no file"
    version = batch_score(asked)
    files, bare = arrow_filesystem(version.path)
    found = [path for path in file_sizes(version.path) if path.endswith(".parquet")]
    num_rows = sum(pq.read_table(f"{bare}/{path}", filesystem=files, partitioning=None).num_rows for path in found)
    assert num_rows == len(rows_of(version)) == NUM_USERS


@pytest.mark.parametrize("later", ["the first run", "the second run"])
def test_two_runs_that_finish_together_leave_one_whole_version(
    later: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see that nobody has published it; the second one publishes and ends before or after the first one's manifest."""
    world = world_on(s3, tmp_path)
    monkeypatch.setattr(batch_runs, "_score_buckets", score_here)
    monkeypatch.setattr(batch_runs, "done_buckets", lambda _: {})
    monkeypatch.setattr(batch_alive, "_RENEWED_AFTER_S", 0.1)
    monkeypatch.setattr(batch_alive, "_SILENT_S", 0.5)
    asked = asking(world, catalogue=True, top_k=2)
    publish, of_first = Table.publish, list[Callable[[], Version]]()

    def publish_together(self: Table, *what: Any) -> Version:
        if of_first:  # in the midst of the first one's, which has looked before
            if later == "the second run":
                stale = of_first[0]()
                of_first.append(lambda: stale)
            return publish(self, *what)
        of_first.append(lambda: publish(self, *what))
        batch_score(asked)
        return of_first[-1]()

    monkeypatch.setattr(Table, "publish", publish_together)
    version = batch_score(asked)
    assert len(of_first) == 1 + (later == "the second run")
    assert version.is_whole()
    found = {path for path in file_sizes(version.path) if path.startswith("bucket=")}
    assert found == {file.path for file in version.data_files()}
    assert len(rows_of(version)) == NUM_USERS


def test_a_failed_check_stays_an_error_though_another_run_has_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_world(tmp_path)
    asked = asking(world, catalogue=True, top_k=2)

    def fail(plan: Plan, *_: object) -> None:
        Table(plan.table_path).publish(plan.version_id, {}, [])
        raise ArithmeticError("scores differ")

    monkeypatch.setattr(batch_runs, "_score_buckets", fail)
    with pytest.raises(ArithmeticError, match="scores differ"):
        batch_score(asked)


def test_a_run_that_begins_as_another_publishes_leaves_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, find = Table(str(tmp_path / "table")), Table.find

    def find_before(self: Table, version_id: str) -> Version | None:
        found = find(self, version_id)
        self.publish(version_id, {}, [])
        return found

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Table, "find", find_before)
        table.resume("version")
    assert table.find("version")


def test_an_upload_of_many_parts_that_fails_is_aborted(s3: str) -> None:
    """Of fifty megabytes each: the first is on its way when the writer fails."""

    def write() -> None:
        with checked_output(f"{s3}/table/version", "large.parquet") as sink:
            for _ in range(60):
                sink.write(bytes(1 << 20))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write()
    assert not exists(f"{s3}/table/version/large.parquet")
    with checked_output(f"{s3}/table/version", "large.parquet") as sink:
        sink.write(b"whole")
    assert read_bytes(f"{s3}/table/version/large.parquet") == b"whole"


def test_a_run_that_is_alive_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_alive, "_RENEWED_AFTER_S", 0.05)
    monkeypatch.setattr(batch_alive, "_SILENT_S", 1.0)
    alive, dead, never = (f"{tmp_path}/{name}/alive" for name in ("alive", "dead", "never"))
    with marked_alive(dead):
        time.sleep(0.1)
    with marked_alive(alive):
        started = time.monotonic()
        assert silent({alive}) == set()
        assert time.monotonic() - started < 0.9, "it was waited for the end though life was seen"
        assert silent({alive, dead, never}) == {dead, never}
