"""What tests that kill workers wait for."""

import time
from pathlib import Path

from longer.training.runs import RECORD, step_folder


def wait_for_commit(root: Path, step: int, within_s: float = 60) -> None:
    """Until Ray has recorded the checkpoint of this step: a worker that is killed from now on costs the steps after it."""
    deadline = time.monotonic() + within_s
    while not any(step_folder(step) in record.read_text() for record in root.glob(f"training/*/{RECORD}")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
