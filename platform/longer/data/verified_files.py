"""Tables to verify, published or plain folders of Parquet, and their files read row group by row group. No Ray."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.findings import BucketReport
from longer.data.tables import open_version
from longer.errors import StorageError, UserError, one_line
from longer.files import arrow_filesystem, checksum, filesystem
from longer.schema import EventSchema
from longer.storage import DataFile, Table, Version

_LAYOUT = re.compile(r"^(?:split=(?P<split>\w+)/|(?P<news>news)/)?bucket=(?P<bucket>\d+)/[^/]+\.parquet$")
_SPLIT = re.compile(r"^split=(\w+)/")


@dataclass(frozen=True)
class TableFile:
    """A file of a table: `name` is its path in the table, `listed` the manifest's record of it, if there is a manifest."""

    path: str
    name: str
    bucket: int
    split: str | None
    is_news: bool
    listed: DataFile | None


@dataclass(frozen=True)
class Source:
    """A table to verify: a published version, or a plain folder (`version` is None).

    One that is in no buckets is all bucket 0.
    """

    path: str
    version: Version | None
    files: tuple[TableFile, ...]
    is_bucketed: bool = True

    def bucket(self, bucket: int) -> tuple[TableFile, ...]:
        return tuple(file for file in self.files if file.bucket == bucket)

    @property
    def title(self) -> str:
        return f"{self.path}, version {self.version.id}" if self.version else self.path


def open_source(path: str, schema: EventSchema, version_id: str | None, job: str) -> Source:
    """The pinned or served version of a table, or all Parquet files of a plain folder: in the layout of a table, or in no buckets.

    Raises UserError if there is neither, or files lie under bucket=NNNN/ or split=NAME/bucket=NNNN/ and one elsewhere.
    """
    if version_id or Table(path).current():
        version = open_version(path, schema, version_id, job)
        paths = version.files()
        listed: list[DataFile] = version.data_files()
        return Source(path, version, tuple(_table_file(p, f.path, f, path) for p, f in zip(paths, listed, strict=True)))
    fs, bare = filesystem(path)
    names = sorted(name.removeprefix(bare).lstrip("/") for name in fs.find(bare) if name.endswith(".parquet"))
    if not names:
        raise UserError(
            f"{path}: no published table and no Parquet files: run `python -m {job}`, or name another folder"
        )
    paths = [f"{path.rstrip('/')}/{name}" for name in names]
    if not any("bucket=" in name for name in names):
        splits = [_SPLIT.match(name) for name in names]
        loose = (
            TableFile(p, name, 0, split and split[1], False, None)
            for p, name, split in zip(paths, names, splits, strict=True)
        )
        return Source(path, None, tuple(loose), is_bucketed=False)
    return Source(path, None, tuple(_table_file(p, name, None, path) for p, name in zip(paths, names, strict=True)))


def _table_file(path: str, name: str, listed: DataFile | None, table: str) -> TableFile:
    place = _LAYOUT.match(name)
    if place is None:
        raise UserError(
            f"{table}: {name}: a table's files lie under bucket=NNNN/ or split=NAME/bucket=NNNN/: move this one"
        )
    return TableFile(path, name, int(place["bucket"]), place["split"], bool(place["news"]), listed)


def row_groups(
    file: TableFile, wanted: pa.Schema, report: BucketReport
) -> Iterator[tuple[pq.ParquetFile, int, pa.Table]]:
    """The open file, and each of its row groups with its rows; damage inside is a finding and ends the file."""
    arrow, bare = arrow_filesystem(file.path)
    try:
        parquet = pq.ParquetFile(arrow.open_input_file(bare), pre_buffer=True)
        missing = [name for name in wanted.names if name not in parquet.schema_arrow.names]
        if missing:
            raise UserError(f"{file.path}: no column {missing[0]!r}: give the table all columns of event_schema")
        for row_group in range(parquet.num_row_groups):
            yield parquet, row_group, read_rows(parquet, row_group, wanted, file.path)
    except (pa.ArrowException, OSError) as error:
        _raise_if_unreachable(error, file)
        report.found.add_one("unreadable", f"{file.path}: {one_line(error)}")


def read_rows(parquet: pq.ParquetFile, row_group: int, wanted: pa.Schema, path: str) -> pa.Table:
    """The wanted columns of a row group."""
    rows = parquet.read_row_group(row_group, columns=wanted.names).select(wanted.names)
    try:
        return rows.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: not the columns of event_schema ({one_line(error)}): convert them") from None


def is_there(file: TableFile, report: BucketReport) -> bool:
    """Whether the file exists; against the manifest's record, its size and checksum too."""
    try:
        if file.listed is None:
            return True
        fs, bare = filesystem(file.path)
        num_bytes = fs.info(bare)["size"]
        if num_bytes != file.listed.num_bytes:
            report.found.add_one("file_size", f"{file.path}: {num_bytes} bytes, not {file.listed.num_bytes}")
        elif checksum(file.path) != file.listed.sha256:
            report.found.add_one("checksum", file.path)
        report.checked["files"] += 1
        report.checked["bytes"] += num_bytes
    except FileNotFoundError:
        report.found.add_one("missing_file", file.path)
        return False
    except OSError as error:
        _raise_if_unreachable(error, file)
        raise
    return True


def _raise_if_unreachable(error: Exception, file: TableFile) -> None:
    """A file that cannot be reached proves nothing: what the operating system or the store says has an error number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(
            f"{file.path}: cannot be read ({one_line(error)}): check the storage, then run again"
        ) from None
