"""A log to the events table: each part is read, checked and written in bounded memory, a few parts a Ray Data task.

What a part becomes depends on the part only: `dt=DAY/part-<content>-<stretch>.parquet`. So the table is the same whatever the
number of tasks, and a task that is killed and tried again writes the same files again.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.config import ImportSettings
from longer.data.days import DayFiles
from longer.data.events import check_rows
from longer.datasets import source_of
from longer.datasets.readers import LINE, FileError
from longer.datasets.source import Part
from longer.errors import UserError
from longer.progress import track
from longer.schema import EventSchema
from longer.storage import DataFile, checked_output, remove_tree

_TASK_BYTES = 64 << 20
_FEW_PARTS = 32
_FILES = pa.list_(pa.struct([("path", pa.string()), ("num_bytes", pa.int64()), ("sha256", pa.string())]))
_REPORT = pa.schema(
    [
        *(("content_id", pa.string()), ("name", pa.string()), ("problem", pa.string())),
        *(("num_rows", pa.int64()), ("first_ts", pa.int64()), ("last_ts", pa.int64())),
        ("reasons", pa.list_(pa.struct([("reason", pa.string()), ("count", pa.int64())]))),
        *(("events", _FILES), ("quarantine", _FILES)),
    ]
)


@dataclass
class PartReport:
    """What became of a part: events, unfit rows by reason, the files written; or the problem for which it was skipped."""

    content_id: str
    name: str
    problem: str | None = None
    num_rows: int = 0
    first_ts: int | None = None
    last_ts: int | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    events: list[DataFile] = field(default_factory=list)
    quarantine: list[DataFile] = field(default_factory=list)

    def count(self, good: pa.Table, bad: pa.Table) -> None:
        """Adds the rows of one batch."""
        self.num_rows += len(good)
        self.reasons.update(bad["reason"].to_pylist())
        if len(good):
            times = pc.min_max(good["event_ts"].cast(pa.int64())).as_py()
            self.first_ts = times["min"] if self.first_ts is None else min(self.first_ts, times["min"])
            self.last_ts = times["max"] if self.last_ts is None else max(self.last_ts, times["max"])

    def to_row(self) -> dict[str, Any]:
        """As a row of a Ray Data block."""
        reasons = [{"reason": reason, "count": count} for reason, count in self.reasons.items()]
        files = {name: [vars(file) for file in getattr(self, name)] for name in ("events", "quarantine")}
        return {**vars(self), **files, "reasons": reasons}

    @staticmethod
    def from_row(row: dict[str, Any]) -> "PartReport":
        reasons = Counter({pair["reason"]: pair["count"] for pair in row["reasons"]})
        files = {name: [DataFile(**file) for file in row[name]] for name in ("events", "quarantine")}
        return PartReport(**{**row, **files, "reasons": reasons})


@dataclass(frozen=True)
class PartImporter:
    """Writes the events and the quarantined rows of parts below the two version paths."""

    settings: ImportSettings
    schema: EventSchema
    now: datetime
    events_path: str
    quarantine_path: str

    def __call__(self, parts: pa.Table) -> pa.Table:
        reports = [self.import_part(_part(row)).to_row() for row in parts.to_pylist()]
        return pa.Table.from_pylist(reports, schema=_REPORT)

    def import_part(self, part: Part) -> PartReport:
        """Reads one part. One that cannot be read leaves no files: it is reported if so told, or else raises UserError."""
        name = f"{hashlib.sha256(part.content_id.encode()).hexdigest()[:16]}-{part.number}"
        report = PartReport(part.content_id, part.name)
        days = DayFiles(self.events_path, name)
        try:
            with _UnfitFile(self.quarantine_path, f"part-{name}.parquet") as unfit:
                for good, bad in self._checked(part):
                    report.count(good, bad)
                    days.add(good)
                    unfit.add(_as_text(bad, self.schema, part.path))
            report.quarantine = unfit.files
            _check_types(part, report, self.schema)
        except FileError as error:
            remove_tree(f"{self.quarantine_path}/part-{name}.parquet")
            if not self.settings.skip_unreadable_files:
                raise UserError(
                    f"{error}; restore the file, or leave it out with --import_events.skip_unreadable_files"
                ) from None
            return PartReport(part.content_id, part.name, problem=str(error))
        report.events = days.finish()
        return report

    def _checked(self, part: Part) -> Iterator[tuple[pa.Table, pa.Table]]:
        source = source_of(self.settings)
        for batch in source.read(part, self.schema.events_arrow().names):
            try:
                yield check_rows(batch, self.schema, self.now, source.TIME_UNIT)
            except UserError as error:
                raise FileError(part.path, str(error)) from None


def fits_one_task(parts: Sequence[Part]) -> bool:
    """Whether a Ray would take longer to start than these parts to import."""
    return len(parts) <= _FEW_PARTS and sum(part.num_bytes for part in parts) <= _TASK_BYTES


def write_events(parts: Sequence[Part], importer: PartImporter) -> list[PartReport]:
    """Reports of all parts; their files are below the importer's paths when this returns. A small log is imported right here."""
    if fits_one_task(parts):
        return [importer.import_part(part) for part in track(parts, len(parts), "import events", "parts")]
    import ray
    import ray.data

    num_cpus = int(ray.cluster_resources()["CPU"])
    num_blocks = min(len(parts), max(num_cpus, sum(part.num_bytes for part in parts) // _TASK_BYTES))
    items = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=num_blocks)
    imported = items.map_batches(importer, batch_format="pyarrow", batch_size=None)
    rows = track(imported.iter_rows(), len(parts), "import events", "parts")
    return sorted((PartReport.from_row(row) for row in rows), key=lambda report: report.name)


def remove_files(report: PartReport, events_path: str, quarantine_path: str) -> None:
    """Removes what a part has written."""
    for path, files in ((events_path, report.events), (quarantine_path, report.quarantine)):
        for file in files:
            remove_tree(f"{path}/{file.path}")


class _UnfitFile(AbstractContextManager):
    """The quarantine file of one part, which is there only if a row is unfit."""

    def __init__(self, version_path: str, name: str) -> None:
        self.files: list[DataFile] = []
        self._path, self._name = version_path, name
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def add(self, rows: pa.Table) -> None:
        if len(rows) and self._writer is None:
            sink = self._open.enter_context(checked_output(self._path, self._name))
            self._open.callback(lambda: self.files.append(sink.data_file))
            self._writer = self._open.enter_context(pq.ParquetWriter(sink, rows.schema, compression="zstd"))
        if self._writer:
            self._writer.write_table(rows)

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _part(row: dict[str, Any]) -> Part:
    return Part(**{**row, "joined": tuple(_part(file) for file in row["joined"])})


def _as_text(unfit: pa.Table, schema: EventSchema, path: str) -> pa.Table:
    """Raw values as text, so that all quarantine files have one schema whatever the log's types."""
    columns = {name: unfit[name].cast(pa.string()) for name in schema.events_arrow().names}
    line = unfit[LINE] if LINE in unfit.column_names else pa.nulls(len(unfit), pa.string())
    source_file = pa.repeat(pa.scalar(path), len(unfit))
    return pa.table({**columns, LINE: line, "reason": unfit["reason"], "source_file": source_file})


def _check_types(part: Part, report: PartReport, schema: EventSchema) -> None:
    """A column of which nothing parses is the wrong column, not a few bad rows."""
    for reason, count in report.reasons.items():
        name = reason.partition(" is not ")[0]
        if count == report.num_rows + report.reasons.total() and name in schema.events_arrow().names:
            raise FileError(
                part.path,
                f"in all {count} rows {reason}, as event_schema says: change the schema or convert the column",
            )
