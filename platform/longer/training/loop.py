"""What each Ray Train worker runs: steps, validations and checkpoints, resumable at any step with any number of workers."""

import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from longer.arrays import Int64
from longer.data.batches import Packs
from longer.errors import UserError
from longer.model.encoders.factory import make_model
from longer.training.checkpoints import Tensors, load_upstream, weights_of
from longer.training.content import Content, Job, Trained
from longer.training.cursor import Position, batches_per_worker
from longer.training.loader import SplitData, prefetch
from longer.training.meter import Meter, Scalars
from longer.training.metrics import Metrics, defined, shown_all
from longer.training.runs import step_folder
from longer.training.steps import StepBatch, Stepper, dropout_seed, gather, rate_share, selection_score
from longer.training.trainer_state import (
    TrainerState,
    best_of_epochs,
    load_own_weights,
    load_trainer,
    moments_of,
)
from longer.training.upload import upload_of
from longer.training.validation import validate

_STEPS_AHEAD = 2
_RECORDS_PER_VALIDATION = 10
_MOST_SKIPPED_IN_ROW = 50
"""The scale of an fp16 loss has fallen to where nothing overflows long before."""

_ITS_END = 1 << 30
"""Days are trained at the rate with which the schedule of a long run ends."""


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `config` holds the job, its requests' files, its start and where to tell."""
    context = ray.train.get_context()
    workers_here = context.get_local_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
    content = Content(config["job"], config["requests"].open())  # workers of a node share one copy
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    Run(config["job"], content, config["start"], config["lines"], rank, num_workers).train()


@dataclass(frozen=True)
class Work:
    """One worker's part of a step; a batch of weight 0 is a pack borrowed where there is none, to keep in step.

    `request_id_R` are the requests of its own batches; the numbers are those of the whole step, over all workers.
    """

    position: Position
    batches: Sequence[StepBatch]
    weights: list[float]
    request_id_R: Int64
    num_requests: int
    num_candidates: int


class Run:
    """A worker's model, data and place in the run."""

    def __init__(
        self, job: Job, content: Content, start: Checkpoint | None, lines: Any, rank: int, num_workers: int
    ) -> None:
        self.job, self.settings, self.start = job, job.settings, start
        self.lines, self.rank, self.num_workers = lines, rank, num_workers
        self.content, self.cursor = content, content.cursor
        asked = self.settings.train
        self.batches_each = batches_per_worker(
            asked.tokens_per_step, int(self.content.cost_P.max()), num_workers, asked.max_tokens_per_batch
        )
        self.state, self.trained = TrainerState(), Trained(self.cursor.num_epochs)
        self.scalars: Scalars | None = None
        self._uploaded = threading.Event()
        self._uploaded.set()
        self.stepper = self._make_stepper()
        self.timer = self.stepper.timer
        self.num_requests_skipped = torch.tensor(self.state.skipped["requests"], device=self.stepper.device)

    def train(self) -> None:
        """From the state's position to the end of the last epoch."""
        first_step, num_steps = self.cursor.global_step(self.state.position), self.cursor.num_steps
        if self.rank == 0:
            self.scalars = Scalars(self._path("tensorboard"), self.state.history)
        over = f"of {self.cursor.num_epochs} days" if self.job.trains_days else "an epoch"
        started = f"starting at step {first_step} with {self.num_workers} workers"
        self._say(f"{len(self.content.packs.order_R)} requests {over}, {num_steps} steps, {started}")
        every = self.settings.train.validate_every_steps
        record_every = max(1, every // _RECORDS_PER_VALIDATION)
        meter = Meter(num_steps, self._num_pauses(), self.stepper.device)
        loss_sum, num_candidates = torch.zeros((), dtype=torch.float64, device=self.stepper.device), 0
        for work in self.timer.waits(prefetch(self._work(), _STEPS_AHEAD), "data_wait"):
            if self.job.trains_days and work.position.step == 0:
                with meter.paused():
                    self._test_day(work.position.epoch)
            done = self.cursor.global_step(work.position) + 1
            loss, gradient_norm = self._step(work)
            loss_sum += loss
            num_candidates += work.num_candidates
            meter.add(work.num_requests, work.num_candidates)
            self.state.position = self.cursor.after(work.position)
            saves = done % every == 0 or self.state.position.step == 0  # at an epoch's end, too
            if done % record_every == 0 or done == 1 or saves:  # a checkpoint leaves no sum behind
                meter.loss = float(self._sum_over_workers(loss_sum)) / num_candidates
                meter.add_phases(self.timer.take())
                self._count_skipped(done, work.position.epoch)
                self._record(
                    done,
                    loss=meter.loss,
                    gradient_norm=float(gradient_norm),
                    **{f"skipped_{name}": num for name, num in self.state.skipped.items()},
                    **meter.rates(),
                )
                loss_sum, num_candidates = torch.zeros_like(loss_sum), 0
            if self.rank == 0 and meter.is_due(done):
                self.lines.show.remote("train", done, num_steps, meter.note(done))
            if saves:
                with meter.paused():
                    self._checkpoint(done)
        if self.scalars:
            self.scalars.close()

    def _num_pauses(self) -> int:
        """Of `train`, from the state's position on."""
        position = self.state.position
        days = self.cursor.num_epochs - position.epoch - (position.step > 0) if self.job.trains_days else 0
        return self.cursor.num_saves(position, self.settings.train.validate_every_steps) + days

    def _make_stepper(self) -> Stepper:
        settings = self.settings
        device, checkpoint = get_device(), ray.train.get_checkpoint()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.manual_seed(settings.seed)
        model = make_model(settings.model, settings.event_schema, settings.train.tasks)
        if not checkpoint and not self.start:  # else it is among their weights
            load_upstream(model, settings.model)
        largest = self.content.largest_batch(self.num_workers * self.batches_each)
        stepper = Stepper(model, settings.train, device, self.num_workers, largest)
        if checkpoint:
            with checkpoint.as_directory() as directory:  # from S3 once a node
                load_own_weights(directory, model, stepper.own_rows)
                self.state = load_trainer(directory, model, stepper.optimizer, stepper.own_rows)
            stepper.optimizer.scaling.restore(self.state.scaling)
            if self.rank == 0:
                self.trained.restore(self.state.epochs)
        elif self.start:
            with self.start.as_directory() as directory:
                load_own_weights(directory, model, stepper.own_rows)
        return stepper

    def _work(self) -> Iterator[Work]:
        content, position = self.content, self.state.position
        first = self.rank * self.batches_each
        while position.epoch < self.cursor.num_epochs:
            plan = self.cursor.plan(position.epoch, self.num_workers * self.batches_each)
            everyone = plan.step(position.step)
            mine = [plan.batch(position.step, first + number) for number in range(self.batches_each)]
            batches = [content.data.batch(content.packs.take(packs if len(packs) else everyone[:1])) for packs in mine]
            own = [batch.request_id_R for batch, packs in zip(batches, mine, strict=True) if len(packs)]
            yield Work(
                position,
                [self.stepper.staged(batch) for batch in batches],
                [1.0 if len(packs) else 0.0 for packs in mine],
                np.concatenate([np.empty(0, np.int64), *own]),
                int(content.requests_P[everyone].sum()),
                int(content.candidates_P[everyone].sum()),
            )
            position = self.cursor.after(position)

    def _step(self, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.cursor.global_step(work.position)
        of_schedule = (_ITS_END, _ITS_END) if self.job.trains_days else (step, self.cursor.num_steps)
        self.stepper.optimizer.set_rate_share(rate_share(*of_schedule, self.settings.train.warmup_share))
        torch.manual_seed(dropout_seed(self.settings.seed, step, self.rank, self.num_workers))
        loss, gradient_norm = self.stepper.step(work.batches, work.weights, work.num_candidates)
        self.trained.add(work.position.epoch, work.request_id_R)
        self.num_requests_skipped += torch.where(gradient_norm.isfinite(), 0, work.num_requests)
        return loss, gradient_norm

    def _count_skipped(self, done: int, epoch: int) -> None:
        """How much has changed nothing so far, since gradients were not finite; a UserError if it goes on, or if a whole epoch or
        day taught nothing.

        The cursor counts it as trained: the same gradients would come again.
        """
        before, scaling = self.state.skipped["steps"], self.stepper.optimizer.scaling
        total, in_row = scaling.num_skipped()
        self.state.skipped = {"steps": total, "requests": int(self.num_requests_skipped)}
        ends_epoch = self.state.position.step == 0
        whole = (
            self.cursor.num_steps if scaling.is_scaled else self.cursor.steps_of(epoch)
        )  # a scale is found in some steps
        taught_nothing = ends_epoch and in_row >= whole
        if in_row >= _MOST_SKIPPED_IN_ROW or taught_nothing:
            raise UserError(
                f"training: the gradients of steps {done - in_row + 1} to {done} are not finite and changed nothing: lower "
                "train.learning_rate and train.embedding_learning_rate, or look for unbounded numbers among features and labels"
            )
        if total > before:
            what = f"{total} steps so far, of {self.state.skipped['requests']} requests,"
            self._say(f"step {done}: {what} had gradients that are not finite and changed nothing")

    def _test_day(self, epoch: int) -> None:
        """Metrics of a day that no step has seen yet, before its first step."""
        day = self.content.expected[epoch]["day"]
        metrics = self._metrics(*self.content.epoch(epoch))
        self._record(self.cursor.global_step(Position(epoch, 0)), day=day, tested=metrics)
        self._say(f"{day}, before training on it: {shown_all(metrics)}")

    def _metrics(self, data: SplitData, packs: Packs) -> Metrics:
        tasks = self.settings.train.tasks
        return defined(validate(data, packs, self.stepper.outputs, tasks, self.rank, self.num_workers))

    def _checkpoint(self, done: int) -> None:
        """Validates, then hands a copy of everything to a thread that uploads it: every worker takes part, the first one writes."""
        started = time.perf_counter()
        metrics = self._metrics(*self.content.valid) if self.content.valid else {}
        score = selection_score(metrics) if metrics else None
        if metrics:
            self._record(done, validation=metrics)
        epochs = self.state.position.epoch if self.state.position.step == 0 else None  # whole ones
        self.state.checkpoints.append({"step": done, "score": score, "epochs": epochs})
        self.state.epochs = self._trained_so_far()
        self.state.scaling = self.stepper.optimizer.scaling.state()
        name = step_folder(done)
        if self.rank == 0:
            self._uploaded.wait()  # the checkpoint before is written: memory holds one, and one file of it as it is written
        copies = self._copies() if self.rank == 0 or self.stepper.sharded else ({}, {})
        if self.rank > 0:
            ray.train.report({}, checkpoint_dir_name=name, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        state = replace(self.state, history=list(self.state.history), checkpoints=list(self.state.checkpoints))
        storage = ray.train.get_context().get_storage()
        upload, self._uploaded = upload_of(self.settings, self._path(), storage, *copies, state)
        reported = {**self.state.checkpoints[-1], "keep": self._to_keep()}
        nothing = Checkpoint.from_directory(tempfile.mkdtemp())  # `upload` has it all; Ray removes this folder
        ray.train.report(
            reported,
            nothing,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )
        assert self.scalars
        self.scalars.save()
        validated = f"validation {shown_all(metrics)}; " if metrics else ""
        self._say(f"step {done}: {validated}{time.perf_counter() - started:.1f} s with checkpoint")

    def _copies(self) -> tuple[Tensors, Tensors]:
        """Weights and moments of now; whole on the first worker."""
        stepper = self.stepper
        return weights_of(stepper.model, stepper.whole), moments_of(stepper.model, stepper.optimizer, stepper.whole)

    def _trained_so_far(self) -> list[dict[str, Any]]:
        """All workers' tallies; after the last step they must be those of the data, to a request."""
        total = Trained(self.cursor.num_epochs)
        for share in gather(self.trained, self.num_workers):
            total.merge(share)
        trained = [
            {**of_data, **counted} for of_data, counted in zip(self.content.expected, total.as_dicts(), strict=True)
        ]
        over = self.state.position.epoch
        if trained[:over] != self.content.expected[:over]:
            raise RuntimeError(f"trained {trained[:over]}, the data are {self.content.expected[:over]}")
        return trained

    def _to_keep(self) -> list[int]:
        """Steps of the checkpoints to keep once this one is committed: the last ones and the one to publish so far."""
        done = self.state.checkpoints
        last = done[-self.settings.train.keep_checkpoints :]
        return sorted({checkpoint["step"] for checkpoint in (*last, *best_of_epochs(done))})

    def _path(self, *parts: str) -> str:
        return self.settings.path("training", ray.train.get_context().get_experiment_name(), *parts)

    def _say(self, message: str) -> None:
        if self.rank == 0:
            self.lines.add.remote("train", message)

    def _sum_over_workers(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        if self.num_workers > 1:
            dist.all_reduce(total)
        return total

    def _record(self, step: int, **values: Any) -> None:
        known = {
            name: x for name, x in values.items() if not isinstance(x, float) or math.isfinite(x)
        }  # as JSON has it
        record = {"step": step, **known}
        self.state.history.append(record)
        if self.scalars:
            self.scalars.add(record)
