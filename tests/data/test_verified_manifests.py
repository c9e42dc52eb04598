"""What the requests' manifest says of the sequences is compared with them, whatever the requests were made from."""

from collections import Counter

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
