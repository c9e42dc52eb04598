"""What an increment reads and refuses, and what parts report, told from descriptions of files alone."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from longer.data.import_plan import plan_import
from longer.data.import_report import PartReport
from longer.datasets.source import Part
from longer.errors import UserError
from longer.storage import Version
from tests.data.import_logs import settings_of


def test_a_joined_file_that_changed_refuses_an_increment(tmp_path: Path) -> None:
    ratings, products = (Part(f"/log/{name}", name, f"sha256:{name}", 1) for name in ("ratings.csv", "movies.csv"))
    settings = settings_of(tmp_path, "/log")
    first = plan_import(settings, [replace(ratings, joined=(products,))], None)
    base = Version(first.version_id, "/tables/events", first.manifest([]))
    assert plan_import(settings, [replace(ratings, joined=(products,))], base).parts == []
    for joined in ((replace(products, content_id="sha256:other"),), ()):
        with pytest.raises(UserError, match=r"^movies.csv: has changed since version"):
            plan_import(settings, [replace(ratings, joined=joined)], base)


def test_a_log_that_moved_to_another_kind_of_store_is_not_read_twice(tmp_path: Path) -> None:
    part = Part("/log/a.csv", "a.csv", "sha256:1", 1)
    first = plan_import(settings_of(tmp_path, "/log"), [part], None)
    base = Version(first.version_id, "/tables/events", first.manifest([]))
    moved = Part("s3://bucket/log/a.csv", "a.csv", "etag:1-1", 1)
    with pytest.raises(UserError, match=r"^a.csv: has changed since version"):
        plan_import(settings_of(tmp_path, "s3://bucket/log"), [moved], base)


def test_first_and_last_times_are_those_of_all_batches_whatever_their_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        report = PartReport("sha256:1", "a.csv", 0)
        for number in order:
            good = pa.table({"event_ts": pa.array([number * 10 + 5, number * 10], pa.timestamp("ms", tz="UTC"))})
            report.count(good, pa.table({"reason": pa.array(["null item_id"] * number, pa.string())}))
        assert (report.num_rows, report.first_ts, report.last_ts) == (6, 0, 25)
        assert report.reasons == {"null item_id": 3}
