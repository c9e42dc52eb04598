"""Columns of any log as the types of the event schema. A value that does not convert becomes null here, never a guess."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Int64
from longer.errors import UserError
from longer.table_settings import TimeUnit

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_YEAR_1990_S = 631_152_000
YEAR_1990_MS = _YEAR_1990_S * 1000
"""Nothing that is logged is older: a time before it is in another unit."""
_LARGEST_INT64 = "9223372036854775807"
_MOST_EXACT_FLOAT = 2.0**53


def as_type(column: pa.Array, field: pa.Field) -> pa.Array:
    """The column as int64, string or float32, null where a value is not one. Raises UserError for a type that never is."""
    convert = {pa.int64(): _as_integers, pa.string(): _as_text, pa.float32(): _as_numbers}[field.type]
    converted = convert(_plain(column))
    if converted is None:
        raise UserError(
            f"column {field.name!r} is {column.type}, event_schema says {field.type}: change the schema or convert the column"
        )
    return converted


def as_times(column: pa.Array, unit: TimeUnit, now_ms: int) -> tuple[pa.Array, dict[str, npt.NDArray[np.bool_]]]:
    """UTC milliseconds, null where a time is missing or unparsable, and by reason the numbers that must not be taken as they are.

    Timestamps and ISO 8601 text without a zone are UTC. Numbers, and text that is a number, are in `unit` since 1970. One that
    makes sense (1990 to now) in s, ms, us, ns or as YYYYMMDD, but not in `unit`, is misfit; so is one of 1990 or more that is
    before 1990 in `unit`: it counts minutes, days or years, or is of the future in another unit. Relative units have no misfits.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_timestamp(kind):
        return _from_timestamps(column), {}
    if pa.types.is_date(kind):
        return column.cast(pa.timestamp("ms")).view(pa.int64()), {}
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        return _from_numbers(column, unit, now_ms)
    if pa.types.is_string(kind):
        return _from_text(column, unit, now_ms)
    raise UserError(f"column 'event_ts' is {kind}: give a timestamp, an ISO 8601 string or a number of {unit}")


def _plain(column: pa.Array) -> pa.Array:
    """Dictionaries and the other string types as strings."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        kind = pa.string()
    return column if column.type == kind else column.cast(kind)


def _as_integers(column: pa.Array) -> pa.Array | None:
    kind = column.type
    if pa.types.is_string(kind):
        return _parsed_integers(column)
    if pa.types.is_floating(kind):  # pandas makes floats of integers with gaps
        values = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        exact = (np.floor(values) == values) & (np.abs(values) < _MOST_EXACT_FLOAT)
        return pa.array(np.where(exact, values, 0).astype(np.int64), mask=~exact)
    if kind == pa.uint64():
        fits = pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64()))
        return pc.if_else(fits, column, None).cast(pa.int64())
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.int64())
    return None


def _parsed_integers(text: pa.Array) -> pa.Array:
    try:
        return _all_integers(text)
    except pa.ArrowInvalid:  # some value is not one: find which
        text = pc.replace_substring_regex(pc.utf8_trim_whitespace(text), r"\.0+$", "")
        short = pc.match_substring_regex(text, r"^-?\d{1,18}$")
        long = pc.and_(pc.match_substring_regex(text, r"^\d{19}$"), pc.less_equal(text, _LARGEST_INT64))
        return pc.if_else(pc.or_(short, long), text, None).cast(pa.int64())


def _all_integers(text: pa.Array) -> pa.Array:
    """Raises ArrowInvalid if a value is not an integer in decimal digits; Arrow's own cast takes 0x10 for 16."""
    integers = text.cast(pa.int64())
    if any(pc.any(pc.match_substring(text, sign)).as_py() for sign in "xX"):
        raise pa.ArrowInvalid("hexadecimal")
    return integers


def _as_numbers(column: pa.Array) -> pa.Array | None:
    return _parsed_numbers(column, pa.float32())


def _parsed_numbers(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    if pa.types.is_string(column.type):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            column = pc.utf8_trim_whitespace(column)
            is_number = pc.match_substring_regex(column, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
            return pc.if_else(is_number, column, None).cast(kind)
    numeric = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return column.cast(kind, safe=False) if any(test(column.type) for test in numeric) else None


def _as_text(column: pa.Array) -> pa.Array | None:
    kind = column.type
    if pa.types.is_floating(kind):  # the same id must not be '7' on one day and '7.0' on another
        return column.cast(pa.string()) if (whole := _as_integers(column)) is None else whole.cast(pa.string())
    textual = (pa.types.is_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    return column.cast(pa.string()) if any(test(kind) for test in textual) else None


def _from_text(column: pa.Array, unit: TimeUnit, now_ms: int) -> tuple[pa.Array, dict[str, npt.NDArray[np.bool_]]]:
    try:
        return _from_numbers(_all_integers(column), unit, now_ms)
    except pa.ArrowInvalid:
        column = pc.utf8_trim_whitespace(column)
    is_number = pc.match_substring_regex(column, r"^-?\d+(\.\d+)?$")
    numbers, misfits = _from_numbers(_parsed_numbers(pc.if_else(is_number, column, None), pa.float64()), unit, now_ms)
    rest = pc.if_else(is_number, None, column)
    parsed = pd.to_datetime(rest.to_pandas(), errors="coerce", utc=True, format="ISO8601")
    return pc.coalesce(numbers, _from_timestamps(pa.Array.from_pandas(parsed))), misfits


def _from_timestamps(column: pa.Array) -> pa.Array:
    """Milliseconds, rounded down also before 1970."""
    values = pc.fill_null(column.view(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return pa.array(_milliseconds(values, column.type.unit), mask=column.is_null().to_numpy(zero_copy_only=False))


def _from_numbers(column: pa.Array, unit: TimeUnit, now_ms: int) -> tuple[pa.Array, dict[str, npt.NDArray[np.bool_]]]:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.float64)
    else:
        column = _as_integers(column)
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    time_ms = _milliseconds(values, unit.removeprefix("relative_"))
    misfits = {} if unit.startswith("relative_") else _misfits(values, time_ms, unit, now_ms)
    return pa.array(time_ms, mask=column.is_null().to_numpy(zero_copy_only=False)), misfits


def _misfits(values: npt.NDArray, time_ms: Int64, unit: TimeUnit, now_ms: int) -> dict[str, npt.NDArray[np.bool_]]:
    """By reason, the numbers that are not times in `unit`."""
    misfits = {
        f"event_ts fits {other}, not {unit}": (values >= _YEAR_1990_S * per_s) & (values <= now_ms // 1000 * per_s)
        for other, per_s in _PER_SECOND.items()
        if other != unit
    }
    today = int(pd.Timestamp(now_ms, unit="ms").strftime("%Y%m%d"))
    misfits[f"event_ts fits YYYYMMDD, not {unit}"] = (values >= 19900101) & (values <= today)
    is_early = (values >= 1990) & (time_ms < YEAR_1990_MS)
    return {**misfits, f"event_ts before 1990 in {unit}": is_early & ~np.any(list(misfits.values()), axis=0)}


def _milliseconds(values: npt.NDArray, unit: str) -> Int64:
    if unit == "s":
        far = 2**53 // 1000
        return np.floor(np.clip(values, -far, far) * 1000).astype(np.int64)  # beyond the clip it is out of range anyway
    if values.dtype == np.float64:
        values = np.clip(np.floor(values), -(2.0**62), 2.0**62).astype(np.int64)
    return values // (_PER_SECOND[unit] // 1000)
