"""Runs every stage, from raw log to report: python -m jobs.pipeline --config configs/quickstart.yaml [--fresh]

A stage whose inputs and settings have not changed finds its result published, changes nothing and says so.
"""

import time
from collections.abc import Callable

from jobs import (
    batch_score,
    build_requests,
    build_sequences,
    evaluate,
    import_events,
    import_impressions,
    serve_check,
    train,
)
from longer.config import Settings
from longer.files import remove_tree
from longer.progress import say
from longer.report import write_report
from longer.runner import run_job
from longer.storage import Table, Version

STAGES: dict[str, Callable[[Settings], Version]] = {
    "import_events": import_events.run,
    "build_sequences": build_sequences.run,
    "import_impressions": import_impressions.run,
    "build_requests": build_requests.run,
    "train": train.run,
    "evaluate": evaluate.run,
    "serve": serve_check.run,
    "batch_score": batch_score.run,
}


def run(settings: Settings, fresh: bool = False) -> None:
    """Writes the report of all stages; with `fresh`, after removing everything under `root` that a pipeline wrote."""
    started = time.perf_counter()
    if fresh:
        _remove_results(settings)
    versions: dict[str, Version] = {}
    names = [name for name in STAGES if name != "import_impressions" or settings.import_impressions.source]
    for number, name in enumerate(names, 1):
        say("pipeline", f"[{number}/{len(names) + 1}] {name}")
        versions[name] = STAGES[name](settings)
    say("pipeline", f"[{len(names) + 1}/{len(names) + 1}] report")
    write_report(settings, versions)
    say("pipeline", f"done in {time.perf_counter() - started:.0f} s")


def _remove_results(settings: Settings) -> None:
    """Every table first becomes this process's own, so that nothing is removed under a run that writes it."""
    names = ("events", "quarantine", "sequences", "items", "requests")
    tables_of = [f"{place}tables/{name}" for place in ("", "impressions/") for name in names]
    paths = [*tables_of, "checkpoints", "evaluation", "serving_check", "batch_scores"]
    tables = [Table(settings.path(path)) for path in paths]
    for table in tables:
        table.claim()
    for table in tables:
        table.clear()
    for name in ("training", "report.json", "report.html"):
        remove_tree(settings.path(name))


if __name__ == "__main__":
    run_job(__doc__, run, flags=(("fresh", "remove earlier results under --root first"),))
