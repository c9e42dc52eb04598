"""Importer of Yambda (50M, 500M, 5B): listens, likes and dislikes of a million users of a music service, in flat Parquet files.

Times count seconds, in steps of five, from a moment that is not told; they are kept as they are, so events seem to be of 1970.
Where multi_event.parquet is there, it alone is read: the other files hold the same events by kind.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from longer.datasets.readers import naming, parquet_batches
from longer.datasets.source import Part, log_parts, require_parts
from longer.files import arrow_filesystem
from longer.table_settings import TimeUnit

PROVENANCE = "Yambda by Yandex (arXiv 2505.22238), Apache-2.0: real behaviour, ids and the calendar are anonymised."
TIME_UNIT: TimeUnit = "relative_s"
_ALL = "multi_event.parquet"
_ACTIONS = {f"{action}s.parquet": action for action in ("listen", "like", "dislike", "unlike", "undislike")}
_COLUMNS = {"user_id": "uid", "item_id": "item_id", "event_ts": "timestamp", "is_organic": "is_organic"}
_OF_LISTENS = ("played_ratio_pct", "track_length_seconds")


def locate(source: str) -> list[Part]:
    parts = log_parts(source, [_ALL, *_ACTIONS])
    whole = [part for part in parts if _file_name(part) == _ALL]
    return require_parts(source, whole or parts, f"{_ALL} or {', '.join(_ACTIONS)}")


def read(part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
    """Files of one kind get its `action`; what only listens have is null elsewhere."""
    filesystem, bare = arrow_filesystem(part.path)
    with naming(part.path):
        there = pq.read_schema(bare, filesystem=filesystem).names
    action = _ACTIONS.get(_file_name(part))
    optional = [name for name in _OF_LISTENS if action in (None, "listen") or name in there]
    columns = {**_COLUMNS, **{name: name for name in optional}, **({} if action else {"action": "event_type"})}
    chosen = {name: column for name, column in columns.items() if name in names}
    for batch in parquet_batches(part.path, chosen, part.start, part.stop):
        if action:
            batch = batch.append_column("action", pa.repeat(action, len(batch)))
        for name in _OF_LISTENS:
            if name in names and name not in chosen:
                batch = batch.append_column(name, pa.nulls(len(batch)))
        yield batch


def _file_name(part: Part) -> str:
    return part.path.rpartition("/")[2]
