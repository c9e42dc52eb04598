"""Importer of KuaiRand (27K, 1K and Pure): every video shown to Kuaishou users in 2022, with twelve kinds of feedback.

Read are log_standard_*.csv, the recommended feed, and log_random_*.csv, videos put into it at random (`is_rand` is 1). `action` is
'click' or, where there was none, 'impression'; the signals, times and `tab` are there for the schema to choose as features.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from longer.datasets.readers import text_batches
from longer.datasets.source import Part, log_parts, require_parts
from longer.table_settings import TimeUnit

PROVENANCE = "KuaiRand by Gao et al. (CIKM 2022), CC BY-SA 4.0: logs of the Kuaishou app, ids anonymised."
TIME_UNIT: TimeUnit = "ms"
_KEYS = {"user_id": "user_id", "item_id": "video_id", "event_ts": "time_ms", "action": "is_click"}
_FEATURES = (
    *(
        "is_click",
        "is_like",
        "is_follow",
        "is_comment",
        "is_forward",
        "is_hate",
        "long_view",
        "play_time_ms",
        "duration_ms",
    ),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)


def locate(source: str) -> list[Part]:
    parts = log_parts(source, ["log_standard_*.csv", "log_random_*.csv"])
    return require_parts(source, parts, "log_standard_*.csv or log_random_*.csv")


def read(part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
    columns = {**_KEYS, **{name: name for name in _FEATURES}}
    chosen = {name: column for name, column in columns.items() if name in names}
    for batch in text_batches(part.path, chosen, start=part.start, stop=part.stop):
        clicked = pc.fill_null(pc.equal(batch["action"], "1"), False)
        action = pc.if_else(clicked, "click", "impression")
        yield batch.set_column(batch.column_names.index("action"), "action", action)
