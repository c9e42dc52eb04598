"""`jobs.train` that looks for room for more workers every second, not every minute, and in which a lone worker takes its time.

Run as a program: what nodes run is then sent to them as it is.
"""

import time
from dataclasses import replace
from typing import Any

import ray.train
from ray.train import ScalingConfig

from jobs import train
from longer.config import Settings
from longer.runner import run_job
from longer.training import run
from longer.training.loop import Run, train_worker

_LONE_STEP_S = 0.5


def worker(config: dict[str, Any]) -> None:
    take_step = Run._step

    def step(run: Run, work: Any) -> Any:
        time.sleep(_LONE_STEP_S)
        return take_step(run, work)

    if ray.train.get_context().get_world_size() == 1:
        Run._step = step  # type: ignore[method-assign]
    train_worker(config)


def options(settings: Settings) -> ScalingConfig:
    return replace(worker_options(settings), elastic_resize_monitor_interval_s=1.0)


if __name__ == "__main__":
    worker_options, run.worker_options, run.train_worker = run.worker_options, options, worker  # type: ignore[attr-defined]
    run_job(__doc__, train.run, flags=train.FLAGS)
