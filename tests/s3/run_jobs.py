"""Jobs one after another in a process and a Ray of their own: python -m tests.s3.run_jobs import_events,verify --config FILE"""

import sys
from importlib import import_module

from longer.config import Settings
from longer.runner import run_job


def run(settings: Settings) -> int:
    """How many violations the last job found, if it is `verify`."""
    results = [import_module(f"jobs.{name}").run(settings) for name in names]
    return results[-1].found.num_violations if names[-1] == "verify" else 0


if __name__ == "__main__":
    names = sys.argv.pop(1).split(",")
    sys.exit(1 if run_job(__doc__, run) else 0)
