"""Events: row checks that any importer uses, and the events table's layout, `dt=YYYY-MM-DD/part-0.parquet`."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.errors import UserError
from longer.progress import track
from longer.schema import TIMESTAMP, EventSchema
from longer.storage import DataFile, checked_output

_TYPE_TESTS = {
    pa.int64(): pa.types.is_integer,
    pa.string(): lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_dictionary(t),
    pa.float32(): lambda t: pa.types.is_floating(t) or pa.types.is_integer(t) or pa.types.is_boolean(t),
}


def check_rows(raw: pa.Table, schema: EventSchema, now: datetime) -> tuple[pa.Table, pa.Table]:
    """Splits a log into events of the schema and quarantined rows: the raw row and the first `reason` it is unfit for.

    `raw` has the schema's column names and may have more. Reasons are a null key, a missing or unparsable time, a time before
    1970 and a time after `now`. A missing column or one of another type raises UserError.
    """
    wanted = schema.events_arrow()
    missing = [name for name in wanted.names if name not in raw.column_names]
    if missing:
        raise UserError(
            f"event_schema: the log has no column {missing[0]!r} (it has {', '.join(raw.column_names)}): "
            "drop it from event_schema or map it in the importer"
        )
    columns = {name: _cast(raw[name], wanted.field(name)) for name in wanted.names if name != "event_ts"}
    columns["event_ts"] = _parse_times(raw["event_ts"])
    keys = ["user_id", "item_id", *([schema.group_id] if schema.group_id else [])]
    time_ms = columns["event_ts"].cast(pa.int64())
    unfit = {
        **{f"null {name}": columns[name].is_null() for name in keys},
        "missing or unparsable event_ts": time_ms.is_null(),
        "event_ts before 1970": pc.less(time_ms, 0),
        "event_ts in the future": pc.greater(time_ms, int(now.timestamp() * 1000)),
    }
    reason = np.full(len(raw), "", dtype=object)
    for text, rows in reversed(unfit.items()):  # the first that applies is written last
        reason[pc.fill_null(rows, False).to_numpy()] = text
    good = pa.array(reason == "", pa.bool_())
    bad = pc.invert(good)
    events = pa.table([columns[name] for name in wanted.names], schema=wanted).filter(good)
    return events, raw.filter(bad).append_column("reason", pa.array(reason, pa.string()).filter(bad))


def write_events(events: pa.Table, version_path: str) -> list[DataFile]:
    """Writes one zstd Parquet file a UTC day, rows in the order of the log."""
    day = (events["event_ts"].cast(pa.int64()).to_numpy() // 86_400_000).astype("datetime64[D]")
    order = np.argsort(day, kind="stable")
    days, starts = np.unique(day[order], return_index=True)
    by_day = events.take(pa.array(order)).combine_chunks()
    ends = [*starts[1:], len(order)]
    files = []
    for date, start, end in track(zip(days, starts, ends, strict=True), len(days), "write events", "days"):
        with checked_output(version_path, f"dt={date}/part-0.parquet") as sink:
            pq.write_table(by_day.slice(start, end - start), sink, compression="zstd")
        files.append(sink.data_file)
    return files


def iso_time(time_ms: int) -> str:
    """A time as manifests write it."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if not (pa.types.is_null(column.type) or _TYPE_TESTS[field.type](column.type)):
        raise UserError(
            f"event_schema: column {field.name!r} of the log is {column.type}, the schema says {field.type}: "
            "change the schema or convert the column"
        )
    return column.cast(field.type, safe=not pa.types.is_floating(field.type))


def _parse_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Timestamps, ISO 8601 strings or int64 milliseconds as UTC timestamps; times without a zone are UTC; null if unparsable."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return column.cast(TIMESTAMP, safe=False)
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.int64()).cast(TIMESTAMP)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        parsed = pd.to_datetime(column.to_pandas(), errors="coerce", utc=True, format="ISO8601")
        return pa.chunked_array([pa.Array.from_pandas(parsed).cast(TIMESTAMP, safe=False)])
    raise UserError(
        f"event_schema: column 'event_ts' of the log is {kind}: give a timestamp, an ISO 8601 string or milliseconds"
    )
