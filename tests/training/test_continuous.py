"""Until when a continued model has trained: what comes later is trained the next time."""

import pytest

from longer.storage import Version
from longer.training.continuous import requests_end

EVENTS, IMPRESSIONS = "2026-01-05T10:00:00.000+00:00", "2026-01-04T10:00:00.000+00:00"


@pytest.mark.parametrize(
    ("stated", "due"),
    [
        ({"watermark": EVENTS}, "2026-01-05T10:00:00.001+00:00"),
        ({"watermark": EVENTS, "requests_until": IMPRESSIONS}, "2026-01-04T10:00:00.001+00:00"),
    ],
)
def test_impressions_that_come_after_the_events_of_their_day_are_not_taken_for_trained(
    stated: dict[str, str], due: str
) -> None:
    assert requests_end(Version("v1", "requests/v1", stated)) == due
