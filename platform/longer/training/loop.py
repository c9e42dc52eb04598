"""What each Ray Train worker runs: steps, validations and checkpoints, resumable at any step with any number of workers."""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from longer.arrays import RequestBatch
from longer.config import Settings
from longer.data.tables import RequestTable, SequenceTable
from longer.model.captured import Staged
from longer.model.encoders.factory import make_model
from longer.training.checkpoints import (
    TrainerState,
    load_model,
    load_trainer,
    load_upstream,
    save_model,
    save_trainer,
)
from longer.training.cursor import DataCursor, Position, divide
from longer.training.loader import prefetch, read_split, score_packs
from longer.training.steps import Stepper, gather, rate_share, selection_score, task_metrics

MAX_PACK_REQUESTS = 16
"""Requests of one user in a pack: more share one history, but a step's requests are more alike. 8, 16 and 32 learn alike."""

_BATCHES_AHEAD = 2
_SECONDS_BETWEEN_LINES = 3.0
_RECORDS_PER_VALIDATION = 10


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `config` holds the settings, the pinned table versions and where to tell."""
    context = ray.train.get_context()
    workers_here = context.get_local_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
    settings: Settings = config["settings"]
    Run(settings, config["versions"], config["lines"], context.get_world_rank(), context.get_world_size()).train()


@dataclass(frozen=True)
class Work:
    """One worker's part of a step; `weight` is 0 where there is none and a pack is borrowed to keep in step."""

    position: Position
    batch: RequestBatch | Staged
    weight: float
    num_requests: int
    num_candidates: int


class Run:
    """A worker's model, data and place in the run."""

    def __init__(self, settings: Settings, versions: dict[str, str], lines: Any, rank: int, num_workers: int) -> None:
        self.settings, self.lines, self.rank, self.num_workers = settings, lines, rank, num_workers
        windows, schema, asked = settings.model.windows, settings.event_schema, settings.train
        sequences = SequenceTable(settings.path("tables", "sequences"), schema, versions["sequences"])
        requests = RequestTable(settings.path("tables", "requests"), schema, versions["requests"])
        self.data = read_split(sequences, requests, "train", windows).newest(asked.max_requests)
        self.valid = read_split(sequences, requests, "valid", windows).spread(asked.max_validation_requests)
        self.packs = self.data.packs(MAX_PACK_REQUESTS)
        self.candidates_P = self.data.num_candidates(self.packs)
        self.requests_P = np.diff(self.packs.offsets_P1)
        order = f"{versions['requests']}/{settings.seed}"
        self.cursor = DataCursor(order, self.requests_P, self.data.cost(self.packs), asked.requests_per_step)
        self.num_steps = asked.epochs * self.cursor.steps_per_epoch
        self.state = TrainerState()
        self.stepper = self._make_stepper()

    def train(self) -> None:
        """From the state's position to the end of the last epoch."""
        first_step = self.cursor.global_step(self.state.position)
        if self.rank == 0:
            self._say(
                f"{len(self.data.requests)} requests an epoch, {self.num_steps} steps, starting at step {first_step}"
            )
        every = self.settings.train.validate_every_steps
        record_every = max(1, every // _RECORDS_PER_VALIDATION)
        meter = Meter(self.num_steps, first_step)
        loss_sum, num_candidates = torch.zeros((), dtype=torch.float64, device=self.stepper.device), 0
        for work in prefetch(self._work(), _BATCHES_AHEAD):
            done = self.cursor.global_step(work.position) + 1
            loss, gradient_norm = self._step(work)
            loss_sum += loss
            num_candidates += work.num_candidates
            meter.add(work.num_requests, work.num_candidates)
            self.state.position = self.cursor.after(work.position)
            if done % record_every == 0 or done in (1, self.num_steps):
                meter.loss = float(self._sum_over_workers(loss_sum)) / num_candidates
                self._record(done, loss=meter.loss, gradient_norm=float(gradient_norm), **meter.rates())
                loss_sum, num_candidates = torch.zeros_like(loss_sum), 0
            if self.rank == 0 and meter.is_due(done):
                self._say(meter.line(done))
            if done % every == 0 or done == self.num_steps:
                with meter.paused():
                    self._validate_and_report(done)

    def _make_stepper(self) -> Stepper:
        settings = self.settings
        device, checkpoint = get_device(), ray.train.get_checkpoint()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.manual_seed(settings.seed)
        model = make_model(settings.model, settings.event_schema, settings.train.tasks)
        load_upstream(model, settings.model)
        stepper = Stepper(model.to(device), settings.train, device, self.num_workers)
        if checkpoint:
            with checkpoint.as_directory() as directory:
                model.load_state_dict(load_model(directory, str(device))[0].state_dict())
                self.state = load_trainer(directory, model, stepper.optimizer)
        return stepper

    def _work(self) -> Iterator[Work]:
        position = self.state.position
        while position.epoch < self.settings.train.epochs:
            everyone = self.cursor.packs_of_step(position)
            mine = self.cursor.packs_of_worker(position, self.rank, self.num_workers)
            yield Work(
                position,
                self.stepper.staged(self.data.batch(self.packs.take(mine if len(mine) else everyone[:1]))),
                1.0 if len(mine) else 0.0,
                int(self.requests_P[everyone].sum()),
                int(self.candidates_P[everyone].sum()),
            )
            position = self.cursor.after(position)

    def _step(self, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.cursor.global_step(work.position)
        self.stepper.optimizer.set_rate_share(rate_share(step, self.num_steps, self.settings.train.warmup_share))
        torch.manual_seed(((self.settings.seed << 32) + step) * self.num_workers + self.rank)  # of dropout
        return self.stepper.step(work.batch, work.weight, work.num_candidates)

    def _validate_and_report(self, done: int) -> None:
        """Validates, then saves: every worker takes part, the first one writes."""
        started, settings, stepper = time.perf_counter(), self.settings, self.stepper
        metrics = self._validate()
        self._record(done, validation=metrics)
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if self.rank == 0:
                save_model(directory, stepper.model, settings.model, settings.event_schema, settings.train.tasks)
                save_trainer(directory, stepper.model, stepper.optimizer, self.state)
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            reported = {"score": selection_score(metrics), "step": done, "validation": metrics}
            ray.train.report(reported, checkpoint, checkpoint_dir_name=f"step_{done:07d}")
        if self.rank == 0:
            shown = ", ".join(f"{name} {value:.4f}" for task in metrics.values() for name, value in task.items())
            self._say(f"step {done}: validation {shown}; {time.perf_counter() - started:.1f} s with checkpoint")

    def _say(self, message: str) -> None:
        self.lines.add.remote("train", message)

    def _validate(self) -> dict[str, dict[str, float]]:
        """Metrics of the validation requests, which the workers share; the same on every worker."""
        requests, tasks = self.valid.requests, self.settings.train.tasks
        packs = self.valid.packs(MAX_PACK_REQUESTS)
        mine = packs.take(divide(self.valid.cost(packs), self.num_workers)[self.rank])
        scored = list(score_packs(self.valid, mine, self.stepper.outputs))
        output_CT = np.zeros((len(requests.item_id_C), len(tasks)), np.float32)
        for share in gather(scored, self.num_workers):
            for rows_C, outputs_CT in share:
                output_CT[rows_C] = outputs_CT
        return task_metrics(output_CT, requests.labels, self.valid.row_C, tasks)

    def _sum_over_workers(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        if self.num_workers > 1:
            dist.all_reduce(total)
        return total

    def _record(self, step: int, **values: Any) -> None:
        self.state.history.append({"step": step, **values})


class Meter:
    """Speed since the last line, without the time of validations; a line is due every few seconds."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self.num_steps, self.loss = num_steps, math.nan
        self._started = self._told = time.perf_counter()
        self._num_steps_here, self._num_requests, self._num_candidates = 0, 0, 0

    def add(self, num_requests: int, num_candidates: int) -> None:
        self._num_steps_here += 1
        self._num_requests += num_requests
        self._num_candidates += num_candidates

    def rates(self) -> dict[str, float]:
        """Over all workers, since this process started."""
        elapsed_s = time.perf_counter() - self._started
        return {"requests_per_s": self._num_requests / elapsed_s, "impressions_per_s": self._num_candidates / elapsed_s}

    def is_due(self, done: int) -> bool:
        """True every few seconds, and at the end."""
        now = time.perf_counter()
        due = now - self._told >= _SECONDS_BETWEEN_LINES or done == self.num_steps
        self._told = now if due else self._told
        return due

    def line(self, done: int) -> str:
        rates = self.rates()
        left_s = (self.num_steps - done) * (time.perf_counter() - self._started) / self._num_steps_here
        return (
            f"step {done}/{self.num_steps}, {rates['requests_per_s']:.0f} requests/s, "
            f"{rates['impressions_per_s']:.0f} impressions/s, loss {self.loss:.4f}, about {left_s:.0f} s left"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began
