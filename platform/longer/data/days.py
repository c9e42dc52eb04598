"""The layout of the events table, `dt=YYYY-MM-DD/part-NAME.parquet`: one file a day of what one part of a log holds.

Logs are often sorted by user, so a part may touch every day. Rows are gathered in runs of bounded size, each sorted by day and
kept in a memory-mapped file on the local disk; at the end each day's stretch of every run becomes one file.
"""

import os
import tempfile
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longer.arrays import MS_PER_DAY
from longer.storage import DataFile, checked_output

_RUN_BYTES = 128 << 20
"""Arrow bytes gathered before they are sorted and put aside: about a third of the memory that a part takes."""


@dataclass(frozen=True)
class _Run:
    """Rows sorted by day, and where each day's begin and end."""

    rows: pa.Table
    spans: dict[np.datetime64, tuple[int, int]]

    def of_day(self, day: np.datetime64) -> pa.Table:
        start, end = self.spans.get(day, (0, 0))
        return self.rows.slice(start, end - start)


@dataclass
class DayFiles:
    """Writes the events that it is given, one zstd Parquet file a UTC day; rows of a day keep the order of the log."""

    version_path: str
    name: str
    _gathered: list[pa.Table] = field(default_factory=list)
    _num_bytes: int = 0
    _runs: list[_Run] = field(default_factory=list)

    def add(self, events: pa.Table) -> None:
        """Takes some rows; none is in the table before `finish`."""
        if not len(events):
            return
        self._gathered.append(events)
        self._num_bytes += events.nbytes
        if self._num_bytes >= _RUN_BYTES:
            self._runs.append(_put_aside(self._take_run()))

    def finish(self) -> list[DataFile]:
        """Writes all files, oldest day first."""
        if self._gathered:
            self._runs.append(self._take_run())
        return [self._write(day) for day in sorted({day for run in self._runs for day in run.spans})]

    def _take_run(self) -> _Run:
        events = pa.concat_tables(self._gathered)
        self._gathered, self._num_bytes = [], 0
        day = (events["event_ts"].cast(pa.int64()).to_numpy() // MS_PER_DAY).astype("datetime64[D]")
        order = np.argsort(day, kind="stable")
        days, starts = np.unique(day[order], return_index=True)
        spans = zip(starts.tolist(), [*starts.tolist()[1:], len(order)], strict=True)
        return _Run(events.take(pa.array(order)).combine_chunks(), dict(zip(days, spans, strict=True)))

    def _write(self, day: np.datetime64) -> DataFile:
        with checked_output(self.version_path, f"dt={day}/part-{self.name}.parquet") as sink:
            pq.write_table(pa.concat_tables([run.of_day(day) for run in self._runs]), sink, compression="zstd")
        return sink.data_file


def _put_aside(run: _Run) -> _Run:
    """The same run with its rows in a mapped file, which has no name any more: it is gone with the process."""
    handle, path = tempfile.mkstemp(suffix=".arrow")
    os.close(handle)
    try:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, run.rows.schema) as writer:
            writer.write_table(run.rows)
        return _Run(pa.ipc.open_file(pa.memory_map(path)).read_all(), run.spans)
    finally:
        os.unlink(path)
