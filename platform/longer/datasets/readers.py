"""Parquet and delimited text files, or stretches of them, in bounded batches; every error names its file."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from longer.errors import UserError, one_line
from longer.storage import arrow_filesystem

LINE = "line"
"""Column of a batch with the text of a line that has another number of fields, null elsewhere."""

_BATCH_ROWS = 1 << 17
_READ_BYTES = 8 << 20
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_PARQUET = (".parquet", ".pq")
_NULLS = ["", "NULL", "null", "\\N"]


class FileError(UserError):
    """A file that cannot be read, or is not of the layout it should have."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


def is_parquet(path: str) -> bool:
    return path.endswith(_PARQUET)


def boundaries(path: str, num_bytes: int, stretch_bytes: int) -> list[int]:
    """Where to cut a file into stretches of about `stretch_bytes`: row groups of Parquet, bytes of text; none where it cannot be.

    They depend on the file only. Text is cut at bytes and read from the next line on.
    """
    if num_bytes <= stretch_bytes or path.endswith(_COMPRESSED):
        return []
    if not is_parquet(path):
        return list(range(stretch_bytes, num_bytes, stretch_bytes))
    filesystem, bare = arrow_filesystem(path)
    try:
        with filesystem.open_input_file(bare) as file:
            metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return []  # the task that reads it says what is wrong
    edges, filled = [], 0
    for group in range(metadata.num_row_groups - 1):
        columns = metadata.row_group(group)
        filled += sum(columns.column(place).total_compressed_size for place in range(columns.num_columns))
        if filled >= stretch_bytes:
            edges.append(group + 1)
            filled = 0
    return edges


def parquet_batches(
    path: str, columns: Mapping[str, str], start: int = 0, stop: int | None = None
) -> Iterator[pa.Table]:
    """Row groups `start` to `stop` in batches: the columns of the file named by `columns`' values, renamed to its keys."""
    filesystem, bare = arrow_filesystem(path)
    with naming(path), filesystem.open_input_file(bare) as raw:
        file = pq.ParquetFile(raw, buffer_size=_READ_BYTES)
        require_columns(path, file.schema_arrow.names, columns)
        groups = range(start, file.num_row_groups if stop is None else stop)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns.values())):
            yield pa.table({name: batch.column(column) for name, column in columns.items()})


def text_header(path: str, delimiter: str) -> list[str]:
    """Column names in the first line of a text file; none if the file is empty."""
    filesystem, bare = arrow_filesystem(path)
    with naming(path), filesystem.open_input_stream(bare) as stream:
        first = stream.read(1 << 16).partition(b"\n")[0].decode("utf-8-sig").rstrip("\r")
    return next(csv.reader([first], delimiter=delimiter)) if first else []


def text_batches(
    path: str,
    columns: Mapping[str, str],
    header: Sequence[str] | None = None,
    delimiter: str = ",",
    start: int = 0,
    stop: int | None = None,
) -> Iterator[pa.Table]:
    """Lines that begin in bytes `start` to `stop` as batches of strings; `header` names the columns of a file without one.

    `columns` as in `parquet_batches`. A line with another number of fields has a `reason`, its text in `line`, and nulls.
    """
    names = text_header(path, delimiter) if header is None else list(header)
    if not names:
        return
    require_columns(path, names, columns)
    unfit: list[str | None] = []

    def keep(row: pacsv.InvalidRow) -> str:
        unfit.append(row.text)
        return "skip"

    filesystem, bare = arrow_filesystem(path)
    reading = pacsv.ReadOptions(
        column_names=names, skip_rows=int(header is None and start == 0), block_size=_READ_BYTES, use_threads=False
    )
    parsing = pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=keep)
    with naming(path), _open_lines(filesystem, bare, start, stop) as lines:
        for table in _parsed(lines, list(dict.fromkeys(columns.values())), reading, parsing):
            batch = pa.table({name: table[column] for name, column in columns.items()})
            yield _with_unfit(batch, unfit, len(names))
            unfit.clear()
        if unfit:
            empty = pa.table({name: pa.array([], pa.string()) for name in columns})
            yield _with_unfit(empty, unfit, len(names))


def require_columns(path: str, names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raises FileError if a column that is wanted is not in the file, or is there twice."""
    for column in columns.values():
        if names.count(column) != 1:
            problem = f"no column {column!r}" if column not in names else f"two columns are named {column!r}"
            raise FileError(
                path, f"{problem} (it has {', '.join(names)}): drop it from event_schema, or map or restore it"
            )


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of reading `path` become a FileError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if is_parquet(path) else "text"
        raise FileError(path, f"not a readable {kind} file ({one_line(error)})") from None


def _parsed(
    lines: pa.NativeFile, wanted: list[str], reading: pacsv.ReadOptions, parsing: pacsv.ParseOptions
) -> Iterator[pa.Table]:
    as_strings = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in wanted},
        include_columns=wanted,
        null_values=_NULLS,
        strings_can_be_null=True,
    )
    try:
        reader = pacsv.open_csv(lines, reading, parsing, as_strings)
    except pa.ArrowInvalid as error:
        if str(error).startswith(("Empty CSV file", "Could not skip initial")):  # only a header, without a line end
            return
        raise
    for batch in reader:
        yield pa.Table.from_batches([batch])


def _with_unfit(batch: pa.Table, unfit: list[str | None], num_fields: int) -> pa.Table:
    """The batch with the lines that could not be taken apart below it."""
    if not unfit:
        return batch
    nulls = pa.nulls(len(batch), pa.string())
    batch = batch.append_column(LINE, nulls).append_column("reason", nulls)
    lines = {LINE: pa.array(unfit, pa.string()), "reason": pa.repeat(f"not {num_fields} fields", len(unfit))}
    rest = {name: pa.nulls(len(unfit), pa.string()) for name in batch.column_names if name not in lines}
    return pa.concat_tables([batch, pa.table({**rest, **lines}).select(batch.column_names)])


def _open_lines(filesystem: FileSystem, path: str, start: int, stop: int | None) -> pa.NativeFile:
    if start == 0 and stop is None:
        return filesystem.open_input_stream(path)  # which decompresses by the name's ending
    raw = filesystem.open_input_file(path)
    last = raw.size() if stop is None else _line_start(raw, stop)
    raw.seek(_line_start(raw, start))
    return pa.PythonFile(_Stretch(raw, last), mode="r")


class _Stretch(io.RawIOBase):
    """A file up to a byte."""

    def __init__(self, file: pa.NativeFile, stop: int) -> None:
        self._file, self._stop = file, stop

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._stop - self._file.tell()
        return self._file.read(left if size < 0 else min(size, left))


def _line_start(file: pa.NativeFile, offset: int) -> int:
    """The first line that begins at `offset` or later."""
    if offset == 0:
        return 0
    position = offset - 1
    file.seek(position)
    while block := file.read(1 << 16):
        if (found := block.find(b"\n")) >= 0:
            return position + found + 1
        position += len(block)
    return position
