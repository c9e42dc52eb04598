"""The log cut by hash bucket: one file a block of the log, one self-contained segment a bucket in it. No Ray; local or S3.

Reading a bucket takes one ranged read a block, so neither pass holds more than one block or one bucket, however long the log is.
A segment is one or two Arrow IPC streams: the bucket's events, and what is known of older ones that were cut (`Older`).

E events of a block or of a bucket.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import offsets_of
from longer.data.columns import single_array
from longer.data.sequences import KeepRule, Older, trim_events
from longer.errors import UserError, one_line
from longer.files import arrow_filesystem, make_parents
from longer.hashing import bucket_of, stable_keys
from longer.schema import TIMESTAMP, EventSchema

_BLOCK_ROWS = 1 << 20
_MOST_BLOCKS = 2048  # beyond it blocks grow, so that segments do not become too small to be worth a read
_LARGEST_DICTIONARY = 256  # of a column that a segment stores as codes: each segment repeats its dictionary
_NUM_READ_THREADS = 16
_READS_AHEAD = 64
_TRIM_ROWS = 4 << 20
_LEAST = b"least"

Piece = tuple[str, int, int]
"""A file of the log, and which of its row groups: from, and up to but not including."""

Segment = tuple[str, int, int]
"""A block's file, and which of its bytes: from, and up to but not including."""


def plan_blocks(files: dict[str, list[int]]) -> list[list[Piece]]:
    """Cuts the log into blocks of about as many rows each, given the row counts of each file's row groups.

    A pure function of the log, so that a rerun finds the blocks that an interrupted run left.
    """
    rows = np.array([n for counts in files.values() for n in counts], np.int64)
    block_rows = max(_BLOCK_ROWS, -(-int(rows.sum()) // _MOST_BLOCKS))
    number = (np.cumsum(rows) - rows) // block_rows
    owner = [(path, group) for path, counts in files.items() for group in range(len(counts))]
    blocks = []
    for block in np.unique(number):
        pieces: dict[str, list[int]] = {}
        for place in np.flatnonzero(number == block):
            path, group = owner[place]
            pieces.setdefault(path, []).append(group)
        blocks.append([(path, groups[0], groups[-1] + 1) for path, groups in pieces.items()])
    return blocks


def look_at(path: str, schema: EventSchema) -> list[int] | str:
    """The rows of a file's row groups, or why it cannot be used."""
    filesystem, bare = arrow_filesystem(path)
    try:
        with filesystem.open_input_file(bare) as opened:
            file = pq.ParquetFile(opened)
            there, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        return f"not a readable Parquet file ({one_line(error)})"
    for field in schema.events_arrow():
        if field.name not in there.names:
            return f"no column {field.name!r}"
        if not _fits(there.field(field.name).type, field.type):
            return f"column {field.name!r} is {there.field(field.name).type}, the schema says {field.type}"
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def look_inside(path: str, schema: EventSchema) -> list[int] | str:
    """The same, of a file that was read to its end."""
    rows = look_at(path, schema)
    try:
        for group in range(len(rows) if isinstance(rows, list) else 0):
            _read_piece((path, group, group + 1), schema)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return rows


def _fits(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column can be read as what the schema says without a guess."""
    value = given.value_type if pa.types.is_dictionary(given) else given
    if pa.types.is_timestamp(wanted):
        return pa.types.is_timestamp(value)
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(value)
    if pa.types.is_string(wanted):
        return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)
    return pa.types.is_floating(value) or pa.types.is_integer(value) or pa.types.is_null(value)


def read_block(pieces: list[Piece], schema: EventSchema) -> pa.Table:
    """The events of a block in the schema's columns; strings of few distinct values stay coded. UserError names a bad file."""
    events = pa.concat_tables([_read_piece(piece, schema) for piece in pieces]).combine_chunks()
    for place, field in enumerate(schema.events_arrow()):
        column = single_array(events[field.name])
        if pa.types.is_dictionary(column.type) and len(column.dictionary) > _LARGEST_DICTIONARY:
            events = events.set_column(place, field.name, column.cast(field.type))
    return events


def write_segments(path: str, events: pa.Table, schema: EventSchema, num_buckets: int, rule: KeepRule) -> list[int]:
    """Writes a block's segments, its users' histories trimmed by the rule.

    Returns where each bucket's segment starts in the file, and where the last ends: [num_buckets + 1].
    """
    key_E = stable_keys(events["user_id"])
    kept_E, older = trim_events(events, key_E, schema, rule)
    bucket_E = bucket_of(key_E if kept_E is None else key_E[kept_E], num_buckets).astype(np.uint16)
    by_bucket_E = np.argsort(bucket_E, kind="stable")  # 16 bits sort by radix
    bounds = offsets_of(np.bincount(bucket_E, minlength=num_buckets))
    rows = by_bucket_E if kept_E is None else kept_E[by_bucket_E]
    events = _narrowed(events).take(pa.array(rows)).combine_chunks()
    bucket_of_older = bucket_of(stable_keys(older.user_id), num_buckets)
    filesystem, bare = arrow_filesystem(path)
    make_parents(path)
    starts = [0]
    with filesystem.open_output_stream(bare, buffer_size=8 << 20) as sink:
        for bucket, (begin, end) in enumerate(pairwise(bounds)):
            if begin < end:
                _write_stream(sink, events.slice(begin, end - begin))
                if (of_bucket := bucket_of_older == bucket).any():
                    _write_stream(sink, _older_table(older, of_bucket))
            starts.append(sink.tell())
    return starts


def read_segments(segments: list[Segment], schema: EventSchema, rule: KeepRule) -> tuple[pa.Table, Older]:
    """The events of one bucket that can still matter, and what was cut, from its segment in each block.

    Trimmed again as they add up, so that a user who fills many blocks takes no more memory than one who fills a few.
    """
    parts, older = list[pa.Table](), [Older.none(schema)]
    num_rows, trim_at = 0, _TRIM_ROWS
    for events, cut in _read_all([segment for segment in segments if segment[1] < segment[2]]):
        parts.append(events)
        older += (
            [Older(single_array(cut["user_id"]), *(cut[n].to_numpy() for n in ("num_events", "last_ts")))]
            if cut
            else []
        )
        num_rows += len(events)
        if num_rows > trim_at:
            together = _joined(parts, schema)
            kept_E, more = trim_events(together, stable_keys(together["user_id"]), schema, rule)
            parts = [together if kept_E is None else together.take(pa.array(kept_E))]
            older.append(more)
            num_rows = len(parts[0])
            trim_at = max(_TRIM_ROWS, 2 * num_rows)
    return _joined(parts, schema), Older.concatenate(older)


def _read_all(segments: list[Segment]) -> Iterator[tuple[pa.Table, pa.Table | None]]:
    """The segments in order, from S3 some ahead."""
    if not segments[0][0].startswith("s3://"):  # a local read takes less than handing it to a thread
        yield from map(_read_segment, segments)
        return
    with ThreadPoolExecutor(_NUM_READ_THREADS) as pool:
        for start in range(0, len(segments), _READS_AHEAD):
            yield from pool.map(_read_segment, segments[start : start + _READS_AHEAD])


def _narrowed(events: pa.Table) -> pa.Table:
    """The same values in fewer bytes: 32 bits where integers and times span no more, as distances from the least of them.

    Half the bytes, and unlike compression at no cost: a block is soon written and soon read.
    """
    columns, fields = [], []
    for field in events.schema:
        column, metadata = single_array(events[field.name]), None
        if pa.types.is_dictionary(field.type):
            column = pa.DictionaryArray.from_arrays(column.indices.cast(pa.int16()), column.dictionary)
        elif _is_integral(field.type) and len(column) and not column.null_count:
            values = column.cast(pa.int64())
            least, most = pc.min_max(values).as_py().values()
            if most - least < 1 << 32:
                column, metadata = pc.subtract(values, least).cast(pa.uint32()), {_LEAST: str(least)}
        columns.append(column)
        fields.append(pa.field(field.name, column.type, metadata=metadata))
    return pa.table(columns, pa.schema(fields))


def _joined(parts: list[pa.Table], schema: EventSchema) -> pa.Table:
    return pa.table({field.name: _joined_column(parts, field) for field in schema.events_arrow()})


def _joined_column(parts: list[pa.Table], field: pa.Field) -> pa.Array:
    """A column of all parts, as wide as it was; it stays coded if it is in all of them."""
    chunks = [single_array(part[field.name]) for part in parts]
    leasts = [(part.schema.field(field.name).metadata or {}).get(_LEAST) for part in parts]
    if _is_integral(field.type) and None not in leasts:
        distances = np.concatenate([chunk.to_numpy() for chunk in chunks])
        values = np.repeat(np.array(leasts, np.int64), [len(chunk) for chunk in chunks])
        values += distances
        return pa.array(values).cast(field.type)
    if all(pa.types.is_dictionary(chunk.type) for chunk in chunks):
        wide = [pa.DictionaryArray.from_arrays(c.indices.cast(pa.int32()), c.dictionary) for c in chunks]
        return pa.chunked_array(wide).combine_chunks()  # many blocks' values together may need more than 16 bits
    return pa.concat_arrays([_widened(chunk, least, field.type) for chunk, least in zip(chunks, leasts, strict=True)])


def _widened(chunk: pa.Array, least: bytes | None, wanted: pa.DataType) -> pa.Array:
    return (chunk if least is None else pc.add(chunk.cast(pa.int64()), int(least))).cast(wanted)


def _is_integral(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_timestamp(kind)


def _read_segment(segment: Segment) -> tuple[pa.Table, pa.Table | None]:
    path, start, end = segment
    filesystem, bare = arrow_filesystem(path)
    with filesystem.open_input_file(bare) as file:
        stream = pa.BufferReader(file.read_at(end - start, start))
    events = pa.ipc.open_stream(stream).read_all()
    return events, pa.ipc.open_stream(stream).read_all() if stream.tell() < end - start else None


def _with_times(events: pa.Table) -> pa.Table:
    """Times in milliseconds; finer ones are cut, not refused."""
    times = events["event_ts"].cast(TIMESTAMP, safe=False)
    return events.set_column(events.column_names.index("event_ts"), "event_ts", times)


def write_table(path: str, table: pa.Table) -> None:
    """A scratch file of one table."""
    filesystem, bare = arrow_filesystem(path)
    make_parents(path)
    with filesystem.open_output_stream(bare) as sink:
        _write_stream(sink, table)


def read_table(path: str) -> pa.Table:
    filesystem, bare = arrow_filesystem(path)
    with filesystem.open_input_stream(bare) as source:
        return pa.ipc.open_stream(source).read_all()


def _write_stream(sink: pa.NativeFile, table: pa.Table) -> None:
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def _older_table(older: Older, rows: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "user_id": older.user_id.filter(pa.array(rows)),
            "num_events": older.num_events[rows],
            "last_ts": older.last_ts[rows],
        }
    )


def _read_piece(piece: Piece, schema: EventSchema) -> pa.Table:
    path, first, end = piece
    wanted = schema.events_arrow()
    filesystem, bare = arrow_filesystem(path)
    strings = [field.name for field in wanted if pa.types.is_string(field.type)]
    coded = pa.schema(
        [pa.field(f.name, pa.dictionary(pa.int32(), f.type) if f.name in strings else f.type) for f in wanted]
    )
    try:
        file = pq.ParquetFile(filesystem.open_input_file(bare), read_dictionary=strings, pre_buffer=True)
        events = file.read_row_groups(list(range(first, end)), columns=wanted.names, use_threads=False)
        events = _with_times(events.select(wanted.names)).cast(coded)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged inside ({one_line(error)}): restore the file or import the log again"
        ) from None
    for name in ("user_id", "item_id", "event_ts"):
        if events[name].null_count:
            raise UserError(
                f"{path}: {name} is null in {events[name].null_count} rows: import the log with jobs.import_events"
            )
    return events
