"""Sequences to requests, as pure Arrow/NumPy kernels. Ray is not here.

One group of a user's events (`group_id`, or one time without it) is one request. Its positives are the group's distinct items;
its history is every event strictly before the group's earliest time, so of two groups at one time neither sees the other.
Negatives are items of uniformly drawn events of the same split (popularity-matched) that the request does not have already.
A draw is a hash of (seed, request_id, slot, round), so it is the same however the work is divided.

B histories, E events in all of them, R requests, P positives and C candidates in all of them, S splits, I items, N rows of any
kind: of negatives, the slots that are drawn for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import MS_PER_DAY, Float32, Histories, Int64, changes
from longer.data.catalogue import first_seen
from longer.data.columns import flat_list, list_columns, milliseconds, single_array
from longer.data.events import iso_ms
from longer.hashing import hash_int64, stable_keys
from longer.schema import TIMESTAMP, EventSchema
from longer.storage import Version
from longer.windows import WindowRule

SPLITS = ("train", "valid", "test")
_MAX_ROUNDS = 16


@dataclass(frozen=True)
class SplitTimes:
    """First millisecond of the validation and test splits; both are midnights UTC."""

    valid_from_ms: int
    test_from_ms: int

    def split_of(self, times_N: Int64) -> npt.NDArray[np.int8]:
        """Index into SPLITS of each time."""
        return ((times_N >= self.valid_from_ms).astype(np.int8) + (times_N >= self.test_from_ms)).astype(np.int8)


def split_times(first_ms: int, last_ms: int, validation_days_share: float, test_days_share: float) -> SplitTimes | None:
    """Newest days test, those before them validation; None if no day is left to train on. At least one day is test."""
    first_day, last_day = first_ms // MS_PER_DAY, last_ms // MS_PER_DAY
    num_days = last_day - first_day + 1
    test = max(1, round(num_days * test_days_share))
    valid = max(1, round(num_days * validation_days_share)) if validation_days_share else 0
    if test + valid >= num_days:
        return None
    return SplitTimes((last_day + 1 - test - valid) * MS_PER_DAY, (last_day + 1 - test) * MS_PER_DAY)


def asked_in(sequences: Version, impressions: Version | None) -> tuple[int, int]:
    """First and last millisecond in which a request can be: with impressions, theirs, but none after the newest event."""
    spans = [
        [iso_ms(version.manifest[name]) for name in ("first_event_ts", "watermark")]
        for version in (impressions or sequences, sequences)
    ]
    return spans[0][0], min(spans[0][1], spans[1][1])


@dataclass(frozen=True)
class Catalogue:
    """Every item of the log, ascending, with its first-seen features and how many events it has in each split.

    `items` has the item features' columns and `item_id`; row i is item i. `cumulative_SI` is the running sum of event counts
    over the items, a split a row, through which a uniformly drawn event becomes an item.
    """

    items: pa.Table
    cumulative_SI: Int64


def partial_catalogue(sequences: pa.Table, schema: EventSchema, splits: SplitTimes) -> pa.Table:
    """A bucket's share of the catalogue: item, first time seen, features then, and events in each split."""
    names = ["event_ts", "item_id", *schema.features_of("item")]
    events = pa.table({name: flat_list(sequences[name])[1] for name in names})
    split = splits.split_of(milliseconds(single_array(events["event_ts"])))
    for index, name in enumerate(SPLITS):
        events = events.append_column(name, pa.array((split == index).astype(np.int64)))
    return _combine(events, schema)


def merge_catalogues(parts: list[pa.Table], schema: EventSchema) -> Catalogue:
    """The catalogue of the whole log; the same in whatever order and number the parts come."""
    merged = _combine(pa.concat_tables(parts), schema)
    counts_SI = np.stack([merged[name].to_numpy() for name in SPLITS])
    return Catalogue(
        merged.select(["item_id", *schema.features_of("item")]).combine_chunks(), np.cumsum(counts_SI, axis=1)
    )


def with_features(catalogue: Catalogue, items: pa.Table, schema: EventSchema) -> Catalogue:
    """The same items with the features that the item table gives them, so that online and offline candidates agree."""
    row = pc.index_in(single_array(catalogue.items["item_id"]), single_array(items["item_id"]))
    features = {name: single_array(items[name]).take(row) for name in schema.features_of("item")}
    return Catalogue(pa.table({"item_id": catalogue.items["item_id"], **features}), catalogue.cumulative_SI)


def _combine(rows: pa.Table, schema: EventSchema) -> pa.Table:
    """One row an item, ascending: as first seen, and its summed counts."""
    counts = rows.group_by("item_id").aggregate([(name, "sum") for name in SPLITS]).sort_by("item_id")
    first = first_seen(rows, schema)
    for name in SPLITS:
        first = first.append_column(name, counts[f"{name}_sum"])
    return first


@dataclass(frozen=True)
class Groups:
    """R requests of a bucket before candidates: `item_offsets_R1` cuts the distinct positive items, rows of the catalogue."""

    user_row_R: Int64
    request_id_R: Int64
    request_ts_R: Int64
    history_end_R: Int64
    item_offsets_R1: Int64
    item_row_P: Int64


def find_groups(sequences: pa.Table, histories: Histories, schema: EventSchema, catalogue: Catalogue) -> Groups:
    """All groups of a bucket's users, by user, request time and request id."""
    user_row_E = np.repeat(np.arange(len(histories)), np.diff(histories.offsets_B1))
    index_E = np.arange(len(user_row_E)) - histories.offsets_B1[user_row_E] + histories.first_index_B[user_row_E]
    time_E = histories.event_ts_E
    new_time = changes(user_row_E, time_E)
    history_end_E = index_E[np.maximum.accumulate(np.where(new_time, np.arange(len(index_E)), 0))]
    group_E = milliseconds(flat_list(sequences[schema.group_id])[1]) if schema.group_id else time_E
    item_E = pc.index_in(flat_list(sequences["item_id"])[1], single_array(catalogue.items["item_id"])).to_numpy()

    request_E, first_R, request_id_R = grouped(user_row_E, histories.user_key_B[user_row_E], time_E, group_E)
    num_items = np.int64(len(catalogue.items))
    request_P, item_row_P = np.divmod(np.unique(request_E * num_items + item_E), num_items)
    return Groups(
        user_row_R=user_row_E[first_R],
        request_id_R=request_id_R,
        request_ts_R=time_E[first_R],
        history_end_R=history_end_E[first_R],
        item_offsets_R1=np.searchsorted(request_P, np.arange(len(first_R) + 1)),
        item_row_P=item_row_P,
    )


def grouped(row_N: Int64, user_key_N: Int64, time_N: Int64, group_N: Int64) -> tuple[Int64, Int64, Int64]:
    """Rows in time order to requests, one for each user and group: each row's request; of each request the first row, and the id.

    Requests are numbered by `row_N`, which is the user's, by the time of their first row, and by id.
    """
    by_group = np.lexsort((group_N, row_N))  # stable, so a group's first row is its earliest
    starts = changes(row_N[by_group], group_N[by_group])
    first_R = by_group[starts]
    request_id_R = request_ids(user_key_N[first_R], group_N[first_R])
    by_time_R = np.lexsort((request_id_R, time_N[first_R], row_N[first_R]))
    place_R = np.empty(len(first_R), np.int64)
    place_R[by_time_R] = np.arange(len(first_R))
    request_N = np.empty(len(row_N), np.int64)
    request_N[by_group] = place_R[np.cumsum(starts) - 1]
    return request_N, first_R[by_time_R], request_id_R[by_time_R]


def request_ids(user_key_N: Int64, group_N: Int64) -> Int64:
    """The id of the request that is a user's group."""
    return (_mix(user_key_N, group_N) >> np.uint64(1)).view(np.int64)


def is_cut(history_end_R: Int64, first_index_R: Int64, windows: WindowRule) -> npt.NDArray[np.bool_]:
    """Which requests have a history window that starts before the first event that the table keeps of their user."""
    return windows.history_start(history_end_R) * windows.merge_size < first_index_R


def draw_negatives(
    groups: Groups, split_R: npt.NDArray[np.int8], catalogue: Catalogue, per_positive: int, seed: int
) -> tuple[Int64, Int64]:
    """Request and catalogue row of each negative: distinct in a request and never one of its positives.

    A slot whose draw is taken draws again, up to 16 times; then it stays empty, as it must where items run out.
    """
    num_items = np.int64(len(catalogue.items))
    num_positives_R = np.diff(groups.item_offsets_R1)
    slots_R = num_positives_R * per_positive
    request_N = np.repeat(np.arange(len(slots_R)), slots_R)
    slot_N = np.arange(len(request_N)) - np.repeat(np.cumsum(slots_R) - slots_R, slots_R)
    stream_N = _mix(np.int64(seed), groups.request_id_R)[request_N]
    positives = np.repeat(np.arange(len(slots_R)), num_positives_R) * num_items + groups.item_row_P
    taken = positives
    open_slots = np.arange(len(request_N))
    for round_number in range(_MAX_ROUNDS):
        uniform = _mix(stream_N[open_slots], slot_N[open_slots] << 8 | round_number)
        request = request_N[open_slots]
        drawn = request * num_items + _drawn_items(uniform, split_R[request], catalogue)
        fresh, lowest_slot = np.unique(drawn, return_index=True)  # of equal draws the lowest slot has it
        accepted = ~_in_sorted(fresh, taken)
        taken = np.sort(np.concatenate([taken, fresh[accepted]]), kind="stable")
        still_open = np.ones(len(open_slots), bool)
        still_open[lowest_slot[accepted]] = False
        open_slots = open_slots[still_open]
        if not len(open_slots):
            break
    return np.divmod(taken[~_in_sorted(taken, positives)], num_items)


def request_rows(
    groups: Groups,
    negatives: tuple[Int64, Int64],
    user_ids: pa.Array,
    schema: EventSchema,
    catalogue: Catalogue,
) -> pa.Table:
    """Rows of the request table. Candidates are ordered by a hash, so their order says nothing of their labels."""
    request_P = np.repeat(np.arange(len(groups.request_id_R)), np.diff(groups.item_offsets_R1))
    request_C = np.concatenate([request_P, negatives[0]])
    item_row_C = np.concatenate([groups.item_row_P, negatives[1]])
    label_C: Float32 = np.repeat(np.array([1, 0], np.float32), [len(request_P), len(negatives[0])])
    mixed_C = _mix(groups.request_id_R[request_C], stable_keys(catalogue.items["item_id"])[item_row_C])
    order = np.lexsort((mixed_C, request_C))
    offsets = np.searchsorted(request_C[order], np.arange(len(groups.request_id_R) + 1))
    values = catalogue.items.take(pa.array(item_row_C[order]))
    for task in schema.tasks:
        values = values.append_column(task, pa.array(label_C[order]))
    wanted = schema.requests_arrow()
    columns = {
        "request_id": pa.array(groups.request_id_R),
        "user_id": user_ids.take(pa.array(groups.user_row_R)),
        "request_ts": pa.array(groups.request_ts_R).cast(TIMESTAMP),
        "history_end": pa.array(groups.history_end_R),
        **list_columns(offsets, values),
    }
    return pa.table({name: columns[name] for name in wanted.names})


def _drawn_items(uniform: npt.NDArray[np.uint64], split_N: npt.NDArray[np.int8], catalogue: Catalogue) -> Int64:
    """The item of the event that each draw falls on, in the split's events laid out item by item."""
    item_N = np.empty(len(uniform), np.int64)
    for split, cumulative_I in enumerate(catalogue.cumulative_SI):
        mine = split_N == split
        event = (uniform[mine] % np.uint64(max(cumulative_I[-1], 1))).astype(np.int64)
        item_N[mine] = np.searchsorted(cumulative_I, event, side="right")
    return item_N


def _mix(*parts: Any) -> npt.NDArray[np.uint64]:
    """A hash of several int64 or uint64 arrays of one length; scalars count for every row."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        mixed = hash_int64((mixed ^ np.asarray(part).view(np.uint64)).view(np.int64))
    return mixed


def _in_sorted(values: Int64, ascending: Int64) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[place] == values
