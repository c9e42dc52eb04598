"""A log to the events table: each part is read, checked and written in bounded memory, a few parts a Ray Data task.

What a part becomes depends on the part only: `dt=DAY/part-<hash of its name>-<stretch>.parquet`. So the table is the same whatever
the number of tasks, and a task that is killed and tried again writes the same files again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.days import DayFiles
from longer.data.events import check_rows
from longer.data.import_report import REPORT_SCHEMA, PartReport
from longer.datasets import source_of
from longer.datasets.readers import LINE, ColumnError, FileError
from longer.datasets.source import Part
from longer.errors import UserError
from longer.files import remove_tree
from longer.progress import track
from longer.schema import EventSchema
from longer.storage import DataFile, checked_output
from longer.table_settings import ImportSettings

_TASK_BYTES = 64 << 20
"""Bytes of parts that are worth a task, which takes a second where a worker has to start first."""
_TASK_PARTS = 32
"""Parts that are worth a task however small they are: a store takes a tenth of a second to open each."""
_FEW_TASKS = 32
_FEW_PARTS = 32
_MANY_ROWS = 100
"""Rows of which one must parse: in fewer, all may be bad ones."""


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
        return pa.Table.from_pylist(reports, schema=REPORT_SCHEMA)

    def import_part(self, part: Part) -> PartReport:
        """Reads one part. One that cannot be read leaves no files: it is reported if so told, or else raises UserError."""
        name = f"{hashlib.sha256(part.name.encode()).hexdigest()[:16]}-{part.number}"
        report = PartReport(part.content_id, part.name, part.number)
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
                instead = "if other files have it," if isinstance(error, ColumnError) else "restore the file, or"
                raise UserError(
                    f"{error}; {instead} leave this one out with --{self.settings.section}.skip_unreadable_files"
                ) from None
            return PartReport(part.content_id, part.name, part.number, problem=str(error))
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


def num_tasks(parts: Sequence[Part]) -> int:
    """Tasks of an import, whatever is up now: a cluster that starts from no CPUs grows by the tasks that wait."""
    by_size = sum(part.num_bytes for part in parts) // _TASK_BYTES
    return min(len(parts), max(_FEW_TASKS, len(parts) // _TASK_PARTS, by_size))


def write_events(parts: Sequence[Part], importer: PartImporter) -> list[PartReport]:
    """Reports of all parts; their files are below the importer's paths when this returns. A small log is imported right here."""
    stage = f"import {importer.settings.rows}"
    if fits_one_task(parts):
        return [importer.import_part(part) for part in track(parts, len(parts), stage, "parts")]
    import ray.data

    items = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=num_tasks(parts))
    imported = items.map_batches(importer, batch_format="pyarrow", batch_size=None)
    rows = track(imported.iter_rows(), len(parts), stage, "parts")
    return sorted((PartReport.from_row(row) for row in rows), key=lambda report: (report.name, report.number))


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
    """A column of which nothing parses in many rows is the wrong column, not a few bad rows."""
    num_rows = report.num_rows + report.reasons.total()
    for reason, count in report.reasons.items():
        name = reason.partition(" is not ")[0]
        if count == num_rows >= _MANY_ROWS and name in schema.events_arrow().names:
            raise FileError(part.path, f"{reason} in any of {num_rows} rows: change event_schema or convert the column")
