"""What the contract promises of sequence and request rows, checked on any piece of a table. Pure Arrow/NumPy; Ray is not here.

B users' rows, E events in them, R requests; a row index is into the piece. A user is checked whole, since a row is never divided.

Of a table of one's own, whose rules no manifest states, ties in time may be in any order and a history may lag behind: a system
that logs with a delay knew no better. A request table that names its sequences promises every event strictly before request_ts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import NO_EVENT_TS, Int64
from longer.data.columns import milliseconds, single_array
from longer.data.findings import Findings
from longer.data.requests import SPLITS, SplitTimes
from longer.data.sequences import NUM_OLDER, KeepRule
from longer.hashing import bucket_of, stable_keys
from longer.schema import EventSchema
from longer.windows import WindowRule

Mask = npt.NDArray[np.bool_]

HISTORY_COLUMNS = ["user_id", "first_index", "prev_event_ts", "num_events_total", "event_ts"]
"""Columns of a sequence table that decide whether a request's history is right."""


@dataclass(frozen=True)
class Promises:
    """What the tables' rows are held to; None where a table of one's own promises nothing of the kind."""

    schema: EventSchema
    num_buckets: int
    stride_events: int
    windows: WindowRule
    keep: KeepRule | None = None
    splits: SplitTimes | None = None
    ordered_ties: bool = False
    complete_histories: bool = False


def check_sequences(
    rows: pa.Table, bucket: int, before: pa.Array, promises: Promises, found: Findings, where: str
) -> None:
    """Rows of `sequences_arrow` that follow the user in `before` (empty at the start of a bucket)."""
    schema, users = promises.schema, single_array(rows["user_id"])
    user = _teller("user", users, where)
    _check_users(users, before, bucket, promises, found, user)
    _check_nulls(rows, ["user_id", "first_index", "num_events_total"], ["event_ts", "item_id"], found, user)
    aligned_B = _check_lengths(rows, found, user)
    first_B, total_B, prev_B = _int64(rows["first_index"]), _int64(rows["num_events_total"]), _previous(rows)
    length_B, time_E = _times(rows)
    row_E = np.repeat(np.arange(len(rows)), length_B)
    off_stride_B = (first_B < 0) | (first_B % promises.stride_events != 0)
    found.add("first_index", off_stride_B, lambda b: f"{user(b)}: {first_B[b]}, stride {promises.stride_events}")
    wrong_B = first_B + length_B != total_B
    found.add("length", wrong_B, lambda b: f"{user(b)}: {first_B[b]} + {length_B[b]} events, but {total_B[b]} in all")
    if promises.keep:
        due_B = promises.keep.first_index(total_B)
        found.add("keep_events", first_B != due_B, lambda b: f"{user(b)}: starts at {first_B[b]}, not at {due_B[b]}")
    has_prev_B = prev_B != NO_EVENT_TS
    found.add("prev_event_ts", has_prev_B != (first_B > 0), lambda b: f"{user(b)}: first_index {first_B[b]}")
    kept_B = np.flatnonzero(length_B > 0)
    late_B = np.zeros(len(rows), bool)
    late_B[kept_B] = prev_B[kept_B] > time_E[(np.cumsum(length_B) - length_B)[kept_B]]
    found.add("prev_event_order", late_B, lambda b: f"{user(b)}: {time_text(prev_B[b])}")
    falls_B = np.zeros(len(rows), bool)
    falls_B[row_E[1:][_falls(time_E, row_E)]] = True
    found.add("time_order", falls_B, user)
    if promises.ordered_ties:
        unordered = _rows_with_unordered_ties(rows.filter(pa.array(aligned_B)), schema)
        found.add("tie_order", np.isin(np.arange(len(rows)), np.flatnonzero(aligned_B)[unordered]), user)


def check_news(rows: pa.Table, bucket: int, before: pa.Array, promises: Promises, found: Findings, where: str) -> None:
    """Rows of `news_arrow` that follow the user in `before`, as they lie: what point reads and the merge rely on."""
    user = _teller("user", single_array(rows["user_id"]), where)
    _check_users(single_array(rows["user_id"]), before, bucket, promises, found, user)
    keys = [field.name for field in rows.schema if not pa.types.is_list(field.type)]
    _check_nulls(rows, keys, ["event_ts", "item_id"], found, user)
    _check_lengths(rows, found, user)
    num_older_B = _int64(rows[NUM_OLDER])
    found.add("num_older", num_older_B < 0, lambda b: f"{user(b)}: {num_older_B[b]}")


def check_requests(
    rows: pa.Table, bucket: int, split: str | None, promises: Promises, found: Findings, where: str
) -> None:
    """Rows of `requests_arrow` by themselves; their histories are checked by `check_histories`."""
    request = _teller("request", single_array(rows["request_id"]), where)
    keys = ["request_id", "user_id", "request_ts", "history_end"]
    _check_nulls(rows, keys, ["item_id", *promises.schema.tasks], found, request)
    _check_lengths(rows, found, request)
    _check_bucket(single_array(rows["user_id"]), bucket, promises, found, request)
    if promises.splits and split in SPLITS:
        time_R = milliseconds(single_array(rows["request_ts"]))
        wrong_R = promises.splits.split_of(time_R) != SPLITS.index(split)
        found.add("wrong_split", wrong_R, lambda r: f"{request(r)}: {time_text(time_R[r])} in split {split}")


def check_histories(
    requests: pa.Table, sequences: pa.Table, promises: Promises, found: Findings, counts: Findings
) -> Mask:
    """Histories of the requests whose users are among `sequences` (HISTORY_COLUMNS); returns which requests those are.

    `counts` takes the stale histories where completeness is not promised.
    """
    row = pc.index_in(requests["user_id"], value_set=single_array(sequences["user_id"]))
    is_here_R = single_array(row).is_valid().to_numpy(zero_copy_only=False)
    asked = requests.filter(pa.array(is_here_R))
    row_R = single_array(row.drop_null()).to_numpy().astype(np.int64)
    request = _teller("request", single_array(asked["request_id"]), "")
    end_R, time_R = _int64(asked["history_end"]), milliseconds(single_array(asked["request_ts"]))
    first_R, total_R = _int64(sequences["first_index"])[row_R], _int64(sequences["num_events_total"])[row_R]
    prev_R = _previous(sequences)[row_R]
    length_B, time_E = _times(sequences)
    row_E, offset_R = np.repeat(np.arange(len(sequences)), length_B), (np.cumsum(length_B) - length_B)[row_R]

    outside_R = (end_R < 0) | (end_R > total_R)
    found.add("history_range", outside_R, lambda r: f"{request(r)}: history_end {end_R[r]} of {total_R[r]} events")
    start_R = promises.windows.history_start(np.maximum(end_R, 0)) * promises.windows.merge_size
    found.add(
        "cut_window", start_R < first_R, lambda r: f"{request(r)}: starts at {start_R[r]}, kept from {first_R[r]}"
    )

    num_held_R = np.clip(end_R - first_R, 0, length_B[row_R])
    newest_R = np.where(end_R >= first_R, prev_R, NO_EVENT_TS)
    some = num_held_R > 0
    newest_E = _running_max(time_E, row_E)
    newest_R[some] = np.maximum(newest_R[some], newest_E[(offset_R + num_held_R - 1)[some]])
    leaks_R = newest_R >= time_R
    found.add(
        "future_event", leaks_R, lambda r: f"{request(r)}: {time_text(newest_R[r])}, asked at {time_text(time_R[r])}"
    )

    left = num_held_R < length_B[row_R]
    oldest_left_E = ~_running_max(~time_E[::-1], row_E[::-1].max(initial=0) - row_E[::-1])[::-1]
    stale_R = np.zeros(len(asked), bool)
    stale_R[left] = oldest_left_E[(offset_R + num_held_R)[left]] < time_R[left]
    (found if promises.complete_histories else counts).add(
        "stale_history", stale_R, lambda r: f"{request(r)}: history_end {end_R[r]}, asked at {time_text(time_R[r])}"
    )
    return is_here_R


def num_groups(rows: pa.Table, schema: EventSchema) -> int:
    """How many requests the events in these rows of `sequences_arrow` make: one a user and group."""
    groups = single_array(rows[schema.group_id or "event_ts"])
    row_E, group_E = np.repeat(np.arange(len(rows)), _lengths(groups)), milliseconds(groups.flatten())
    order = np.lexsort((group_E, row_E))
    row_E, group_E = row_E[order], group_E[order]
    return min(len(order), 1) + int(((row_E[1:] != row_E[:-1]) | (group_E[1:] != group_E[:-1])).sum())


def repeated(ids: Int64) -> Int64:
    """Ids that occur more than once, each as often as it is too many."""
    ascending = np.sort(ids)
    return ascending[1:][ascending[1:] == ascending[:-1]]


def _check_users(
    users: pa.Array, before: pa.Array, bucket: int, promises: Promises, found: Findings, user: Callable[[int], str]
) -> None:
    _check_bucket(users, bucket, promises, found, user)
    chain = pa.concat_arrays([before, users])
    older, newer = chain[:-1], chain[1:]
    pad = np.zeros(len(users) - len(newer), bool)  # the first row of a bucket follows nobody
    same = np.concatenate([pad, _truth(pc.equal(older, newer))])
    found.add("duplicate_user", same, user)
    found.add("user_order", np.concatenate([pad, _truth(pc.greater(older, newer))]), user)


def _check_bucket(
    users: pa.Array, bucket: int, promises: Promises, found: Findings, tell: Callable[[int], str]
) -> None:
    own = bucket_of(stable_keys(users), promises.num_buckets)
    found.add("wrong_bucket", own != bucket, lambda row: f"{tell(row)}: in {bucket:04d}, belongs in {own[row]:04d}")


def _check_nulls(
    rows: pa.Table, keys: list[str], elements: list[str], found: Findings, tell: Callable[[int], str]
) -> None:
    """Nulls in key columns, whole lists that are null, and null elements where an element must be."""
    for name in rows.column_names:
        column = single_array(rows[name])
        if name not in keys and not pa.types.is_list(column.type):
            continue
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        if name in elements and (values := column.flatten()).null_count:
            length = _lengths(column)
            holes = np.repeat(np.arange(len(rows)), length)[values.is_null().to_numpy(zero_copy_only=False)]
            is_null = is_null | np.isin(np.arange(len(rows)), holes)
        found.add("null", is_null, lambda row, name=name: f"{tell(row)}: {name}")  # type: ignore[misc]


def _check_lengths(rows: pa.Table, found: Findings, tell: Callable[[int], str]) -> Mask:
    """Which rows have lists of one length in all columns."""
    columns = {name: single_array(rows[name]) for name in rows.column_names}
    lengths = {name: _lengths(column) for name, column in columns.items() if pa.types.is_list(column.type)}
    all_NB = np.stack(list(lengths.values()))
    differ_B = (all_NB != all_NB[0]).any(axis=0)
    found.add(
        "list_length",
        differ_B,
        lambda row: f"{tell(row)}: {', '.join(f'{name} {length[row]}' for name, length in lengths.items())}",
    )
    return ~differ_B


def _rows_with_unordered_ties(rows: pa.Table, schema: EventSchema) -> Int64:
    """Rows with two neighbouring events of one time that the other columns, in schema order and nulls last, put otherwise."""
    length_B, time_E = _times(rows)
    row_E = np.repeat(np.arange(len(rows)), length_B)
    tied = np.flatnonzero((time_E[1:] == time_E[:-1]) & (row_E[1:] == row_E[:-1]))
    wrong = tied[:0]
    for field in schema.event_fields()[1:]:
        values = single_array(rows[field.name]).flatten()
        older, newer = values.take(pa.array(tied)), values.take(pa.array(tied + 1))
        older_rank, newer_rank = _rank_of_missing(older), _rank_of_missing(newer)
        greater = (older_rank > newer_rank) | ((older_rank == newer_rank) & _truth(pc.greater(older, newer)))
        equal = (older_rank == newer_rank) & ((older_rank > 0) | _truth(pc.equal(older, newer)))
        wrong = np.concatenate([wrong, tied[greater]])
        tied = tied[equal]
    return np.unique(row_E[wrong])


def _rank_of_missing(values: pa.Array) -> npt.NDArray[np.int8]:
    """0 for a value, 1 for NaN, 2 for null: the order in which a sort puts them."""
    rank = np.where(values.is_null().to_numpy(zero_copy_only=False), 2, 0).astype(np.int8)
    if pa.types.is_floating(values.type):
        rank[_truth(pc.is_nan(values))] = 1
    return rank


def _running_max(values_E: Int64, row_E: Int64) -> Int64:
    """The largest value of each row up to each event; rows ascend."""
    if not _falls(values_E, row_E).any():
        return values_E
    order = np.argsort(values_E, kind="stable")
    rank_E = np.empty(len(order), np.int64)
    rank_E[order] = np.arange(len(order))
    base_E = row_E * len(order)
    return values_E[order][np.maximum.accumulate(base_E + rank_E) - base_E]


def _falls(values_E: Int64, row_E: Int64) -> Mask:
    """Where an event's value is less than that of the event before it in its row; [E - 1]."""
    return (values_E[1:] < values_E[:-1]) & (row_E[1:] == row_E[:-1])


def _times(rows: pa.Table) -> tuple[Int64, Int64]:
    """Events of each row, and their times in one array."""
    column = single_array(rows["event_ts"])
    return _lengths(column), milliseconds(column.flatten())


def _lengths(lists: pa.Array) -> Int64:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _previous(rows: pa.Table) -> Int64:
    return milliseconds(single_array(rows["prev_event_ts"]), missing=int(NO_EVENT_TS))


def _int64(column: pa.ChunkedArray) -> Int64:
    return pc.fill_null(single_array(column), 0).to_numpy(zero_copy_only=False)


def _truth(values: pa.Array) -> Mask:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def _teller(noun: str, ids: pa.Array, where: str) -> Callable[[int], str]:
    """Names a row by its id, and by its file where given."""
    return lambda row: f"{noun} {ids[row].as_py()}{f' in {where}' if where else ''}"


def time_text(time_ms: int) -> str:
    """Any int64 as a time, years that calendars do not reach included."""
    return str(np.datetime64(int(time_ms), "ms"))
