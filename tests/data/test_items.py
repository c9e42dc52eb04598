"""The item catalogue in memory."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.items import ItemTable
from longer.hashing import stable_keys
from longer.storage import Table, checked_output
from tests.data.logs import BASKETS


def item_table(path: Path, item_ids: list[int] | np.ndarray) -> ItemTable:
    """Items whose category is their number."""
    table = Table(str(path))
    with checked_output(table.begin("v1"), "part-0.parquet") as sink:
        pq.write_table(
            pa.table({"item_id": pa.array(item_ids, pa.int64()), "category": np.arange(len(item_ids))}), sink
        )
    table.publish("v1", {"schema_hash": BASKETS.hash()}, [sink.data_file])
    return ItemTable(str(path), BASKETS, "v1")


def test_an_item_has_its_own_features_the_first_ones_if_it_is_there_twice_and_none_if_it_is_not(tmp_path: Path) -> None:
    found = item_table(tmp_path / "some", [30, 10, 30, 20]).lookup(stable_keys(pa.array([20, 99, 10, 30, 20])))
    keys = stable_keys(pa.array([3, 0, 1, 0, 3]))
    assert found["category"].tolist() == [keys[0], 0, keys[2], keys[3], keys[4]]
    none = item_table(tmp_path / "none", [])
    assert none.lookup(stable_keys(pa.array([1, 2])))["category"].tolist() == [0, 0]


def test_a_million_items_are_hashed_when_they_are_read_and_not_searched_for_each_batch(tmp_path: Path) -> None:
    item_ids = np.arange(1_000_500)
    items, keys = item_table(tmp_path, item_ids), stable_keys(pa.array(item_ids))
    asked, ascending = np.random.default_rng(0).choice(keys, 8_000), np.sort(keys)
    started = time.process_time()
    items.lookup(asked)
    first_s = time.process_time() - started
    searched_s = least_s(lambda: np.searchsorted(ascending, asked))
    assert least_s(lambda: items.lookup(asked)) < searched_s / 2
    assert first_s < 0.02


def least_s(work: Callable[[], object]) -> float:
    """Of the processor, the least of twenty times."""
    times_s = []
    for _ in range(20):
        started = time.process_time()
        work()
        times_s.append(time.process_time() - started)
    return min(times_s)
