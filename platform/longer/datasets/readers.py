"""Parquet and delimited text files, or stretches of them, in bounded batches; every error names its file."""

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from longer.errors import UserError, one_line
from longer.files import arrow_filesystem

LINE = "line"
"""Column of a batch with the text of a line that could not be taken apart, null elsewhere."""

_BATCH_ROWS = 1 << 17
_READ_BYTES = 8 << 20
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
COMPRESSED = tuple(_CODECS)
"""Endings of compressed text."""
PARQUET = (".parquet", ".pq")
_NULLS = ["", "NULL", "null", "\\N"]


class FileError(UserError):
    """A file that cannot be read, or is not of the layout it should have."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class ColumnError(FileError):
    """A file without a column that is asked for, as the other files of its log may be."""


def is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET)


def boundaries(path: str, num_bytes: int, stretch_bytes: int) -> list[int]:
    """Where to cut a file into stretches of about `stretch_bytes`: row groups of Parquet, bytes of text; none where it cannot be.

    They depend on the file only. Text is cut at bytes and read from the next line on.
    """
    if num_bytes <= stretch_bytes or path.lower().endswith(COMPRESSED):
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
    with naming(path), filesystem.open_input_stream(bare, compression=_codec(path)) as stream:
        first = stream.read(1 << 16).partition(b"\n")[0].decode("utf-8-sig").rstrip("\r")
    if "\r" in first:
        raise FileError(path, "its lines end in carriage returns alone: end them in newlines")
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

    `columns` as in `parquet_batches`. Each line is one row, whatever its quotes: one that ends inside a quoted field, or has
    another number of fields, has a `reason`, its text in `line`, and nulls.
    """
    names = text_header(path, delimiter) if header is None else list(header)
    if not names:
        return
    require_columns(path, names, columns)
    has_header = header is None and start == 0
    with naming(path):
        for block in _line_blocks(path, start, stop):
            lines = block.partition(b"\n")[2] if has_header else block
            has_header = False
            if lines:
                yield _parsed(lines, names, columns, delimiter)


def require_columns(path: str, names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raises FileError if a column that is wanted is not in the file, or is there twice."""
    for name, column in columns.items():
        if names.count(column) != 1:
            problem = f"no column {column!r}" if column not in names else f"two columns are named {column!r}"
            there = ", ".join(names)
            if len(names) == 1 and not is_parquet(path):
                there += ", cut at commas, or in a .tsv file at tabs"
            remedy = f"map {name!r} in the import's columns"
            if name not in ("user_id", "item_id", "event_ts"):
                remedy += f", to null ('{name}: null') if the log has no such feature"
            raise ColumnError(path, f"{problem} (it has {there}): {remedy}")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of reading `path` become a FileError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        kind = "Parquet" if is_parquet(path) else "text"
        raise FileError(path, f"not a readable {kind} file ({one_line(error)})") from None


def _parsed(lines: bytes, names: list[str], columns: Mapping[str, str], delimiter: str) -> pa.Table:
    """Whole lines as a batch, those that cannot be taken apart below the others."""
    lines, torn = _split_torn(lines, delimiter)
    unfit: list[tuple[str | None, str]] = [(line, "a quote is not closed in the line") for line in torn]

    def keep(row: pacsv.InvalidRow) -> str:
        unfit.append((row.text, f"not {len(names)} fields"))
        return "skip"

    wanted = list(dict.fromkeys(columns.values()))
    if lines:
        table = pacsv.read_csv(
            pa.BufferReader(lines),
            pacsv.ReadOptions(column_names=names, block_size=len(lines), use_threads=False),
            pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=keep),
            pacsv.ConvertOptions(
                column_types={name: pa.string() for name in wanted},
                include_columns=wanted,
                null_values=_NULLS,
                strings_can_be_null=True,
            ),
        )
    else:
        table = pa.table({name: pa.array([], pa.string()) for name in wanted})
    return _with_unfit(pa.table({name: table[column] for name, column in columns.items()}), unfit)


def _split_torn(lines: bytes, delimiter: str) -> tuple[bytes, list[str]]:
    """The lines that are one record each, and the text of the others, which Arrow would join with their neighbours or cut."""
    if b'"' not in lines and lines.count(b"\r") == lines.count(b"\r\n"):
        return lines, []
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
    offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int32))
    line_N = pa.Array.from_buffers(pa.binary(), len(ends), [None, offsets, pa.py_buffer(lines)])
    end = re.escape(delimiter)
    plain = rf"[^{end}\r\n]*"
    field = rf'(?:"(?:[^"\r\n]|"")*"(?:[^"{end}\r\n]{plain})?|[^"{end}\r\n]{plain}|)'
    is_record_N = pc.match_substring_regex(line_N, rf"^{field}(?:{end}{field})*\r?\n$")
    torn_N = line_N.filter(pc.invert(is_record_N))
    if not len(torn_N):
        return lines, []
    _, offsets, values = line_N.filter(is_record_N).buffers()
    num_bytes = int(np.frombuffer(offsets, np.int32)[len(ends) - len(torn_N)])
    whole = values.slice(0, num_bytes).to_pybytes() if num_bytes else b""
    return whole, [line.decode(errors="replace").rstrip("\r\n") for line in torn_N.to_pylist()]


def _with_unfit(batch: pa.Table, unfit: list[tuple[str | None, str]]) -> pa.Table:
    """The batch with the lines that could not be taken apart, and the reasons, below it."""
    if not unfit:
        return batch
    nulls = pa.nulls(len(batch), pa.string())
    batch = batch.append_column(LINE, nulls).append_column("reason", nulls)
    texts, reasons = zip(*unfit, strict=True)
    lines = {LINE: pa.array(texts, pa.string()), "reason": pa.array(reasons, pa.string())}
    rest = {name: pa.nulls(len(unfit), pa.string()) for name in batch.column_names if name not in lines}
    return pa.concat_tables([batch, pa.table({**rest, **lines}).select(batch.column_names)])


def _codec(path: str) -> str | None:
    return next((codec for ending, codec in _CODECS.items() if path.lower().endswith(ending)), None)


def _line_blocks(path: str, start: int, stop: int | None) -> Iterator[bytes]:
    """The lines that begin in bytes `start` to `stop`, whole, some megabytes at a time; the last one has its newline too."""
    filesystem, bare = arrow_filesystem(path)
    if start == 0 and stop is None:
        num_bytes, file = sys.maxsize, filesystem.open_input_stream(bare, compression=_codec(path))
    else:
        file = filesystem.open_input_file(bare)
        end = file.size() if stop is None else _line_start(file, stop)
        first = _line_start(file, start)
        num_bytes = end - first
        file.seek(first)
    rest = b""
    with file:
        while block := file.read(min(_READ_BYTES, num_bytes)):
            num_bytes -= len(block)
            lines, newline, tail = block.rpartition(b"\n")
            if newline:
                yield b"".join((rest, lines, newline))
                rest = tail
            elif len(rest) < _READ_BYTES:
                rest += tail
            else:
                raise FileError(path, f"a line is longer than {_READ_BYTES} bytes: is this a text file?")
    if rest:
        yield rest + b"\n"


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
