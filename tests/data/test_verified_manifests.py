"""What the requests' manifest says of the sequences is compared with them, whatever the requests were made from."""

from collections import Counter
from datetime import datetime

import pytest

from longer.data.findings import BucketReport, Findings
from longer.data.verified_files import Source
from longer.data.verified_manifests import check_manifests
from longer.storage import Version

SPAN = {"first_event_ts": "2026-01-01T00:00:00+00:00", "watermark": "2026-01-09T00:00:00+00:00"}


@pytest.mark.parametrize("inputs", [{"sequences": "s"}, {"sequences": "s", "impressions": "i"}])
def test_a_number_of_lost_events_that_is_not_the_sequences_is_found_with_impressions_too(
    inputs: dict[str, str],
) -> None:
    asked = {"max_cut_share": 1.0, "validation_days_share": 0.1, "test_days_share": 0.1}
    stated = {"inputs": inputs, "settings": asked, "num_events_not_kept": 77, **SPAN}
    sources = [Source(name, Version(name, name, about), ()) for name, about in (("s", SPAN), ("r", stated))]
    report = BucketReport(Findings(99), Findings(99), Counter({"events": 9, "events kept": 5}))
    check_manifests(*sources, None, 3, report, {})
    assert "r, version r: num_events_not_kept is 77, the files hold 4" in report.found.shown["row_count"]


@pytest.mark.parametrize("watermark", ["2026-01-09T00:00:00", "2026-01-09", "soon", 9, None])
def test_a_time_without_a_zone_is_no_moment_and_no_traceback(watermark: object) -> None:
    """By the local clock it would be another one on each machine."""
    about = {**SPAN, "num_rows": 0, "watermark": watermark}
    report = BucketReport(Findings(99), Findings(99), Counter({"events kept": 1}))
    report.oldest_ms, report.newest_ms = (
        round(datetime.fromisoformat(time).timestamp() * 1000) for time in SPAN.values()
    )
    check_manifests(Source("s", Version("s", "s", about), ()), None, None, 3, report, {})
    told = f"s, version s: watermark is {watermark}, not 2026-01-09"
    assert any(line.startswith(told) for line in report.found.shown["manifest"])
