"""Generic logs for the tests of imports: a few days as files, and settings that import them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longer.config import Settings, load_settings

MAY_1_S = 1_556_668_800


def day(number: int, num_rows: int = 20) -> dict[str, list]:
    """Columns of one day's file; every value tells its row."""
    rows = range(number * 1000, number * 1000 + num_rows)
    return {
        "user_id": [row % 7 for row in rows],
        "item_id": list(rows),
        "event_ts": [(MAY_1_S + number * 86_400 + place * 60) * 1000 for place in range(num_rows)],
        "action": ["view"] * num_rows,
        "price": [row / 2 for row in rows],
    }


def write_day(folder: Path, number: int, **changes: Any) -> Path:
    """The day's file below `folder`, with some of its columns replaced."""
    path = folder / f"day-{number}.parquet"
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({**day(number), **changes}), path)
    return path


def settings_of(root: Path | str, source: Path | str, **changes: Any) -> Settings:
    """Settings that import any log into `root`; `changes` go to `import_events`."""
    features = [{"name": "price", "kind": "numeric", "of": "event"}]
    chosen = {"dataset": "generic", "source": str(source), "max_quarantined_share": 1.0, **changes}
    return load_settings(overrides={"root": str(root), "event_schema": {"features": features}, "import_events": chosen})
