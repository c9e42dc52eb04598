"""Lists of strings read as dictionaries mean what the strings do."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.columns import keys_of_lists
from longer.data.parquet import open_encoded, read_encoded, read_row_groups
from longer.hashing import stable_keys


def test_categories_read_as_dictionaries_have_the_keys_of_their_texts(tmp_path: Path) -> None:
    """Missing and empty ones too, in lists of no event, in row groups of other texts, and past the end of a file's dictionary."""
    texts = [None, "", *(f"text {n}" for n in range(300))]
    rng = np.random.default_rng(0)
    tables = []
    for first in (0, 150):
        lists = [[texts[n] for n in rng.integers(first, first + 152, size)] for size in (0, 1, 200, 0, 400)]
        tables.append(pa.table({"category": pa.array(lists, pa.list_(pa.string())), "row": np.arange(5) + first}))
    path = f"{tmp_path}/rows.parquet"
    with pq.ParquetWriter(path, tables[0].schema, dictionary_pagesize_limit=500) as writer:
        for table in tables:
            writer.write_table(table)
    expected = stable_keys(pa.concat_tables(tables)["category"].combine_chunks().flatten())
    for whole in (
        read_encoded(path, ["category"], ["category"]),
        read_row_groups(path, os.path.getsize(path), pq.read_metadata(path), [0, 1], ["category", "row"]),
    ):
        assert pa.types.is_dictionary(whole["category"].type.value_type)
        assert keys_of_lists(whole["category"]).tolist() == expected.tolist()
    file = open_encoded(path, os.path.getsize(path), ["category"])
    batches = [b for group in (0, 1) for b in file.iter_batches(2, row_groups=[group], columns=["category"])]
    assert len(batches) == 6
    assert keys_of_lists(pa.Table.from_batches(batches)["category"]).tolist() == expected.tolist()
