"""A table that grew by increments equals one built at once, row for row, whatever came late, twice or at the same time."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from longer.data import ray_sequences
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.schema import EventSchema
from longer.storage import DataFile, Table, Version, checked_output
from tests.data.logs import BASKETS, DAY_MS, STRINGS, log, naive_sequences

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
        pq.write_table(events, sink)
    files: list[DataFile] = [*(last.data_files() if last else []), sink.data_file]
    num_rows = len(events) + (last.manifest["num_rows"] if last else 0)
    return table.publish(version_id, {"schema_hash": settings.event_schema.hash(), "num_rows": num_rows}, files)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Runs the tasks here: what they do is tested on Ray elsewhere, and hypothesis asks for many builds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_sequences, "each", lambda function, arguments, *_: [function(a) for a in arguments])
        patch.setattr(build_sequences, "build_items", lambda sequences: pa.table({"item_id": pa.array([], pa.int64())}))
        yield


def rows_of(settings: Settings, version: Version) -> list[dict[str, Any]]:
    table = SequenceTable(settings.path("tables", "sequences"), settings.event_schema, version.id)
    rows = [row for bucket in table.buckets for row in table.rows(bucket).to_pylist()]
    users = pa.array([row["user_id"] for row in rows], table.schema.id_types[0])
    assert table.get(users).first_index_B.tolist() == [row["first_index"] for row in rows], "a point read differs"
    return sorted(rows, key=lambda row: row["user_id"])


def accepted(batches: list[pa.Table], settings: Settings) -> pa.Table:
    """Which events a table that is rewritten by every increment holds, by the rule for late ones, one event at a time."""
    schema, keep = settings.event_schema, settings.sequences.keep_events
    allowance_ms = settings.sequences.late_allowance_hours * 3_600_000
    taken = batches[0]
    watermark = max(taken["event_ts"].cast(pa.int64()).to_pylist())
    for batch in batches[1:]:
        times = batch["event_ts"].cast(pa.int64()).to_pylist()
        cut_until = {
            row["user_id"]: row["prev_event_ts"]
            for row in naive_sequences(taken, schema, keep, 2)
            if row["first_index"] > 0
        }
        in_time = [ts >= watermark - allowance_ms for ts in times]
        placed = [
            user not in cut_until or at > cut_until[user]
            for user, at in zip(batch["user_id"].to_pylist(), batch["event_ts"].to_pylist(), strict=True)
        ]
        watermark = max([watermark, *(ts for ts, fit in zip(times, in_time, strict=True) if fit)])
        taken = pa.concat_tables([taken, batch.filter(pa.array(np.array(in_time) & np.array(placed)))])
    return taken


@st.composite
def arriving(draw: st.DrawFn, schema: EventSchema) -> list[pa.Table]:
    """A log in batches: most events arrive with their day, some days later, some twice."""
    event = st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(1, 5), st.integers(0, 2))
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
    if (
        merge_share and keep < 1000
    ):  # what a cut history still places then depends on when its bucket was last rewritten
        batches = [
            log([(user, day, item, 1) for user, item in pairs], schema)
            for day, pairs in enumerate(
                data.draw(
                    st.lists(
                        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=12),
                        min_size=1,
                        max_size=6,
                    )
                )
            )
        ]
    else:
        batches = data.draw(arriving(schema))
    root = tmp_path_factory.getbasetemp() / f"increments-{schema.user_id}"
    shutil.rmtree(root, ignore_errors=True)
    chosen = settings_of(root, schema, keep_events=keep, merge_share=merge_share)
    events = None
    with in_this_process():
        for batch in batches:
            events = add_events(chosen, batch, events)
            version = build_sequences.run(chosen, since_last=True)
    expected = accepted(batches, chosen)
    assert rows_of(chosen, version) == naive_sequences(expected, schema, keep, 2)
    assert version.manifest["num_too_late"] == sum(len(batch) for batch in batches) - len(expected)
    kept = naive_sequences(expected, schema, keep, 2)
    assert version.manifest["num_events"] == len(expected)
    assert version.manifest["num_events_kept"] == sum(len(row["item_id"]) for row in kept)
    assert version.manifest["num_users"] == len(kept)


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
