"""Events: the row checks that every importer uses."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.data.columns import single_array
from longer.data.parse import as_times, as_type
from longer.errors import UserError
from longer.schema import TIMESTAMP, EventSchema
from longer.table_settings import TimeUnit

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KINDS = {pa.int64(): "an integer", pa.string(): "text or an integer", pa.float32(): "a number"}


def check_rows(
    raw: pa.Table, schema: EventSchema, now: datetime, time_unit: TimeUnit = "ms"
) -> tuple[pa.Table, pa.Table]:
    """Splits a log into events of the schema and quarantined rows: the raw row and the first `reason` it is unfit for.

    `raw` has the schema's column names and may have more; a row that has a `reason` already keeps it. Reasons are a null,
    unparsable, empty or negative key, a time that is missing, unparsable, before 1970, after `now` or in another unit than
    `time_unit`, and a feature that does not parse. A missing column or one of another type raises UserError.
    """
    wanted = schema.events_arrow()
    missing = [name for name in wanted.names if name not in raw.column_names]
    if missing:
        raise UserError(
            f"the importer gives no column {missing[0]!r} (it gives {', '.join(raw.column_names)}): drop it from event_schema, or "
            "read the log with import_events.dataset=generic, which can map columns"
        )
    given = {name: single_array(raw[name]) for name in wanted.names}
    columns = {name: as_type(given[name], wanted.field(name)) for name in wanted.names if name != "event_ts"}
    time_ms, misfits = as_times(given["event_ts"], time_unit, int(now.timestamp() * 1000))
    columns["event_ts"] = time_ms.view(TIMESTAMP)
    keys = ["user_id", "item_id", *([schema.group_id] if schema.group_id else [])]
    unparsed = {
        f"{name} is not {_KINDS[wanted.field(name).type]}": pc.and_(given[name].is_valid(), columns[name].is_null())
        for name in columns
        if name != "event_ts" and columns[name].null_count > given[name].null_count
    }
    unfit = {
        **{f"null {name}": given[name].is_null() for name in keys if given[name].null_count},
        **unparsed,
        **{f"empty {name}": pc.equal(columns[name], "") for name in keys if columns[name].type == pa.string()},
        **{f"negative {name}": pc.less(columns[name], 0) for name in keys[:2] if columns[name].type == pa.int64()},
        "missing or unparsable event_ts": time_ms.is_null(),
        **{reason: pa.array(rows) for reason, rows in misfits.items()},
        "event_ts before 1970": pc.less(time_ms, 0),
        "event_ts in the future": pc.greater(time_ms, int(now.timestamp() * 1000)),
    }
    reasons = _first_reasons(unfit, len(raw))
    if "reason" in raw.column_names:
        reasons = pc.coalesce(single_array(raw["reason"]), reasons)
        raw = raw.drop_columns(["reason"])
    events = pa.table([columns[name] for name in wanted.names], schema=wanted)
    if reasons.null_count == len(raw):
        return events, raw.slice(0, 0).append_column("reason", pa.array([], pa.string()))
    good = reasons.is_null()
    bad = pc.invert(good)
    return events.filter(good), raw.filter(bad).append_column("reason", reasons.filter(bad))


def iso_time(time_ms: int) -> str:
    """A time as manifests write it."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def iso_ms(iso: str) -> int:
    """Milliseconds of a time that manifests have."""
    return epoch_ms(datetime.fromisoformat(iso))


def epoch_ms(moment: datetime) -> int:
    """Milliseconds since 1970 UTC of a moment with a time zone, rounded down: exact, as seconds in a float are not."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _first_reasons(unfit: dict[str, pa.Array], num_rows: int) -> pa.Array:
    """The first reason that applies to each row, null where none does."""
    first = np.full(num_rows, -1, np.int16)
    for place, rows in reversed(list(enumerate(unfit.values()))):
        first[pc.fill_null(rows, False).to_numpy(zero_copy_only=False)] = place
    return pa.array(list(unfit), pa.string()).take(pa.array(first, mask=first < 0))
