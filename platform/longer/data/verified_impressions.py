"""What the requests of a bucket must be by the impressions they were made from: told by Arrow's group-by, not by what built them.

I impressions, R requests, C candidates; those of the table with _N.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Int64
from longer.data.columns import flat_list, milliseconds, single_array
from longer.data.findings import Findings
from longer.data.requests import request_ids
from longer.data.tables import SequenceTable
from longer.hashing import hash_int64, stable_keys
from longer.schema import EventSchema
from longer.windows import WindowRule

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Due:
    """The requests that impressions make, each with what it was asked with, and their candidates, request by request in order."""

    requests: pa.Table
    candidates: pa.Table
    offsets_R1: Int64


@dataclass(frozen=True)
class ShownRequests:
    """The impressions that a request table was made from; `items` is the catalogue, if items have features.

    Requests after `until_ms`, the newest event's time, are not made yet.
    """

    table: SequenceTable
    schema: EventSchema
    group_id: str | None
    items: pa.Table | None
    until_ms: int

    def of_bucket(self, bucket: int) -> Due:
        """All requests of the impressions of a bucket."""
        rows, schema = self.table.rows(bucket), self.schema
        asked, of_items = schema.features_of("request"), schema.features_of("item")
        offsets_B1, time_I = flat_list(rows["event_ts"])
        user_I = single_array(rows["user_id"]).take(pa.array(np.repeat(np.arange(len(rows)), np.diff(offsets_B1))))
        names = ["item_id", *asked, *of_items, *schema.tasks]
        group_I = flat_list(rows[self.group_id])[1] if self.group_id else time_I
        shown = pa.table(
            {"user_id": user_I, "request_ts": time_I, **{name: flat_list(rows[name])[1] for name in names}}
        )
        for task in schema.tasks:  # a label that is no number is none
            labels = shown[task]
            shown = shown.set_column(shown.column_names.index(task), task, pc.if_else(pc.is_nan(labels), None, labels))
        ids = request_ids(stable_keys(user_I), milliseconds(group_I))
        shown = shown.append_column("request_id", pa.array(ids))  # a user's impressions are in time order
        requests = _grouped(shown, ["request_id"], dict.fromkeys(("user_id", *asked), "first") | {"request_ts": "min"})
        of_candidates = dict.fromkeys(of_items, "first") | dict.fromkeys(schema.tasks, "max")
        candidates = self._complete(_grouped(shown, ["request_id", "item_id"], of_candidates))
        requests = requests.sort_by("request_id")
        request_id_C = candidates["request_id"].to_numpy()
        order_C = np.lexsort((hash_int64(request_id_C ^ stable_keys(candidates["item_id"])), request_id_C))
        request_id_R = requests["request_id"].to_numpy()
        offsets_R1 = np.append(np.searchsorted(request_id_C[order_C], request_id_R), len(order_C))
        return Due(requests, candidates.take(pa.array(order_C)), offsets_R1)

    def _complete(self, candidates: pa.Table) -> pa.Table:
        """With the catalogue's features where impressions have none, and 0 for labels that are missing."""
        columns = {name: single_array(candidates[name]) for name in candidates.column_names}
        if self.items is not None:
            row_C = pc.index_in(columns["item_id"], single_array(self.items["item_id"]))
            for name in self.schema.features_of("item"):
                columns[name] = pc.coalesce(columns[name], single_array(self.items[name]).take(row_C))
        for task in self.schema.tasks:
            columns[task] = pc.fill_null(columns[task], 0.0)
        return pa.table(columns)


def check_shown(rows: pa.Table, due: Due, schema: EventSchema, found: Findings, where: str) -> None:
    """Rows of `requests_arrow` against the requests that the impressions of their bucket make."""
    place = pc.index_in(single_array(rows["request_id"]), single_array(due.requests["request_id"]))
    is_due = place.is_valid().to_numpy(zero_copy_only=False)
    ids = single_array(rows["request_id"])
    found.add("unknown_request", ~is_due, lambda row: f"request {ids[row].as_py()} in {where}")
    rows, place_N = rows.filter(pa.array(is_due)), place.drop_null().to_numpy().astype(np.int64)
    known = single_array(rows["request_id"])

    def tell(row: int) -> str:
        return f"request {known[row].as_py()} in {where}"

    for name in ("user_id", "request_ts", *schema.features_of("request")):
        differs_N = _differ(single_array(rows[name]), single_array(due.requests[name]).take(pa.array(place_N)))
        found.add("request_feature", differs_N, lambda row, name=name: f"{tell(row)}: {name}")  # type: ignore[misc]

    names = ["item_id", *schema.features_of("item"), *schema.tasks]
    num_N = np.stack([pc.fill_null(pc.list_value_length(rows[name]), 0).to_numpy() for name in names]).astype(np.int64)
    num_due_N = np.diff(due.offsets_R1)[place_N]
    wrong_N = (num_N != num_due_N).any(axis=0)  # lists of other lengths, which cannot be compared one by one
    whole = np.flatnonzero(~wrong_N)
    row_C = np.repeat(whole, num_due_N[whole])
    within_C = np.arange(len(row_C)) - np.repeat(np.cumsum(num_due_N[whole]) - num_due_N[whole], num_due_N[whole])
    wanted = due.candidates.take(pa.array(due.offsets_R1[place_N[row_C]] + within_C))
    held = {name: single_array(rows[name].take(pa.array(whole))).flatten() for name in names}
    wrong_N[row_C[_differ(held["item_id"], single_array(wanted["item_id"]))]] = True
    items = single_array(rows["item_id"])

    def tell_items(row: int) -> str:
        begin, end = due.offsets_R1[place_N[row]], due.offsets_R1[place_N[row] + 1]
        shown, asked = due.candidates["item_id"][begin:end].to_pylist(), items[row].as_py() or []
        lost, strange = [i for i in shown if i not in asked], [i for i in asked if i not in shown]
        return f"{tell(row)}: {len(asked)} of {len(shown)} shown, lost {lost[:3]}, never shown {strange[:3]}"

    found.add("candidates", wrong_N, tell_items)
    for name in names[1:]:
        differs_C = _differ(held[name], single_array(wanted[name])) & ~wrong_N[row_C]
        kind = "label" if name in schema.tasks else "candidate_feature"
        found.add(
            kind,
            differs_C,
            lambda c, name=name: f"{tell(int(row_C[c]))}: {name} of item {held['item_id'][c].as_py()}",  # type: ignore[misc]
        )


def is_cut_of(missing: pa.Table, sequences: pa.Table, windows: WindowRule) -> Mask:
    """Which requests (user_id, request_ts) have a user among `sequences`, whose table has cut their history window."""
    row = pc.index_in(single_array(missing["user_id"]), single_array(sequences["user_id"]))
    is_cut = row.is_valid().to_numpy(zero_copy_only=False)
    row_N, time_N = row.drop_null().to_numpy(), milliseconds(single_array(missing["request_ts"]))[is_cut]
    offsets_B1, times = flat_list(sequences["event_ts"])
    first_N = sequences["first_index"].to_numpy()[row_N]
    end_N = first_N + _num_before(time_N, milliseconds(times), offsets_B1[row_N], offsets_B1[row_N + 1])
    is_cut[is_cut] = windows.history_start(end_N) * windows.merge_size < first_N
    return is_cut


def _num_before(time_N: Int64, time_E: Int64, begin_N: Int64, end_N: Int64) -> Int64:
    """How many of the ascending times from `begin` to before `end` are before each time; one binary search for all."""
    low_N, high_N = begin_N, end_N
    while (open_N := low_N < high_N).any():
        middle_N = (low_N + high_N) // 2
        is_before_N = open_N.copy()
        is_before_N[open_N] = time_E[middle_N[open_N]] < time_N[open_N]
        low_N, high_N = np.where(is_before_N, middle_N + 1, low_N), np.where(is_before_N, high_N, middle_N)
    return low_N - begin_N


def _grouped(rows: pa.Table, keys: list[str], how: dict[str, str]) -> pa.Table:
    """One row a group: of each column the first value that there is, the smallest or the largest."""
    as_told = pa.TableGroupBy(rows, keys, use_threads=False)  # in one thread, which alone keeps the order of rows
    made = as_told.aggregate(list(how.items()))
    return made.rename_columns([_renamed(name, how) for name in made.column_names])


def _renamed(name: str, how: dict[str, str]) -> str:
    plain, _, function = name.rpartition("_")
    return plain if how.get(plain) == function else name


def _differ(held: pa.Array, due: pa.Array) -> Mask:
    """Where two columns differ; nulls are equal, and so are NaNs."""
    due = due.cast(held.type)
    equal = pc.fill_null(pc.equal(held, due), False)
    both_missing = pc.and_(held.is_null(nan_is_null=True), due.is_null(nan_is_null=True))
    return ~pc.or_(equal, both_missing).to_numpy(zero_copy_only=False)
