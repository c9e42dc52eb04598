"""What an item was when it was first seen: the features that requests give their candidates and the service knows by id."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import Int64
from longer.data.columns import single_array
from longer.schema import EventSchema


def first_seen(events: pa.Table, schema: EventSchema) -> pa.Table:
    """One row an item, ascending: `item_id`, `event_ts` of its earliest event, and that event's features (ties: the smallest).

    The first seen of a union is the first seen of its parts' first seen, in any order.
    """
    names = ["item_id", *schema.features_of("item")]
    distinct = events.group_by(names).aggregate([("event_ts", "min")]).rename_columns([*names, "event_ts"])
    order = [(name, "ascending") for name in ("item_id", "event_ts", *schema.features_of("item"))]
    ascending = distinct.sort_by(order).select(["item_id", "event_ts", *schema.features_of("item")])
    return ascending.take(pa.array(run_starts(single_array(ascending["item_id"]))))


def run_starts(values: pa.Array) -> Int64:
    """Where each run of equal values starts."""
    if not len(values):
        return np.zeros(0, np.int64)
    changes = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changes) + 1]).astype(np.int64)
