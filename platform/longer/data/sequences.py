"""Events to sequences, as pure Arrow/NumPy kernels: one row a user, lists oldest to newest.

Events of a user are ordered by `event_ts`, then by every other column in schema order, so that the order never depends on how
the log was cut into files. Kept are the last `keep_events`, rounded up so that the first one kept has an absolute index that
is a multiple of the stride; one event more is needed for `prev_event_ts`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Int64
from longer.data.columns import list_columns, single_array
from longer.hashing import bucket_of, stable_keys
from longer.schema import EventSchema

NUM_DROPPED = "num_dropped"
"""Extra column of trimmed events: on a user's first row of a block, how many older ones the block had."""


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


def trim_events(events: pa.Table, schema: EventSchema, rule: KeepRule, num_buckets: int) -> pa.Table:
    """A block of the log with `bucket` and `num_dropped`, cut to the events that can still matter.

    The last n events of a union are among the last n of its parts, so cutting each block first is exact, and it bounds what
    the busiest user sends through the shuffle.
    """
    counts = pc.value_counts(events["user_id"])
    busy = counts.field("values").filter(pc.greater(counts.field("counts"), rule.most_needed))
    num_dropped = np.zeros(len(events), np.int64)
    if len(busy):
        is_busy = single_array(pc.is_in(events["user_id"], busy))
        cut = sort_events(events.filter(is_busy), schema)
        start_U, end_U = _user_runs(cut)
        keep_from_U = np.maximum(end_U - rule.most_needed, start_U)
        place = np.arange(len(cut))
        kept = place >= np.repeat(keep_from_U, end_U - start_U)
        dropped = np.zeros(len(cut), np.int64)
        dropped[keep_from_U] = keep_from_U - start_U
        rest = events.filter(pc.invert(is_busy))
        events = pa.concat_tables([rest, cut.filter(pa.array(kept))])
        num_dropped = np.concatenate([np.zeros(len(rest), np.int64), dropped[kept]])
    bucket = bucket_of(stable_keys(events["user_id"]), num_buckets)
    return events.append_column("bucket", pa.array(bucket)).append_column(NUM_DROPPED, pa.array(num_dropped))


def build_sequences(trimmed: pa.Table, schema: EventSchema, rule: KeepRule) -> pa.Table:
    """Rows of the sequence table, sorted by user, from all trimmed events of their users."""
    events = sort_events(trimmed, schema)
    start_U, end_U = _user_runs(events)
    total_U = end_U - start_U + np.add.reduceat(events[NUM_DROPPED].to_numpy(), start_U)
    first_index_U = rule.first_index(total_U)
    keep_from_U = end_U - (total_U - first_index_U)
    times = events["event_ts"].to_numpy(zero_copy_only=False)
    has_before_U = first_index_U > 0
    prev = pa.array(times[np.maximum(keep_from_U - 1, 0)], mask=~has_before_U)
    kept = np.arange(len(events)) >= np.repeat(keep_from_U, end_U - start_U)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(end_U - keep_from_U)])
    fields = [field.name for field in schema.event_fields()]
    lists = list_columns(offsets, events.select(fields).filter(pa.array(kept)))
    wanted = schema.sequences_arrow()
    columns = {
        "user_id": single_array(events["user_id"].take(pa.array(start_U))),
        "first_index": pa.array(first_index_U),
        "prev_event_ts": prev.cast(wanted.field("prev_event_ts").type),
        "num_events_total": pa.array(total_U),
        **lists,
    }
    return pa.table([columns[name].cast(wanted.field(name).type) for name in wanted.names], schema=wanted)


def sort_events(events: pa.Table, schema: EventSchema) -> pa.Table:
    """By user and then in the one order of a user's events; rows that compare equal are equal."""
    names = ["user_id", *(field.name for field in schema.event_fields())]
    return events.combine_chunks().sort_by([(name, "ascending") for name in names])


def _user_runs(events: pa.Table) -> tuple[Int64, Int64]:
    """Where each user's run of rows starts and ends, in a table sorted by user."""
    users = single_array(events["user_id"])
    changes = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(users)]]).astype(np.int64)
    return bounds[:-1], bounds[1:]
