"""Impressions to requests, as pure Arrow/NumPy kernels: what was shown to a user at once is one request. Ray is not here.

Its time is that of its earliest impression, each of its features that of the earliest impression that has it; its history is every
event strictly before that time. Its candidates are the items shown, once each: with the features that were logged first, else the
catalogue's, and the largest label of each task; a label that is null is 0.

B users with events, I impressions, R requests, C candidates.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Histories, Int64, changes
from longer.data.columns import list_columns, milliseconds, numbers, single_array
from longer.data.requests import grouped
from longer.data.sequences import events_of
from longer.errors import UserError
from longer.hashing import hash_int64, stable_keys
from longer.schema import TIMESTAMP, EventSchema

MOST_SPAN_MS = 86_400_000
"""From the first to the last impression of one request: what a user is shown under one id later than that is another one."""


@dataclass(frozen=True)
class Shown:
    """Rows of the request table, and the absolute index of the first event that the sequence table keeps of each one's user."""

    rows: pa.Table
    first_index_R: Int64


def requests_shown(
    impressions: pa.Table,
    user_id_B: pa.Array,
    histories: Histories,
    items: pa.Table | None,
    schema: EventSchema,
    group_id: str | None,
) -> Shown:
    """The requests of a bucket's impressions, by user, time and request id.

    `impressions` are rows of the sequence table of `schema.of_impressions(group_id)`; `histories` are those of the users
    `user_id_B`. A user without events has an empty history. `items` is the catalogue, if items have features.
    """
    shown = events_of(impressions, schema.of_impressions(group_id))
    user_key_I, time_I = stable_keys(shown["user_id"]), milliseconds(single_array(shown["event_ts"]))
    group_I = milliseconds(single_array(shown[group_id])) if group_id else time_I
    row_I = np.cumsum(changes(user_key_I), dtype=np.int64)  # a user's impressions follow one another, in time order
    request_I, first_R, request_id_R = grouped(row_I, user_key_I, time_I, group_I)
    by_request_I = np.argsort(request_I, kind="stable")  # and so do those of a request
    starts_R = np.flatnonzero(changes(request_I[by_request_I]))
    if group_id:
        _check_spans(time_I[by_request_I], starts_R, group_id)
    requests = shown.take(pa.array(by_request_I))
    mixed_I = hash_int64(
        request_id_R[request_I] ^ stable_keys(shown["item_id"])
    )  # an order that says nothing of the labels
    order_I = np.lexsort((mixed_I, request_I))  # stable: an item's impressions in a request are in time order
    starts_C = np.flatnonzero(changes(request_I[order_I], mixed_I[order_I]))
    offsets_R1 = np.searchsorted(request_I[order_I][starts_C], np.arange(len(first_R) + 1))
    user_id_R = shown["user_id"].take(pa.array(first_R))
    history_end_R, first_index_R = _histories_before(user_id_R, time_I[first_R], user_id_B, histories)
    columns = {
        "request_id": pa.array(request_id_R),
        "user_id": user_id_R,
        "request_ts": pa.array(time_I[first_R]).cast(TIMESTAMP),
        "history_end": pa.array(history_end_R),
        **{name: _first_given(requests[name], starts_R) for name in schema.features_of("request")},
        **list_columns(offsets_R1, _candidates(shown.take(pa.array(order_I)), starts_C, items, schema)),
    }
    wanted = schema.requests_arrow()
    return Shown(pa.table({name: columns[name] for name in wanted.names}).cast(wanted), first_index_R)


def _candidates(shown: pa.Table, starts_C: Int64, items: pa.Table | None, schema: EventSchema) -> pa.Table:
    """One row a run of impressions of one item: its features, else the catalogue's, and the largest label of each task."""
    columns = {"item_id": single_array(shown["item_id"].take(pa.array(starts_C)))}
    if items is not None:
        row_C = pc.index_in(columns["item_id"], single_array(items["item_id"]))
        for name in schema.features_of("item"):
            columns[name] = pc.coalesce(_first_given(shown[name], starts_C), single_array(items[name]).take(row_C))
    for task in schema.tasks:
        labels_I = single_array(shown[task]).to_numpy(zero_copy_only=False)  # a null is NaN, which fmax leaves out
        columns[task] = pa.array(numbers(pa.array(np.fmax.reduceat(labels_I, starts_C))))
    return pa.table(columns)


def _first_given(column: pa.ChunkedArray, starts_N: Int64) -> pa.Array:
    """The first value of each run of rows that is not null; null where all are."""
    values = single_array(column)
    given = values.is_valid().to_numpy(zero_copy_only=False)
    first_N = np.minimum.reduceat(np.where(given, np.arange(len(values)), len(values)), starts_N)
    return values.take(pa.array(first_N, mask=first_N == len(values)))


def _check_spans(time_I: Int64, starts_R: Int64, group_id: str) -> None:
    """A UserError if an id is that of several requests: what was shown later would be a candidate of the earliest."""
    spans_R = np.maximum.reduceat(time_I, starts_R) - time_I[starts_R]
    if num_long := int((spans_R > MOST_SPAN_MS).sum()):
        raise UserError(
            f"import_impressions.group_id: {num_long} of {len(spans_R)} requests of a bucket have impressions of one user and one "
            f"{group_id} that are up to {spans_R.max() / 3_600_000:.0f} hours apart, which is no request: give each an id of its "
            "own, or leave group_id out"
        )


def _histories_before(
    user_id_R: pa.ChunkedArray, time_R: Int64, user_id_B: pa.Array, histories: Histories
) -> tuple[Int64, Int64]:
    """Absolute index after each user's last event strictly before a time, and of the first event kept; both 0 without events."""
    row = pc.index_in(user_id_R, user_id_B)
    known_R = np.flatnonzero(single_array(row).is_valid().to_numpy(zero_copy_only=False))
    row_N = single_array(row.drop_null()).to_numpy().astype(np.int64)
    row_E = np.repeat(np.arange(len(histories)), np.diff(histories.offsets_B1))
    # events and requests in one order, requests first where times agree: each has the events before it that happened earlier
    row_X, time_X = np.concatenate([row_E, row_N]), np.concatenate([histories.event_ts_E, time_R[known_R]])
    is_event_X = np.arange(len(row_X)) < len(row_E)
    order_X = np.lexsort((is_event_X, time_X, row_X))
    before_X = np.empty(len(row_X), np.int64)
    before_X[order_X] = np.cumsum(is_event_X[order_X])
    end_R, first_R = np.zeros(len(time_R), np.int64), np.zeros(len(time_R), np.int64)
    first_R[known_R] = histories.first_index_B[row_N]
    end_R[known_R] = first_R[known_R] + before_X[len(row_E) :] - histories.offsets_B1[row_N]
    return end_R, first_R
