"""A small log of events and of what was shown to whom, and requests as their definition says, one at a time."""

from typing import Any

import numpy as np
import pyarrow as pa

from longer.schema import EventSchema, Feature
from tests.data.logs import DAY_MS

SHOP = EventSchema(
    features=(
        Feature(name="category", kind="categorical", of="item"),
        Feature(name="price", kind="numeric", of="event"),
        Feature(name="device", kind="categorical", of="request"),
        Feature(name="page", kind="numeric", of="request"),
    ),
    tasks=("click", "like", "watch_s"),
)
FIRST_MS = 17_000 * DAY_MS


def events(rows: list[tuple[int, int, int]]) -> pa.Table:
    """Events of (user, time, item)."""
    user, time, item = (list(column) for column in zip(*rows, strict=True))
    columns: dict[str, Any] = {
        "user_id": user,
        "event_ts": [FIRST_MS + t for t in time],
        "item_id": item,
        "action": ["buy"] * len(rows),
        "category": [f"c{i % 3}" for i in item],
        "price": [float(i) for i in item],
    }
    return _table(columns, SHOP.events_arrow())


def impressions(rows: list[dict[str, Any]], group_id: str | None = None) -> pa.Table:
    """Impressions of user, time, item, device, page and labels, and of the item's category if another one is told."""
    columns: dict[str, Any] = {
        "user_id": [row["user"] for row in rows],
        "event_ts": [FIRST_MS + row["time"] for row in rows],
        "item_id": [row["item"] for row in rows],
        "action": ["event"] * len(rows),
        "category": [row.get("category", f"c{row['item'] % 3}") for row in rows],
        **{name: [row[name] for row in rows] for name in ("device", "page", *SHOP.tasks)},
        **({group_id: [row["group"] for row in rows]} if group_id else {}),
    }
    return _table(columns, SHOP.of_impressions(group_id).events_arrow())


def shop_log(num_users: int, num_days: int, seed: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Events on most days, and three requests a day of four items each; a user in seven has no event at all.

    Phones click on all that they are shown, desktops on nothing; who clicks watches for two seconds. All on page 200 is liked,
    nothing on page 1.
    """
    rng = np.random.default_rng(seed)
    happened, shown = [], []
    for user in range(1, num_users + 1):
        for day in range(num_days):
            start = day * DAY_MS
            if user % 7:
                happened += [(user, start + int(rng.integers(0, DAY_MS)), int(i)) for i in rng.integers(1, 60, 2)]
            for time in rng.choice(DAY_MS, 3, replace=False):
                device, page = ("phone", "desktop")[rng.integers(2)], float(rng.choice([1, 200]))
                click = float(device == "phone")
                for item in rng.choice(59, 4, replace=False) + 1:
                    about = {"user": user, "time": start + int(time), "item": int(item), "device": device, "page": page}
                    shown.append({**about, "click": click, "like": float(page > 1), "watch_s": 2 * click or None})
    return events(happened), shown


def _table(columns: dict[str, Any], wanted: pa.Schema) -> pa.Table:
    return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in wanted}, schema=wanted)
