"""Importer of Taobao's UserBehavior.csv: 100 million clicks, purchases, additions to cart and favourites of a million users.

No header: user, item, category, behaviour (pv, buy, cart, fav), seconds since 1970. The log is said to cover 2017-11-25 to
2017-12-03, yet holds times in the future and before 1970, which the import quarantines, and others outside those days.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from longer.datasets.readers import text_batches
from longer.datasets.source import Part, log_parts, require_parts
from longer.table_settings import TimeUnit

PROVENANCE = (
    "User Behavior Data from Taobao for Recommendation, Alibaba, through Tianchi, under the terms stated there; "
    "real behaviour, ids are serial numbers."
)
TIME_UNIT: TimeUnit = "s"
_COLUMNS = ("user_id", "item_id", "category", "action", "event_ts")


def locate(source: str) -> list[Part]:
    return require_parts(source, log_parts(source, ["UserBehavior*.csv"]), "UserBehavior.csv")


def read(part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
    columns = {name: name for name in _COLUMNS if name in names}
    return text_batches(part.path, columns, _COLUMNS, start=part.start, stop=part.stop)
