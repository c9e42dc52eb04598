"""The item catalogue: each item's features, so that a request may name candidates by id only. No torch; local or S3.

A version is one Parquet file, ascending by item: `item_id` and the item features as first seen in the sequence table, which
are also the ones that the request table gives its candidates.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from longer.arrays import Int64
from longer.data.columns import numbers, read_columns, single_array
from longer.data.tables import open_version
from longer.hashing import stable_keys
from longer.schema import EventSchema
from longer.storage import TABLE_FORMAT, Table, Version, checked_output, fingerprint


def publish_items(path: str, sequences_id: str, schema: EventSchema, build: Callable[[], pa.Table]) -> Version:
    """The catalogue of all items in a version of the sequence table, which `build` makes if it is not there yet."""
    table = Table(path)
    version_id = items_version(sequences_id, schema)
    if published := table.reuse(version_id):
        return published
    items = build()
    with checked_output(table.begin(version_id), "part-0.parquet") as sink:
        pq.write_table(items, sink, compression="zstd")
    manifest = {"schema_hash": schema.hash(), "inputs": {"sequences": sequences_id}, "num_rows": len(items)}
    return table.publish(version_id, manifest, [sink.data_file])


def items_version(sequences_id: str, schema: EventSchema) -> str:
    """The version of the catalogue that belongs to a version of the sequence table."""
    return fingerprint("items", TABLE_FORMAT, sequences_id, schema.hash())


class ItemTable:
    """Features of items by key, all in memory: about 8 bytes an item and feature."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.version = open_version(path, schema, version_id, "jobs.build_sequences")
        rows = read_columns(self.version.files()[0])
        item_key_I = stable_keys(rows["item_id"])
        order_I = np.argsort(item_key_I)
        self._item_key_I = item_key_I[order_I]
        self._features: dict[str, npt.NDArray] = {
            **{name: stable_keys(rows[name])[order_I] for name in schema.features_of("item", "categorical")},
            **{name: numbers(single_array(rows[name]))[order_I] for name in schema.features_of("item", "numeric")},
        }

    def __len__(self) -> int:
        return len(self._item_key_I)

    def lookup(self, item_key_C: Int64) -> dict[str, npt.NDArray]:
        """Each item's features, as the model reads them; 0 for an item that is not in the catalogue."""
        place_C = np.minimum(np.searchsorted(self._item_key_I, item_key_C), max(len(self) - 1, 0))
        known_C = self._item_key_I[place_C] == item_key_C if len(self) else np.zeros(len(item_key_C), bool)
        return {
            name: np.where(known_C, x_I[place_C], x_I.dtype.type(0))
            if len(self)
            else np.zeros(len(item_key_C), x_I.dtype)
            for name, x_I in self._features.items()
        }


def item_features(schema: EventSchema, given: dict[str, pa.Array]) -> dict[str, npt.NDArray]:
    """Given features of candidates as the model reads them: keys of categories, numbers as float32."""
    return {
        name: stable_keys(values) if name in schema.features_of("item", "categorical") else numbers(values)
        for name, values in given.items()
    }
