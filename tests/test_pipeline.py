"""The quickstart in small, as a user runs it: every stage for real, then again, then with one setting changed.

Takes about a minute and a half: each run starts a Ray, the first one also trains on two workers and serves over HTTP.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
SIZES = {
    "sequences.num_buckets": 2,
    "model.history_events": 64,
    "model.query_groups": 8,
    "model.stride_groups": 4,
    "model.item_rows": 512,
    "model.user_rows": 64,
    "model.categorical_rows": 64,
    "train.tokens_per_step": 2048,
    "train.validate_every_steps": 10,
    "requests.validation_days_share": 0.1,
    "serve.check_requests": 30,
    "serve.port": 18421,
    "ray.object_store_bytes": 256 << 20,
}


def write_purchases(folder: Path, num_users: int = 24, num_days: int = 40, num_items: int = 80) -> None:
    """A log in the importer's own format: each household buys a few of its favourites, and something else, on most days."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, num_users + 1):
        favourites = rng.choice(num_items, 8, replace=False)
        for day in range(num_days):
            if rng.random() < 0.7:
                bought = np.unique(np.append(rng.choice(favourites, 3), rng.integers(num_items, size=2)))
                rows += [(user, user * 1000 + day, int(item) + 1, day, user) for item in bought]
    user, basket, item, day, minute = (np.array(column) for column in zip(*rows, strict=True))
    start = np.datetime64("2021-03-01T08:00", "ms")
    transactions = {
        "household_id": user,
        "basket_id": basket,
        "product_id": item,
        "quantity": np.ones(len(rows), np.int64),
        "sales_value": rng.random(len(rows)).round(2),
        "transaction_timestamp": start + day * np.timedelta64(1, "D") + minute * np.timedelta64(1, "m"),
    }
    ids = np.arange(1, num_items + 1)
    products = {
        "product_id": ids,
        "product_category": [f"C{i % 7}" for i in ids],
        "department": ["GROCERY"] * num_items,
    }
    pq.write_table(pa.table(transactions), folder / "transactions.parquet")
    pq.write_table(pa.table(products), folder / "products.parquet")


def pipeline(source: Path, root: Path, *more: str) -> str:
    """What a run says; it must succeed."""
    settings = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    where = ["--root", os.path.relpath(root, ROOT), "--import_events.source", str(source)]  # as in the README: relative
    command = [sys.executable, "-m", "jobs.pipeline", "--config", "configs/quickstart.yaml", *where, *settings, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "LONGER_SCORING_TOKEN": "the check sends it too"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.ray
def test_two_runs_make_one_report_whose_scores_agree(tmp_path: Path) -> None:
    source, root = tmp_path / "log", tmp_path / "run"
    source.mkdir()
    write_purchases(source)
    said = pipeline(source, root)
    report = json.loads((root / "report.json").read_text())
    assert set(report["test"]) >= {"auc", "gauc", "logloss", "ne"}
    assert set(report["baselines"]) == {"popularity", "count_last_20", "count_last_100", "count_last_1000", "count_all"}
    assert report["serving"]["max_abs_diff_vs_offline"] <= 1e-5
    assert report["batch"]["max_abs_diff_vs_online"] <= 1e-5
    assert report["serving"]["requests"] >= 30
    assert report["serving"]["cache"]["hit"] > 0
    assert report["serving"]["cache"]["append"] > 0
    assert report["batch"]["rows"] > 0
    assert report["batch"]["rows_per_s"] > 0
    assert min(report["stages"].values()) > 0
    told = dict(re.findall(r"(\w+): version (\w+)", said))
    assert {"evaluate", "batch_score"} <= told.keys()
    assert {name: report["versions"][name] for name in told} == told, "the report names versions that no one has seen"
    page = (root / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script""", page), "the page loads something"

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    said = pipeline(source, root)
    assert said.count("nothing changed") == 8
    assert json.loads((root / "report.json").read_text()) == report
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")} == before
