"""Parquet files of tables, local or S3: opened, or read whole or in part, with an error that names one that is damaged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from longer.errors import StorageError, one_line
from longer.files import arrow_filesystem, open_input, read_bytes

_MOST_GAP_BYTES = 1 << 16
"""Between row groups that are one request: less than a request costs."""


def open_parquet(path: str, num_bytes: int, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A file of a sequence or request table; pre-buffering makes neighbouring ranges one read, which S3 needs."""
    with naming(path):
        return pq.ParquetFile(open_input(path, num_bytes), metadata=metadata, pre_buffer=True)


def open_encoded(path: str, num_bytes: int, encoded: Sequence[str]) -> pq.ParquetFile:
    """The same; those of the columns `encoded` that are lists of strings come as lists of dictionaries.

    Of a category only the few texts there are become strings. To be read one row group at a time: Arrow does not join lists of
    several dictionaries as it reads them.
    """
    metadata = open_parquet(path, num_bytes).metadata
    with naming(path):
        source, names = open_input(path, num_bytes), _string_lists(metadata, encoded)
        return pq.ParquetFile(source, metadata=metadata, read_dictionary=names, pre_buffer=True)


def read_columns(path: str, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a whole file, or all."""
    filesystem, bare = arrow_filesystem(path)
    with naming(path):
        file = pq.ParquetFile(filesystem.open_input_file(bare), pre_buffer=True)
        return file.read(columns, use_threads=False)  # a Ray task has one core


def read_encoded(path: str, columns: Sequence[str], encoded: Sequence[str]) -> pa.Table:
    """Some columns of a whole file, encoded as `open_encoded` does."""
    data = pa.BufferReader(read_bytes(path))  # on S3 one request
    with naming(path):
        metadata = pq.read_metadata(data)
        return _row_groups(data, metadata, range(metadata.num_row_groups), columns, encoded)


def read_row_groups(
    path: str, num_bytes: int, metadata: pq.FileMetaData, row_groups: Sequence[int], columns: Sequence[str]
) -> pa.Table:
    """Some columns of some row groups, all lists of strings encoded; on S3 a request for each run of neighbours, all at once."""
    source = open_input(path, num_bytes, _spans(metadata, row_groups))
    with naming(path):
        return _row_groups(source, metadata, row_groups, columns, columns)


def _row_groups(
    source: pa.NativeFile,
    metadata: pq.FileMetaData,
    row_groups: Sequence[int],
    columns: Sequence[str],
    encoded: Sequence[str],
) -> pa.Table:
    file = pq.ParquetFile(source, metadata=metadata, read_dictionary=_string_lists(metadata, encoded))
    parts = [file.read_row_group(group, list(columns), use_threads=False) for group in row_groups]
    return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(list(columns))


def _string_lists(metadata: pq.FileMetaData, names: Sequence[str]) -> list[str]:
    """Those of the columns that are lists of strings, as `read_dictionary` names them."""
    columns = [metadata.schema.column(c) for c in range(metadata.num_columns)]
    lists = [column.path for column in columns if column.logical_type.type == "STRING" and "." in column.path]
    return [path for path in lists if path.split(".")[0] in names]


def _spans(metadata: pq.FileMetaData, row_groups: Sequence[int]) -> list[tuple[int, int]]:
    """First byte of each run of neighbouring row groups, and the one after its last."""
    spans = list[tuple[int, int]]()
    for group in row_groups:
        columns = [metadata.row_group(group).column(c) for c in range(metadata.num_columns)]
        begins = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        begin, end = min(begins), max(b + c.total_compressed_size for b, c in zip(begins, columns, strict=True))
        if spans and begin - spans[-1][1] <= _MOST_GAP_BYTES:
            begin = spans.pop()[0]
        spans.append((begin, end))
    return spans


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of reading `path`, in its footer or its pages, become one that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # the last of bytes outside what was read ahead
        raise StorageError(f"{path}: not readable ({one_line(error)}): remove its version and build it again") from None
