"""Small event logs for tests, and what the tables should say of them, computed one user and one event at a time."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from longer.schema import EventSchema, Feature

FEATURES = (
    Feature(name="category", kind="categorical", of="item"),
    Feature(name="quantity", kind="numeric", of="event"),
)
BASKETS = EventSchema(group_id="basket_id", features=FEATURES)
STRINGS = EventSchema(user_id="string", item_id="string", features=FEATURES)
DAY_MS = 86_400_000


@st.composite
def logs(draw: st.DrawFn, schema: EventSchema = BASKETS, max_users: int = 4, max_events: int = 40) -> pa.Table:
    """Logs with many ties in time and repeated items, in no order."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(1, max_users), st.integers(0, 12), st.integers(1, 9), st.integers(0, 2)),
            min_size=1,
            max_size=max_events,
        )
    )
    return log(rows, schema)


def log(rows: list[tuple[int, int, int, int]], schema: EventSchema = BASKETS) -> pa.Table:
    """Events from (user, day, item, quantity); a user's events of a day are one basket."""
    user, day, item, quantity = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    as_id = (lambda ids: [f"id{i}" for i in ids]) if schema.user_id == "string" else (lambda ids: ids.tolist())
    columns: dict[str, Any] = {
        "user_id": as_id(user),
        "event_ts": (day + 17_000) * DAY_MS,
        "basket_id": user * 1000 + day,
        "item_id": as_id(item),
        "action": ["purchase"] * len(rows),
        "category": [None if i % 4 == 0 else f"c{i % 3}" for i in item],
        "quantity": quantity.astype(np.float32),
    }
    wanted = schema.events_arrow()
    return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in wanted}, schema=wanted)


def generated_log(num_users: int, num_days: int, seed: int) -> pa.Table:
    """A log in which every user buys up to 5 items on most days."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, day, int(item), int(rng.integers(1, 4)))
        for user in range(1, num_users + 1)
        for day in range(num_days)
        for item in rng.integers(1, 200, rng.integers(0, 6))
    ]
    return log(rows)


def naive_sequences(
    events: pa.Table, schema: EventSchema, keep_events: int, stride_events: int
) -> list[dict[str, Any]]:
    """The sequence table by its definition, in plain Python."""
    names = [field.name for field in schema.event_fields()]

    def order(event: dict[str, Any]) -> list[tuple[bool, Any]]:
        return [(event[name] is None, 0 if event[name] is None else event[name]) for name in names]  # nulls last

    by_user: dict[Any, list[dict[str, Any]]] = {}
    for event in events.to_pylist():
        by_user.setdefault(event["user_id"], []).append(event)
    rows = []
    for user in sorted(by_user):
        history = sorted(by_user[user], key=order)
        first = max(0, len(history) - keep_events) // stride_events * stride_events
        rows.append(
            {
                "user_id": user,
                "first_index": first,
                "prev_event_ts": history[first - 1]["event_ts"] if first else None,
                "num_events_total": len(history),
                **{name: [event[name] for event in history[first:]] for name in names},
            }
        )
    return rows
