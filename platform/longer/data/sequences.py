"""Events to sequences, as pure Arrow/NumPy kernels: one row a user, lists oldest to newest.

Events of a user are ordered by `event_ts`, then by every other column in schema order, so that the order never depends on how
the log was cut into files. Kept are the last `keep_events`, rounded up so that the first one kept has an absolute index that
is a multiple of the stride; one event more is needed for `prev_event_ts`.

E events, U users.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import NO_EVENT_TS, Int64, changes, offsets_of
from longer.data.columns import flat_list, list_columns, milliseconds, single_array
from longer.schema import EventSchema

NUM_OLDER = "num_older"
"""Column of news: how many of a user's new events are older than those in the lists, and only counted."""

_NUM_BINS = 1 << 16
_KEY_BITS = 63


@dataclass(frozen=True)
class KeepRule:
    """How much of a history the table keeps."""

    keep_events: int
    stride_events: int

    @property
    def most_needed(self) -> int:
        """The most events of one user that decide their row: those kept at worst, and the one before."""
        return self.keep_events + self.stride_events

    def first_index(self, num_events_total: Int64) -> Int64:
        """Absolute index of the first event kept."""
        return np.maximum(num_events_total - self.keep_events, 0) // self.stride_events * self.stride_events


@dataclass(frozen=True)
class Older:
    """What is known of events that are not there: of some users, how many older ones there were and when the last of them was.

    `last_ts` is `NO_EVENT_TS` where it is not needed: then enough younger events are known to be there.
    """

    user_id: pa.Array
    num_events: Int64
    last_ts: Int64

    @staticmethod
    def none(schema: EventSchema) -> "Older":
        """Nothing is missing."""
        return Older(pa.array([], schema.id_types[0]), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @staticmethod
    def concatenate(parts: list["Older"]) -> "Older":
        """All of them; a user may come more than once."""
        return Older(
            pa.concat_arrays([part.user_id for part in parts]),
            np.concatenate([part.num_events for part in parts]),
            np.concatenate([part.last_ts for part in parts]),
        )


def trim_events(events: pa.Table, user_key_E: Int64, schema: EventSchema, rule: KeepRule) -> tuple[Int64 | None, Older]:
    """Which rows of a block of the log can still matter (None: all), and how many older ones it had of whom.

    The last n events of a union are among the last n of its parts, so cutting each block first is exact, and it bounds what
    the busiest user sends to a bucket.
    """
    bin_E = user_key_E & np.int64(_NUM_BINS - 1)
    is_full = np.bincount(bin_E, minlength=_NUM_BINS) > rule.most_needed
    if not is_full.any():  # nobody has that many: cheaper to know than counting everybody
        return None, Older.none(schema)
    in_full_bin_E = is_full[bin_E]
    crowded_E = np.flatnonzero(in_full_bin_E)
    crowded = events.take(pa.array(crowded_E))
    order_E, start_U = order_events(crowded, schema)
    end_U = np.append(start_U[1:], len(order_E))
    keep_from_U = np.maximum(end_U - rule.most_needed, start_U)
    kept_E = np.arange(len(order_E)) >= np.repeat(keep_from_U, end_U - start_U)
    cut_U = keep_from_U > start_U
    users = single_array(crowded["user_id"]).take(pa.array(order_E[start_U[cut_U]])).cast(schema.id_types[0])
    num_older = (keep_from_U - start_U)[cut_U]
    last_ts = milliseconds(single_array(crowded["event_ts"]))[order_E[keep_from_U[cut_U] - 1]]
    rows = np.concatenate([np.flatnonzero(~in_full_bin_E), crowded_E[order_E[kept_E]]])
    return rows, Older(users, num_older, last_ts)


def build_sequences(events: pa.Table, older: Older, schema: EventSchema, rule: KeepRule) -> pa.Table:
    """Rows of the sequence table, sorted by user, of all users in `events`; dictionary columns stay what they are."""
    order_E, start_U = order_events(events, schema)
    end_U = np.append(start_U[1:], len(order_E))
    users = single_array(events["user_id"]).take(pa.array(order_E[start_U])).cast(schema.id_types[0])
    num_older_U, before_U = _of_users(older, users)
    total_U = end_U - start_U + num_older_U
    first_index_U = rule.first_index(total_U)
    keep_from_U = start_U + first_index_U - num_older_U
    length_U = end_U - keep_from_U
    offsets = offsets_of(length_U)
    kept_E = order_E
    if len(order_E) > offsets[-1]:
        kept_E = order_E[np.repeat(keep_from_U - offsets[:-1], length_U) + np.arange(offsets[-1])]
    time_E = milliseconds(single_array(events["event_ts"]))
    previous_U = np.where(keep_from_U > start_U, time_E[order_E[np.maximum(keep_from_U - 1, 0)]], before_U)
    fields = events.select([field.name for field in schema.event_fields()])
    wanted = schema.sequences_arrow()
    columns = {
        "user_id": users,
        "first_index": pa.array(first_index_U),
        "prev_event_ts": pa.array(previous_U, mask=first_index_U == 0),
        "num_events_total": pa.array(total_U),
    }
    lists = list_columns(offsets, fields.take(pa.array(kept_E)))
    return pa.table({f.name: lists[f.name] if f.name in lists else columns[f.name].cast(f.type) for f in wanted})


def events_of(rows: pa.Table, schema: EventSchema) -> pa.Table:
    """The events in the lists of `rows`, flat."""
    offsets_U1, _ = flat_list(rows["event_ts"])
    row_E = pa.array(np.repeat(np.arange(len(rows)), np.diff(offsets_U1)))
    names = [field.name for field in schema.event_fields()]
    return pa.table(
        {"user_id": single_array(rows["user_id"]).take(row_E)} | {name: flat_list(rows[name])[1] for name in names}
    )


def place_news(events: pa.Table, older: Older, base: pa.Table, rule: KeepRule) -> tuple[pa.Table, Older, int]:
    """Of an increment's events, and the `older` ones cut from its blocks: what has a place in the histories of `base`.

    `base` holds rows of the sequence table, whose lists are not needed. Of a user whose oldest events the table has cut, an event
    no younger than the last one cut is between events that are not known any more. It can be counted only where so many younger
    ones are there that nothing of that part is kept; else it comes too late. One at the very time of the last one cut may belong
    after events that the table keeps, so for it only younger news count. Gives the events that are placed, those that are only
    counted, and how many came too late.
    """
    users = single_array(base["user_id"])
    first_index_U, total_U = base["first_index"].to_numpy(), base["num_events_total"].to_numpy()
    cut_until_U = milliseconds(single_array(base["prev_event_ts"]), missing=int(NO_EVENT_TS))
    row_E = _rows_in(users, single_array(events["user_id"]))
    is_known_E = row_E >= 0
    time_E, cut_until_E = milliseconds(single_array(events["event_ts"])), cut_until_U[row_E]
    is_younger_E = ~is_known_E | (time_E > cut_until_E)

    def per_user(is_one_E: npt.NDArray[np.bool_]) -> Int64:
        return np.bincount(row_E[is_known_E & is_one_E], minlength=len(users))

    num_younger_U = per_user(is_younger_E)
    only_counts_U = total_U - first_index_U + num_younger_U >= rule.most_needed
    tied_only_counts_U = num_younger_U >= rule.most_needed
    num_late_U = per_user(~is_younger_E)
    num_tied_U = per_user(time_E == cut_until_E)
    num_counted_U = np.where(only_counts_U, num_late_U - num_tied_U, 0) + np.where(tied_only_counts_U, num_tied_U, 0)
    row_O = _rows_in(users, older.user_id)
    stays_O = (row_O < 0) | tied_only_counts_U[row_O] | (first_index_U[row_O] == 0)
    stays_O |= only_counts_U[row_O] & (older.last_ts < cut_until_U[row_O])
    late_U = np.flatnonzero(num_counted_U)
    counted = Older(users.take(pa.array(late_U)), num_counted_U[late_U], np.full(len(late_U), NO_EVENT_TS))
    remaining = Older(older.user_id.filter(pa.array(stays_O)), older.num_events[stays_O], older.last_ts[stays_O])
    num_too_late = int((num_late_U - num_counted_U).sum() + older.num_events[~stays_O].sum())
    return events.filter(pa.array(is_younger_E)), Older.concatenate([remaining, counted]), num_too_late


def totals_with(base: pa.Table, events: pa.Table, older: Older) -> Int64:
    """How many events each user of `base` or of the news has in all, in no stated order."""
    counts = pa.concat_tables(
        [
            pa.table({"user_id": base["user_id"], "n": base["num_events_total"]}),
            pa.table({"user_id": events["user_id"], "n": np.ones(len(events), np.int64)}),
            pa.table({"user_id": older.user_id, "n": older.num_events}),
        ]
    )
    return counts.group_by("user_id").aggregate([("n", "sum")])["n_sum"].to_numpy()


def news_rows(events: pa.Table, older: Older, schema: EventSchema) -> pa.Table:
    """One row a user with news: what `news_arrow` says."""
    rows = build_sequences(events, Older.none(schema), schema, KeepRule(max(len(events), 1), 1))
    num_older_U, _ = _of_users(older, single_array(rows["user_id"]))
    lists = rows.select([field.name for field in schema.event_fields()])
    return pa.table(
        {"user_id": rows["user_id"], NUM_OLDER: num_older_U} | dict(zip(lists.column_names, lists.columns, strict=True))
    )


def older_of_news(rows: pa.Table) -> Older:
    """What rows of news say of events that are only counted."""
    num_older = rows[NUM_OLDER].to_numpy()
    return Older(single_array(rows["user_id"]), num_older, np.full(len(rows), NO_EVENT_TS))


def merge_sequences(base: pa.Table, events: pa.Table, older: Older, schema: EventSchema, rule: KeepRule) -> pa.Table:
    """Rows of `base` with news added that `place_news` let through: equal to a build of all events at once."""
    users = single_array(base["user_id"])
    has_news_U = pc.is_in(users, single_array(events["user_id"]))
    changed = base.filter(has_news_U)
    before = milliseconds(single_array(changed["prev_event_ts"]), missing=int(NO_EVENT_TS))
    of_base = Older(single_array(changed["user_id"]), changed["first_index"].to_numpy(), before)
    all_events = pa.concat_tables([events_of(changed, schema), events]).combine_chunks()
    merged = build_sequences(all_events, Older.concatenate([of_base, older]), schema, rule)
    rows = pa.concat_tables([base.filter(pc.invert(has_news_U)), merged])
    return rows.take(pc.sort_indices(rows["user_id"]))


def order_events(events: pa.Table, schema: EventSchema) -> tuple[Int64, Int64]:
    """The rows by user and then in the one order of a user's events, and where each user starts in that order.

    Times decide nearly always, so one sort of (user, time) in one integer comes first, and only rows that agree in both are
    ordered by the other columns. Rows that compare equal are equal.
    """
    rank_E, num_users = _user_ranks(single_array(events["user_id"]))
    time_E = milliseconds(single_array(events["event_ts"]))
    key_E, time_bits = _packed(rank_E, num_users, time_E)
    if key_E is not None:
        order_E = np.argsort(key_E)
        key_E = key_E[order_E]
        new_user_E, new_time_E = changes(key_E >> time_bits), changes(key_E)
    else:
        order_E = np.lexsort((time_E, rank_E))
        new_user_E = changes(rank_E[order_E])
        new_time_E = new_user_E | changes(time_E[order_E])
    tied_E = ~new_time_E
    tied_E[:-1] |= tied_E[1:]
    if tied_E.any():
        tied = order_E[tied_E]
        rest = [field.name for field in schema.event_fields() if field.name != "event_ts"]
        rows = plain(events.select(rest).take(pa.array(tied)))
        rows = rows.append_column("_run", pa.array(np.cumsum(new_time_E[tied_E])))
        by_rest = pc.sort_indices(rows, [("_run", "ascending"), *((name, "ascending") for name in rest)])
        order_E[tied_E] = tied[by_rest.to_numpy()]
    return order_E, np.flatnonzero(new_user_E)


def _user_ranks(users: pa.Array) -> tuple[Int64, int]:
    """Each row's user as a number that ascends with the user id, and how many users there are."""
    encoded = users if pa.types.is_dictionary(users.type) else users.dictionary_encode()
    by_id = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(by_id), np.int64)
    rank[by_id] = np.arange(len(by_id))
    return rank[encoded.indices.to_numpy()], len(by_id)


def _packed(rank_E: Int64, num_users: int, time_E: Int64) -> tuple[Int64 | None, int]:
    """User and time in one integer that sorts as the pair does, if 63 bits hold them; and how many of its bits are the time's."""
    if not len(time_E):
        return time_E, 0
    since_first_E = time_E - time_E.min()
    time_bits = int(since_first_E.max()).bit_length()
    if num_users.bit_length() + time_bits > _KEY_BITS:
        return None, 0
    return rank_E << time_bits | since_first_E, time_bits


def _of_users(older: Older, users: pa.Array) -> tuple[Int64, Int64]:
    """How many older events each of these users had, and the time of the last of them where it is known."""
    row = pc.index_in(older.user_id, users)
    known = row.is_valid().to_numpy(zero_copy_only=False)
    rows = row.drop_null().to_numpy()
    num_events_U, last_U = np.zeros(len(users), np.int64), np.full(len(users), NO_EVENT_TS)
    np.add.at(num_events_U, rows, older.num_events[known])
    np.maximum.at(last_U, rows, older.last_ts[known])
    return num_events_U, last_U


def _rows_in(users: pa.Array, wanted: pa.Array) -> Int64:
    """The row of each wanted user, -1 for one who is not there."""
    return pc.fill_null(pc.index_in(wanted, users), -1).to_numpy().astype(np.int64)


def plain(table: pa.Table) -> pa.Table:
    """Dictionary columns as their values, which is what sorts."""
    values = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(values))
