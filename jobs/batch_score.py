"""Scores offline with the served checkpoint: a requests table, or users and items.

python -m jobs.batch_score --config my.yaml                                          # the test split of the root's requests
python -m jobs.batch_score --config my.yaml --requests-table R --split all           # every request of another table
python -m jobs.batch_score --config my.yaml --users U --candidates C                 # every user x every candidate
python -m jobs.batch_score --config my.yaml --users U --catalogue --top-k 100        # their best items; without --users everybody's
"""

from longer.config import Settings
from longer.progress import say
from longer.runner import run_job
from longer.serving.batch import batch_score
from longer.serving.batch_online import check_against_online
from longer.serving.batch_plan import check_named
from longer.storage import Version

SHORT = [f"batch_score.{name}" for name in ("requests_table", "split", "users", "candidates", "catalogue", "top_k")]


def run(settings: Settings) -> Version:
    """The published scores; of requests, the record of rows, rows a second, and the largest difference from scores served."""
    scored = batch_score(settings)
    if settings.batch_score.of_users:
        return scored
    version = check_against_online(settings, scored)
    check = version.manifest
    if check["compared_requests"]:
        say(
            "batch_score",
            f"largest difference from scores served over HTTP: {check['max_abs_diff_vs_online']:.1e}, "
            f"{check['compared_requests']} requests compared",
        )
    return version


if __name__ == "__main__":
    run_job(__doc__, run, short=SHORT, check=lambda settings: check_named(settings, settings.batch_score))
