"""The item catalogue: all items, and their features, so that a request may name candidates by id only. No torch; local or S3.

A version is one Parquet file, ascending by item: `item_id`, its features as first seen in the log that a version of the
sequence table was built from, and when that was. The request table gives its candidates the same.

I items of the catalogue, C items looked up.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from longer.arrays import Int64
from longer.data.columns import numbers, single_array
from longer.data.parquet import read_columns
from longer.data.tables import open_version
from longer.hashing import stable_keys
from longer.schema import EventSchema
from longer.storage import TABLE_FORMAT, fingerprint


def items_version(sequences_id: str, schema: EventSchema) -> str:
    """The version of the catalogue that belongs to a version of the sequence table."""
    return fingerprint("items", TABLE_FORMAT, sequences_id, schema.hash())


def read_items(path: str, sequences_id: str, schema: EventSchema) -> pa.Table:
    """The catalogue that belongs to a version of the sequence table."""
    version = open_version(path, schema, items_version(sequences_id, schema), "jobs.build_sequences")
    return read_columns(version.files()[0])


class ItemTable:
    """Features of items by key, all in memory: about 8 bytes an item and feature, and 25 to 50 an item to find it by."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.version = open_version(path, schema, version_id, "jobs.build_sequences")
        rows = read_columns(self.version.files()[0])
        item_key_I = stable_keys(rows["item_id"])
        first_I = np.sort(np.unique(item_key_I, return_index=True)[1])
        # Hashed, a tenth of the time of a binary search: which pandas does of a million ascending keys, so these stay as they come.
        self._places = pd.Index(item_key_I[first_I])
        self._features: dict[str, npt.NDArray] = {
            **{name: stable_keys(rows[name])[first_I] for name in schema.features_of("item", "categorical")},
            **{name: numbers(single_array(rows[name]))[first_I] for name in schema.features_of("item", "numeric")},
        }
        self.lookup(np.zeros(1, np.int64))  # hashes them, in tens of ms: here, not where the first batch waits for it

    def __len__(self) -> int:
        return len(self._places)

    def lookup(self, item_key_C: Int64) -> dict[str, npt.NDArray]:
        """Each item's features, as the model reads them; 0 for an item that is not in the catalogue."""
        place_C = self._places.get_indexer(item_key_C)  # type: ignore[arg-type]
        found = {
            name: x_I[place_C] if len(self) else np.zeros(len(item_key_C), x_I.dtype)
            for name, x_I in self._features.items()
        }
        for values_C in found.values():
            values_C[place_C < 0] = 0
        return found
