"""Scores a split with the served checkpoint, offline: python -m jobs.batch_score --config configs/quickstart.yaml"""

from typing import Any

from longer.config import Settings
from longer.progress import say
from longer.runner import run_job
from longer.serving.batch import batch_score, check_against_online


def run(settings: Settings) -> dict[str, Any]:
    """Publishes the scores; returns rows, rows a second, and the largest difference from the scores served online."""
    check = check_against_online(settings, batch_score(settings))
    say(
        "batch_score",
        f"largest difference from online scores: {check['max_abs_diff_vs_online']}, "
        f"{check['compared_requests']} requests compared",
    )
    return check


if __name__ == "__main__":
    run_job(__doc__, run)
