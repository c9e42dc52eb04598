"""Impressions to requests, as pure Arrow/NumPy kernels: what was shown to a user at once is one request. Ray is not here.

Its time is that of its earliest impression, its features are that impression's; its history is every event strictly before that
time. Candidates are the impressions, with the items' features and the labels that were logged with them; a label that is null is 0.

B users with events, I impressions, R requests.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Histories, Int64
from longer.data.columns import changes, list_columns, milliseconds, numbers, single_array
from longer.data.requests import ids_of_requests
from longer.data.sequences import events_of
from longer.hashing import hash_int64, stable_keys
from longer.schema import TIMESTAMP, EventSchema


@dataclass(frozen=True)
class Shown:
    """Rows of the request table, and the absolute index of the first event that the sequence table keeps of each one's user."""

    rows: pa.Table
    first_index_R: Int64


def requests_shown(
    impressions: pa.Table, user_id_B: pa.Array, histories: Histories, schema: EventSchema, group_id: str | None
) -> Shown:
    """The requests of a bucket's impressions, by user, time and request id.

    `impressions` are rows of the sequence table of `schema.of_impressions(group_id)`; `histories` are those of the users
    `user_id_B`. A user without events has an empty history.
    """
    shown = events_of(impressions, schema.of_impressions(group_id))
    user_key_I, time_I = stable_keys(shown["user_id"]), milliseconds(single_array(shown["event_ts"]))
    group_I = milliseconds(single_array(shown[group_id])) if group_id else time_I
    request_id_I = ids_of_requests(user_key_I, group_I)
    row_I = np.cumsum(changes(user_key_I))  # a user's impressions follow one another, in time order
    by_request = np.lexsort((request_id_I, row_I))  # stable, so a request's first impression is its earliest
    starts = changes(row_I[by_request], request_id_I[by_request])
    first_R = by_request[starts]
    by_time_R = np.lexsort((request_id_I[first_R], time_I[first_R], row_I[first_R]))
    place_R = np.empty(len(first_R), np.int64)
    place_R[by_time_R] = np.arange(len(first_R))
    request_I = np.empty(len(row_I), np.int64)
    request_I[by_request] = place_R[np.cumsum(starts) - 1]

    mixed_I = hash_int64(
        request_id_I ^ stable_keys(shown["item_id"])
    )  # so that candidates' order says nothing of their labels
    order_I = np.lexsort((mixed_I, request_I))
    offsets_R1 = np.searchsorted(request_I[order_I], np.arange(len(first_R) + 1))
    first_R = first_R[by_time_R]
    history_end_R, first_index_R = _histories_before(
        shown["user_id"].take(pa.array(first_R)), time_I[first_R], user_id_B, histories
    )
    candidates = shown.take(pa.array(order_I))
    labels = {task: pa.array(numbers(single_array(candidates[task]))) for task in schema.tasks}
    of_items = {name: candidates[name] for name in ("item_id", *schema.features_of("item"))}
    requests = shown.take(pa.array(first_R))
    columns = {
        "request_id": pa.array(request_id_I[first_R]),
        "user_id": requests["user_id"],
        "request_ts": pa.array(time_I[first_R]).cast(TIMESTAMP),
        "history_end": pa.array(history_end_R),
        **{name: requests[name] for name in schema.features_of("request")},
        **list_columns(offsets_R1, pa.table(of_items | labels)),
    }
    wanted = schema.requests_arrow()
    return Shown(pa.table({name: columns[name] for name in wanted.names}).cast(wanted), first_index_R)


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
