"""Scores a split with the served checkpoint, offline: python -m jobs.batch_score --config configs/quickstart.yaml"""

from longer.config import Settings
from longer.progress import say
from longer.runner import run_job
from longer.serving.batch import batch_score, check_against_online
from longer.storage import Version


def run(settings: Settings) -> Version:
    """The record of the published scores: rows, rows a second, and the largest difference from the scores served online."""
    version = check_against_online(settings, batch_score(settings))
    check = version.manifest
    say(
        "batch_score",
        f"largest difference from online scores: {check['max_abs_diff_vs_online']}, "
        f"{check['compared_requests']} requests compared",
    )
    return version


if __name__ == "__main__":
    run_job(__doc__, run)
