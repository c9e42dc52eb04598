"""A table that grew by increments equals one built at once, row for row, whatever came late, twice or at the same time."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import build_sequences
from longer.config import Settings, load_settings
from longer.data import ray_items, ray_sequences, segments
from longer.data.catalogue import first_seen
from longer.data.items import read_items
from longer.data.layout import bucket_files
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.hashing import bucket_of, stable_keys
from longer.schema import EventSchema
from longer.storage import DataFile, Table, Version, checked_output
from tests.data.logs import BASKETS, DAY_MS, STRINGS, log, logs, naive_sequences

STRIDE = 2
MODEL = {"history_events": 4, "merge_size": 2, "query_groups": 1, "stride_groups": 1, "event_width": 4, "num_heads": 1}


def settings_of(root: Path, schema: EventSchema = BASKETS, **sequences: Any) -> Settings:
    asked = {"num_buckets": 2, "row_group_events": 8, "merge_share": 0.0, "late_allowance_hours": 48.0} | sequences
    return load_settings(
        overrides={"root": str(root), "event_schema": schema.model_dump(), "model": MODEL, "sequences": asked}
    )


def add_events(settings: Settings, events: pa.Table, last: Version | None) -> Version:
    """The events table with one more file."""
    table, number = Table(settings.path("tables", "events")), len(last.files()) if last else 0
    version_id = f"v{number}"
    with checked_output(table.begin(version_id), f"dt=2016-07-18/part-{number}.parquet") as sink:
        pq.write_table(events, sink, row_group_size=2)
    files: list[DataFile] = [*(last.data_files() if last else []), sink.data_file]
    num_rows = len(events) + (last.manifest["num_rows"] if last else 0)
    return table.publish(version_id, {"schema_hash": settings.event_schema.hash(), "num_rows": num_rows}, files)


@contextmanager
def in_this_process(block_rows: int = 3) -> Iterator[None]:
    """Runs the tasks here: what they do is tested on Ray elsewhere, and hypothesis asks for many builds. Blocks are small."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ray_sequences, ray_items):
            patch.setattr(module, "each", lambda function, arguments, *_: [function(a) for a in arguments])
        patch.setattr(segments, "_BLOCK_ROWS", block_rows)
        patch.setattr(ray_items, "_TABLES_AT_ONCE", 2)
        yield


def rows_of(settings: Settings, version: Version) -> list[dict[str, Any]]:
    table = SequenceTable(settings.path("tables", "sequences"), settings.event_schema, version.id)
    rows = [row for bucket in table.buckets for row in table.rows(bucket).to_pylist()]
    users = pa.array([row["user_id"] for row in rows], table.schema.id_types[0])
    assert table.get(users).first_index_B.tolist() == [row["first_index"] for row in rows], "a point read differs"
    return sorted(rows, key=lambda row: row["user_id"])


class Arrivals:
    """The events that a table built by increments holds, by the rule for late ones, one event at a time.

    An event comes too late before the watermark less the allowance; or where it falls among events that the table has cut, as
    its rows were last written, unless so many younger ones are there that nothing of that part is kept.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.schema = settings, settings.event_schema
        self.taken: list[dict[str, Any]] = []
        self.written: dict[int, list[dict[str, Any]]] = {}
        self.watermark = -1
        self.num_too_late = 0

    def add(self, batch: pa.Table) -> None:
        allowance_ms = self.settings.sequences.late_allowance_hours * 3_600_000
        is_first = self.watermark < 0
        in_time = [e for e in batch.to_pylist() if is_first or ms(e["event_ts"]) >= self.watermark - allowance_ms]
        placed = [e for e in in_time if self._has_place(e, [m for m in in_time if m["user_id"] == e["user_id"]])]
        self.taken += placed
        self.num_too_late += len(batch) - len(placed)
        self.watermark = max([self.watermark, *(ms(event["event_ts"]) for event in in_time)])

    def wrote(self, version: Version) -> None:
        """Remembers what the rows of each bucket hold, where they were written anew."""
        for bucket, files in bucket_files(version).items():
            if files.news is None:
                self.written[bucket] = self._of_bucket(bucket)

    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self.taken, schema=self.schema.events_arrow())

    def _has_place(self, event: dict[str, Any], mine: list[dict[str, Any]]) -> bool:
        bucket, keep = self._bucket(event["user_id"]), self.settings.sequences.keep_events
        written = [e for e in self.written.get(bucket, []) if e["user_id"] == event["user_id"]]
        rows = naive_sequences(
            pa.Table.from_pylist(written, schema=self.schema.events_arrow()), self.schema, keep, STRIDE
        )
        if not rows or rows[0]["first_index"] == 0 or event["event_ts"] > rows[0]["prev_event_ts"]:
            return True
        since = self._of_bucket(bucket)[len(self.written[bucket]) :]
        news = [e for e in since if e["user_id"] == event["user_id"]] + mine
        younger = sum(e["event_ts"] > rows[0]["prev_event_ts"] for e in news)
        if event["event_ts"] < rows[0]["prev_event_ts"]:  # else it may belong after events that are kept
            younger += len(rows[0]["item_id"])
        return younger >= keep + STRIDE

    def _of_bucket(self, bucket: int) -> list[dict[str, Any]]:
        return [event for event in self.taken if self._bucket(event["user_id"]) == bucket]

    def _bucket(self, user: int | str) -> int:
        key = stable_keys(pa.array([user], self.schema.id_types[0]))
        return int(bucket_of(key, self.settings.sequences.num_buckets or 0)[0])


def ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)


@st.composite
def arriving(draw: st.DrawFn, schema: EventSchema) -> list[pa.Table]:
    """A log in batches: most events arrive with their day, some days later, some twice; few users and days make many ties."""
    last_user, last_day = draw(st.sampled_from([(4, 6), (1, 2)]))
    event = st.tuples(st.integers(1, last_user), st.integers(0, last_day), st.integers(1, 5), st.integers(0, 2))
    rows = draw(st.lists(st.tuples(event, st.sampled_from([0, 0, 0, 1, 2, 5]), st.booleans()), min_size=1, max_size=50))
    by_arrival: dict[int, list] = {}
    for place, (row, delay, again) in enumerate(rows):
        by_arrival.setdefault(row[1] + delay, []).append(row)
        if again and place % 7 == 0:
            by_arrival.setdefault(row[1] + delay + 1, []).append(row)
    return [log(by_arrival[day], schema) for day in sorted(by_arrival)]


@pytest.mark.parametrize("schema", [BASKETS, STRINGS], ids=["int ids", "string ids"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), keep=st.sampled_from([6, 8, 1000]), merge_share=st.sampled_from([0.0, 0.3, 10.0]))
def test_increments_equal_a_build_from_scratch_row_for_row(
    tmp_path_factory: pytest.TempPathFactory, schema: EventSchema, data: st.DataObject, keep: int, merge_share: float
) -> None:
    batches = data.draw(arriving(schema))
    root = tmp_path_factory.getbasetemp() / f"increments-{schema.user_id}"
    shutil.rmtree(root, ignore_errors=True)
    chosen = settings_of(root, schema, keep_events=keep, merge_share=merge_share)
    events, arrivals = None, Arrivals(chosen)
    with in_this_process():
        for batch in batches:
            events = add_events(chosen, batch, events)
            version = build_sequences.run(chosen, since_last=True)
            arrivals.add(batch)
            arrivals.wrote(version)
    expected = naive_sequences(arrivals.table(), schema, keep, STRIDE)
    assert rows_of(chosen, version) == expected
    counts = ("num_users", "num_events", "num_events_kept", "num_too_late")
    num_kept = sum(len(row["item_id"]) for row in expected)
    assert [version.manifest[name] for name in counts] == [
        len(expected),
        len(arrivals.taken),
        num_kept,
        arrivals.num_too_late,
    ]
    seen = first_seen(pa.concat_tables(batches), schema)
    assert read_items(chosen.path("tables", "items"), version.id, schema).to_pylist() == seen.to_pylist()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_one_build_of_many_blocks_equals_the_definition(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    events = data.draw(logs(BASKETS, max_events=60))
    root = tmp_path_factory.getbasetemp() / "blocks"
    shutil.rmtree(root, ignore_errors=True)
    chosen = settings_of(root, keep_events=data.draw(st.sampled_from([6, 8, 1000])))
    add_events(chosen, events, None)
    with in_this_process(block_rows=data.draw(st.integers(1, 20))):
        version = build_sequences.run(chosen)
    assert rows_of(chosen, version) == naive_sequences(events, BASKETS, chosen.sequences.keep_events, STRIDE)


def test_a_backlog_of_one_user_moves_and_keeps_no_more_than_the_table_can_hold(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=8, merge_share=100.0, late_allowance_hours=1e6)
    first = add_events(chosen, log([(1, day, 1, 1) for day in range(20)]), None)
    with in_this_process(block_rows=40):
        build_sequences.run(chosen)
        backlog = log([(1, 20 + place // 10, place % 12, 1) for place in range(200)])
        add_events(chosen, backlog, first)
        version = build_sequences.run(chosen, since_last=True)
    (news,) = (pq.read_table(path, partitioning=None) for path in version.files("news/"))
    assert len(news["item_id"].combine_chunks().flatten()) == 8 + STRIDE
    assert news["num_older"].to_pylist() == [200 - 8 - STRIDE]
    assert rows_of(chosen, version)[0]["num_events_total"] == 220


def test_an_increment_writes_only_buckets_with_news_and_shares_the_rest(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, num_buckets=16, keep_events=1000, merge_share=0.5)
    first = add_events(chosen, log([(user, day, 1, 1) for user in range(1, 60) for day in range(9)]), None)
    with in_this_process():
        base = build_sequences.run(chosen)
        add_events(chosen, log([(7, 20, 2, 1)]), first)
        version = build_sequences.run(chosen, since_last=True)
        assert build_sequences.run(chosen, since_last=True).id == version.id
    own = [file for file in version.data_files() if file.version == version.id]
    assert [file.path.split("/")[0] for file in own] == ["news"]
    assert len(version.data_files()) == len(base.data_files()) + 1
    assert not (Path(version.path) / "_scratch").exists()


def test_an_increment_on_other_events_or_settings_says_to_build_without_it(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    events = log([(1, 0, 1, 1)])
    with in_this_process():
        build_sequences.run(chosen, since_last=bool(add_events(chosen, events, None)))
        table = Table(chosen.path("tables", "events"))
        with checked_output(table.begin("other"), "dt=2016-07-18/part-0.parquet") as sink:
            pq.write_table(events, sink)
        table.publish("other", {"schema_hash": chosen.event_schema.hash(), "num_rows": 1}, [sink.data_file])
        with pytest.raises(UserError, match=r"does not continue the events .* run without --since-last"):
            build_sequences.run(chosen, since_last=True)
        with pytest.raises(UserError, match="keep_events: the last sequences were built with 1000, not 900"):
            build_sequences.run(settings_of(tmp_path, keep_events=900), since_last=True)


def test_a_day_without_events_changes_no_row(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    first = add_events(chosen, log([(1, 0, 1, 1), (2, 3, 1, 1)]), None)
    with in_this_process():
        base = build_sequences.run(chosen)
        add_events(chosen, log([(1, 0, 1, 1)]).slice(0, 0), first)
        version = build_sequences.run(chosen, since_last=True)
    assert rows_of(chosen, version) == rows_of(chosen, base)
    assert version.manifest["watermark"] == base.manifest["watermark"]
    assert base.manifest["watermark"] == f"{np.datetime64(17_003 * DAY_MS, 'ms')}+00:00"


def test_an_import_that_found_nothing_new_changes_no_row(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    first = add_events(chosen, log([(1, 0, 1, 1), (2, 3, 1, 1)]), None)
    with in_this_process():
        base = build_sequences.run(chosen)
        table = Table(chosen.path("tables", "events"))
        table.begin("v1")
        table.publish("v1", {"schema_hash": chosen.event_schema.hash(), "num_rows": 2}, first.data_files())
        version = build_sequences.run(chosen, since_last=True)
    assert rows_of(chosen, version) == rows_of(chosen, base)


def test_a_late_event_at_the_time_of_the_cut_is_not_counted_below_events_that_it_belongs_after(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=6, late_allowance_hours=1e6)
    first = add_events(chosen, log([(1, 0, item, 1) for item in range(1, 10)]), None)
    with in_this_process():
        build_sequences.run(chosen)
        add_events(chosen, log([(1, 0, 8, 0), (1, 1, 1, 1), (1, 1, 2, 1)]), first)
        version = build_sequences.run(chosen, since_last=True)
    assert version.manifest["num_too_late"] == 1
    assert rows_of(chosen, version) == naive_sequences(
        log([*((1, 0, item, 1) for item in range(1, 10)), (1, 1, 1, 1), (1, 1, 2, 1)]), BASKETS, 6, STRIDE
    )


def test_news_that_all_come_too_late_leave_the_users_of_their_bucket_readable(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=6, num_buckets=1, merge_share=0.5, late_allowance_hours=1e6)
    first = add_events(chosen, log([(1, day, 1, 1) for day in range(12)] + [(2, 11, 1, 1)]), None)
    with in_this_process():
        base = build_sequences.run(chosen)
        add_events(chosen, log([(1, 3, 1, 1)]), first)
        version = build_sequences.run(chosen, since_last=True)
    assert version.manifest["num_too_late"] == 1
    assert rows_of(chosen, version) == rows_of(chosen, base)


def test_an_increment_without_news_after_a_skipped_file_publishes_nothing(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000, skip_unreadable_files=True)
    first = add_events(chosen, log([(1, 0, 1, 1)]), None)
    torn = Path(add_events(chosen, log([(2, 0, 1, 1)]), first).files()[1])
    torn.write_bytes(torn.read_bytes()[:-9])
    with in_this_process():
        base = build_sequences.run(chosen)
        assert build_sequences.run(chosen, since_last=True).id == base.id


def test_a_restored_file_is_not_taken_for_one_that_was_read(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000, skip_unreadable_files=True)
    first = add_events(chosen, log([(1, 0, 1, 1)]), None)
    second = add_events(chosen, log([(2, 0, 1, 1)]), first)
    torn = Path(second.files()[1])
    content = torn.read_bytes()
    torn.write_bytes(content[:-9])
    with in_this_process():
        assert build_sequences.run(chosen).manifest["num_users"] == 1
        torn.write_bytes(content)
        with pytest.raises(UserError, match="skipped by the last sequences, readable now"):
            build_sequences.run(chosen, since_last=True)
        assert build_sequences.run(chosen).manifest["num_users"] == 2


def test_an_increment_on_a_version_that_lost_files_is_refused(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    first = add_events(chosen, log([(1, 0, 1, 1)]), None)
    with in_this_process():
        base = build_sequences.run(chosen)
        os.remove(base.files()[0])
        add_events(chosen, log([(2, 3, 1, 1)]), first)
        with pytest.raises(UserError, match="files of this version are gone: run without --since-last"):
            build_sequences.run(chosen, since_last=True)


def test_what_killed_builds_left_is_removed_and_records_of_lost_files_are_not_believed(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    add_events(chosen, log([(1, 0, 1, 1), (2, 0, 1, 1), (3, 0, 1, 1)]), None)
    with in_this_process():
        version = build_sequences.run(chosen)
        expected = rows_of(chosen, version)
        stale = Path(version.path) / "_scratch"
        stale.mkdir()  # as a kill right after publishing leaves it, with a record for each bucket
        assert build_sequences.run(chosen).id == version.id
        assert not stale.exists()
        stale.mkdir()
        for file in version.data_files():
            record = {"bucket": 0, "files": [vars(file)], "num_users": 0, "num_events": 0, "num_events_kept": 0}
            bucket = int(file.path[7:11])
            (stale / f"bucket-{bucket:04d}.json").write_text(
                json.dumps({**record, "bucket": bucket, "num_too_late": 0})
            )
        os.remove(version.files()[0])
        (Path(version.path).parent / "killed" / "_scratch").mkdir(parents=True)
        assert rows_of(chosen, build_sequences.run(chosen)) == expected
        add_events(chosen, log([(1, 1, 1, 1)]), Table(chosen.path("tables", "events")).current())
        build_sequences.run(chosen, since_last=True)
    assert not (Path(version.path).parent / "killed").exists()


def test_times_that_are_no_timestamps_are_refused_not_guessed(tmp_path: Path) -> None:
    chosen = settings_of(tmp_path, keep_events=1000)
    events = log([(1, 0, 1, 1)])
    seconds = events["event_ts"].cast(pa.int64())
    add_events(chosen, events.set_column(1, "event_ts", seconds), None)
    with in_this_process(), pytest.raises(UserError, match="column 'event_ts' is int64, the schema says timestamp"):
        build_sequences.run(chosen)
