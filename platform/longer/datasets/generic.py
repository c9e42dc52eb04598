"""Importer of any log in Parquet or delimited text: a file, a folder or a glob, with its columns mapped to the schema's names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from longer.datasets.readers import COMPRESSED, PARQUET, is_parquet, parquet_batches, text_batches
from longer.datasets.source import Part, log_parts, require_parts
from longer.table_settings import TimeUnit

_ENDINGS = (*PARQUET, *(kind + codec for kind in (".csv", ".tsv") for codec in ("", *COMPRESSED)))
_PATTERNS = ["*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in ending) for ending in _ENDINGS]


@dataclass(frozen=True)
class Generic:
    """A log whose files name their columns; a name of the schema that is not mapped is the file's own.

    A name that is mapped to None is no column of the log: it is null in every row, and the action 'event'.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    TIME_UNIT: TimeUnit = "ms"
    PROVENANCE: str = "A log of your own."
    section: str = "import_events"

    def locate(self, source: str) -> list[Part]:
        parts = log_parts(source, _PATTERNS, section=self.section)
        return require_parts(source, parts, ".parquet, .csv or .tsv files (.gz, .bz2, .zst and .lz4 too)", self.section)

    def read(self, part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
        mapped = {name: self.columns.get(name, name) for name in names}
        columns = {name: column for name, column in mapped.items() if column is not None}
        if is_parquet(part.path):
            batches = parquet_batches(part.path, columns, part.start, part.stop)
        else:
            delimiter = "\t" if ".tsv" in part.path.rpartition("/")[2].lower() else ","
            batches = text_batches(part.path, columns, delimiter=delimiter, start=part.start, stop=part.stop)
        for batch in batches:
            rows = len(batch)
            for name in ("action", *mapped):
                if name not in batch.column_names:
                    values = pa.repeat("event", rows) if name == "action" else pa.nulls(rows, pa.string())
                    batch = batch.append_column(name, values)
            yield batch
