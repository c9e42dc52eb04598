"""Arrow list columns to flat NumPy arrays and back: the one place that knows how stored values become keys and floats.

B histories, E events in all of them, R requests, or rows of any table with lists, C candidates in all of them.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import NO_EVENT_TS, Candidates, Float32, Histories, Int64, offsets_of
from longer.data.batches import Requests
from longer.hashing import stable_keys
from longer.schema import EventSchema

Rows = TypeVar("Rows", pa.RecordBatch, pa.Array)


def single_array(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array, without a copy where it has one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def flat_list(column: pa.ChunkedArray) -> tuple[Int64, pa.Array]:
    """Offsets from 0 and values of a list column without nulls."""
    lists = single_array(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.flatten()


def numbers(values: pa.Array) -> Float32:
    """Float32 values; null and NaN, which would poison every sum, are 0."""
    floats = pc.fill_null(values.cast(pa.float32()), 0.0).to_numpy(zero_copy_only=False)
    return np.nan_to_num(floats, nan=0.0)


def milliseconds(times: pa.Array, missing: int = 0) -> Int64:
    return pc.fill_null(times.cast(pa.int64()), missing).to_numpy(zero_copy_only=False)


def histories_of(table: pa.Table, schema: EventSchema) -> Histories:
    """The rows of a sequence table (`sequences_arrow`) as arrays."""
    offsets_B1, event_ts = flat_list(table["event_ts"])
    return Histories(
        user_key_B=stable_keys(table["user_id"]),
        offsets_B1=offsets_B1,
        first_index_B=table["first_index"].to_numpy(),
        prev_event_ts_B=milliseconds(single_array(table["prev_event_ts"]), missing=int(NO_EVENT_TS)),
        event_ts_E=milliseconds(event_ts),
        features=_features(
            table, ["item_id", "action", *schema.of_history("categorical")], schema.of_history("numeric")
        ),
    )


def requests_of(table: pa.Table, schema: EventSchema, with_labels: bool = True) -> Requests:
    """The rows of a request table (`requests_arrow`) as arrays; the tasks' columns need not be there without labels."""
    offsets_R1, item_id_C = flat_list(table["item_id"])
    length_R = np.diff(offsets_R1)
    of_items = _features(
        table, ["item_id", *schema.features_of("item", "categorical")], schema.features_of("item", "numeric")
    )
    of_requests = feature_arrays(schema, {name: single_array(table[name]) for name in schema.features_of("request")})
    return Requests(
        request_id_R=table["request_id"].to_numpy(),
        user_id_R=single_array(table["user_id"]),
        user_key_R=stable_keys(table["user_id"]),
        request_ts_R=milliseconds(single_array(table["request_ts"])),
        history_end_R=table["history_end"].to_numpy(),
        candidates=Candidates(
            offsets_R1, of_items | {name: np.repeat(values_R, length_R) for name, values_R in of_requests.items()}
        ),
        item_id_C=item_id_C,
        labels={task: numbers(flat_list(table[task])[1]) for task in schema.tasks if with_labels},
    )


def feature_arrays(schema: EventSchema, given: dict[str, pa.Array]) -> dict[str, npt.NDArray]:
    """Values of features as the model reads them: keys of categories, numbers as float32."""
    categorical = {f.name for f in schema.features if f.kind == "categorical"}
    return {name: stable_keys(values) if name in categorical else numbers(values) for name, values in given.items()}


def missing_features(schema: EventSchema, of: str, size: int) -> dict[str, npt.NDArray]:
    """The features of an 'item' or 'request' of which none is known."""
    return {name: np.zeros(size, np.int64) for name in schema.features_of(of, "categorical")} | {
        name: np.zeros(size, np.float32) for name in schema.features_of(of, "numeric")
    }


def _features(table: pa.Table, keys: list[str], numeric: tuple[str, ...]) -> dict[str, npt.NDArray]:
    return {name: keys_of_lists(table[name]) for name in keys} | {
        name: numbers(flat_list(table[name])[1]) for name in numeric
    }


def keys_of_lists(lists: pa.ChunkedArray) -> Int64:
    """Keys of all values of all lists. Chunks may be encoded, each by a dictionary of its own."""
    keys = [stable_keys(chunk.flatten()) for chunk in lists.chunks]
    return keys[0] if len(keys) == 1 else np.concatenate([np.zeros(0, np.int64), *keys])


def cut_lists(lists: pa.ChunkedArray | pa.Array, most_rows: int, most_values: int) -> Iterator[tuple[int, int]]:
    """Where to cut rows so that each part has at most so many, and their lists at most so many values, or one row alone."""
    ends_R1 = offsets_of(pc.list_value_length(lists).to_numpy())
    begin = 0
    while begin < len(lists):
        end = int(np.searchsorted(ends_R1, ends_R1[begin] + most_values, side="right")) - 1
        end = max(begin + 1, min(end, begin + most_rows))
        yield begin, end
        begin = end


def plain_bytes(rows: pa.RecordBatch | pa.Array) -> int:
    """What the rows take; of lists of dictionaries, which slices share, nothing is counted."""
    if isinstance(rows, pa.Array):
        return rows.nbytes
    return sum(column.nbytes for column in rows.columns if not _is_encoded(column.type))


def _is_encoded(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_dictionary(kind.value_type)


def slices(rows: Rows, most_bytes: int) -> Iterator[Rows]:
    """The rows in slices of at most so many `plain_bytes`, or one row."""
    if len(rows) < 2 or plain_bytes(rows) <= most_bytes:
        yield rows
        return
    half = len(rows) // 2
    yield from slices(rows.slice(0, half), most_bytes)
    yield from slices(rows.slice(half), most_bytes)


def sizes_of(ids: pa.Array) -> Int64:
    """Bytes of each id."""
    if pa.types.is_integer(ids.type):
        return np.full(len(ids), ids.type.bit_width // 8)
    return pc.binary_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)


def list_columns(offsets: Int64, values: pa.Table) -> dict[str, pa.Array]:
    """Each column of `values` cut into lists at `offsets`."""
    ends = pa.array(offsets.astype(np.int32))
    return {name: pa.ListArray.from_arrays(ends, single_array(values[name])) for name in values.column_names}
