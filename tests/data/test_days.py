"""Each UTC day of a part is one file, and no row is lost or moved, however little fits into memory."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.data import days
from longer.data.days import DayFiles
from tests.data.logs import BASKETS, DAY_MS, log, logs


@settings(max_examples=60, deadline=None)
@given(logs(BASKETS), st.integers(1, 10), st.sampled_from([1, 600, 1 << 20]))
def test_each_utc_day_is_one_file_with_its_rows_in_the_order_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, events: pa.Table, batch_rows: int, run_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("events")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(days, "_RUN_BYTES", run_bytes)
        writer = DayFiles(str(folder), "0")
        for start in range(0, len(events), batch_rows):
            writer.add(events.slice(start, batch_rows))
        files = writer.finish()
    day_of = [time // DAY_MS for time in events["event_ts"].cast(pa.int64()).to_pylist()]
    assert len(files) == len(set(day_of))
    for file, day in zip(files, sorted(set(day_of)), strict=True):
        written = pq.read_table(folder / file.path, partitioning=None)
        assert written.schema.equals(BASKETS.events_arrow())
        assert written.equals(events.filter(pa.array([of == day for of in day_of])))


def test_files_are_named_by_day(tmp_path: Path) -> None:
    writer = DayFiles(str(tmp_path), "0")
    writer.add(log([(1, day % 3, item, 1) for day, item in enumerate(range(1, 20))]))
    assert [file.path for file in writer.finish()] == [f"dt=2016-07-{18 + day}/part-0.parquet" for day in range(3)]


def test_no_rows_are_no_files(tmp_path: Path) -> None:
    writer = DayFiles(str(tmp_path), "0")
    writer.add(BASKETS.events_arrow().empty_table())
    assert writer.finish() == []
