"""One optimizer step and one validation, on any number of workers. torch and torch.distributed; no Ray.

C candidates, T tasks.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.captured import CapturedPass, Staged, keys_of, stage
from longer.model.fuse import has_kernels
from longer.model.hashed_table import HeldRows
from longer.model.inputs import to_tensors
from longer.model.layout import Sizes
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.training.checkpoints import copied
from longer.training.exchange import Ahead, ReplicatedTables
from longer.training.metrics import Metrics, binary_metrics
from longer.training.optimizer import Optimizer
from longer.training.sharding import ShardedTables
from longer.training_settings import TaskSettings, TrainSettings

_FINAL_LEARNING_RATE_SHARE = 0.05
_AUTOCAST = {"float32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


_NOTHING = Sizes(*[0] * len(Sizes._fields))


def _whole(size: int) -> int:
    """In steps of 64, as kernels like it."""
    return -(-size // 64) * 64


def _roomy(size: int) -> int:
    """A little more than a batch had, since the next will differ: captures are dear, filling is not free."""
    return _whole(size + size // 32)


def rate_share(step: int, num_steps: int, warmup_share: float) -> float:
    """Learning rates over their peaks: a linear warm-up, then a cosine down to a twentieth; a pure function of the step."""
    warmup = max(1, round(num_steps * warmup_share))
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return (step + 1) / warmup if step < warmup else cosine + (1 - cosine) * _FINAL_LEARNING_RATE_SHARE


def dropout_seed(seed: int, step: int, rank: int, num_workers: int) -> int:
    """Of one worker's random numbers in one step: resuming needs no generator's state."""
    return (((seed << 32) + step) * num_workers + rank) % 2**63


def loss_sum(
    output_CT: Tensor, labels: dict[str, Tensor], tasks: tuple[TaskSettings, ...], exists_C: Tensor | None = None
) -> Tensor:
    """Weighted sum over candidates and tasks: cross-entropy of binary tasks, squared error of regression tasks; float32.

    Candidates that do not exist count for nothing.
    """
    total = output_CT.new_zeros((), dtype=torch.float32)
    for index, task in enumerate(tasks):
        output_C, label_C = output_CT[:, index].float(), labels[task.name]
        loss = F.binary_cross_entropy_with_logits if task.kind == "binary" else F.mse_loss
        loss_C = loss(output_C, label_C, reduction="none")
        total = total + task.weight * (loss_C if exists_C is None else torch.where(exists_C, loss_C, 0)).sum()
    return total


class Announced(NamedTuple):
    """A batch, and what the other workers are told of it."""

    batch: RequestBatch | Staged
    ahead: Ahead


StepBatch = RequestBatch | Staged | Announced
"""A batch as `Stepper.step` takes it; with several workers, announced."""


class Stepper:
    """Applies steps to a model on one of `num_workers` workers, which have the same weights before and after each step.

    The model moves to the device, with `train.table_sharding: rows` without the rows of large tables that other workers own. On
    CUDA a step's forward and backward pass are CUDA graphs, captured again when a batch is larger than `largest` and than all
    before it. `timer` tells forward, backward, exchange and optimizer apart, and the wait for other workers' data.
    """

    def __init__(
        self,
        model: Ranker,
        settings: TrainSettings,
        device: torch.device,
        num_workers: int,
        largest: Sizes = _NOTHING,
    ) -> None:
        self.settings, self.device, self.num_workers = settings, device, num_workers
        self._autocast = _AUTOCAST[settings.precision]
        sent_as = torch.bfloat16 if self._autocast else None  # half the bytes; rounds a worker's sums, not their total
        is_sharded = settings.table_sharding == "rows" and num_workers > 1
        self.sharded = ShardedTables(model, device, sent_as) if is_sharded else None
        self.model = model.to(device)
        exchange = self.sharded or (ReplicatedTables(model, device, sent_as) if num_workers > 1 else None)
        self.optimizer = Optimizer(model, settings, exchange)
        self.timer = self.optimizer.timer
        self._room = Sizes(*map(_whole, largest))
        self._captured: CapturedPass | None = None
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if settings.precision == "float32" else "high")
        model.set_recompute(settings.recompute)
        if num_workers > 1:
            for parameter in model.parameters():
                if not (is_sharded and parameter in self.optimizer.tables):
                    dist.broadcast(parameter.data, 0)

    def autocast(self) -> AbstractContextManager:
        kind = self._autocast or torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self._autocast is not None, cache_enabled=False)

    def staged(self, batch: RequestBatch) -> StepBatch:
        """The batch as `step` takes it soonest; for one thread, any, that calls it for one batch after the other.

        All workers stage as many batches as the others, and take them in the same order.
        """
        laid_out = self._laid_out(batch)
        exchange = self.optimizer.exchange
        return Announced(laid_out, exchange.announce(self._keys(laid_out))) if exchange else laid_out

    def _laid_out(self, batch: RequestBatch) -> RequestBatch | Staged:
        if not isinstance(self.model, Longer) or not self.model.has_flat_pass:
            return batch
        if self.settings.recompute and self.model.settings.dropout:
            return batch  # what was dropped is found again by the generator's state, which no CUDA graph gives
        if not has_kernels(self.model.norm_head.weight) or not len(batch.histories.event_ts_E):
            return batch
        sizes = Sizes.of(batch, self.model.windows)
        if any(size > room for size, room in zip(sizes, self._room, strict=True)):
            self._room = Sizes(*(max(room, _roomy(size)) for size, room in zip(sizes, self._room, strict=True)))
        return stage(batch, self.model, self._room)

    def _keys(self, batch: RequestBatch | Staged) -> dict[str, npt.NDArray]:
        if isinstance(batch, Staged):
            return self.model.keys_read(*keys_of(batch.flat))
        items_E, items_C = batch.histories.features["item_id"], batch.candidates.features["item_id"]
        return self.model.keys_read(items_E, items_C, batch.histories.user_key_B)

    def own_rows(self, name: str) -> slice:
        """This worker's rows of a weight or moment, by its name in a checkpoint, which has all of them."""
        return self.sharded.own_rows(name) if self.sharded else slice(None)

    def whole(self, name: str, own: Tensor) -> Tensor:
        """A copy on the CPU of all of it on the first worker; with sharded tables all workers call this in step."""
        return self.sharded.whole(name, own) if self.sharded else copied(name, own)

    def step(
        self, batches: Sequence[StepBatch], weights: Sequence[float], num_candidates: int
    ) -> tuple[Tensor, Tensor]:
        """This worker's loss sum and the gradient norm before clipping.

        The loss is divided by the candidates of the whole step, so that the gradient depends neither on the number of workers
        nor on how many batches a worker's part comes in; memory holds the activations of one. A batch's weight is 0 where there
        are no requests: the worker joins the others with a borrowed one.
        """
        self.optimizer.zero_grad()
        losses, earlier = [], []
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
            losses.append(self._pass(batch, weight, num_candidates))
            if number < len(batches):
                earlier.append(self.optimizer.taken())
        return torch.stack(losses).sum(), self.optimizer.step(earlier)

    def _pass(self, batch: StepBatch, weight: float, num_candidates: int) -> Tensor:
        scale = self.optimizer.scaling.scale * (weight / num_candidates)
        held: dict[str, HeldRows] = {}
        if isinstance(batch, Announced):
            assert self.optimizer.exchange
            batch, ahead = batch
            with self.timer.host_phase("others_wait"):
                ahead.on_their_way.wait()  # nobody begins before the last worker has laid its batch out
            with self.timer.phase("exchange"):
                held = self.optimizer.exchange.begin(ahead)
        if isinstance(batch, Staged):
            captured = self._captured_for(batch)
            with self.timer.phase("forward"):
                loss = captured.forward(batch, held)
            with self.timer.phase("backward"):
                captured.backward(scale)
            return loss * weight
        with self.timer.phase("forward"):
            tensors = to_tensors(batch, self.device)
            self._read_from(held)
            with self.autocast():
                output_CT = self.model(tensors)
            loss = loss_sum(output_CT, tensors.labels, self.settings.tasks)
        with self.timer.phase("backward"):
            (loss * scale).backward()
        return loss.detach() * weight

    def _captured_for(self, batch: Staged) -> CapturedPass:
        if self._captured is None or self._captured.room != batch.room:
            self._captured = None  # gives its memory back first

            def loss(output_CT: Tensor, labels: dict[str, Tensor], exists_C: Tensor) -> Tensor:
                return loss_sum(output_CT, labels, self.settings.tasks, exists_C)

            assert isinstance(self.model, Longer)
            self._captured = CapturedPass(self.model, loss, batch, self._autocast, is_lent=self.sharded is not None)
        return self._captured

    def _read_from(self, held: dict[str, HeldRows]) -> None:
        tables = self.model.large_tables()
        for name, rows in held.items():
            tables[name].held = rows

    @torch.inference_mode()
    def outputs(self, batch: RequestBatch) -> np.ndarray:
        """[C, T] in float32, in evaluation mode; with sharded tables all workers call this in step."""
        self.model.eval()
        tensors = to_tensors(batch, self.device)
        if self.sharded:
            self._read_from(self.sharded.begin_now(self._keys(batch)))
        with self.autocast():
            output_CT = self.model(tensors)
        self.model.train()
        return output_CT.float().cpu().numpy()


def task_metrics(
    output_CT: np.ndarray, labels: dict[str, np.ndarray], user_C: np.ndarray, tasks: tuple[TaskSettings, ...]
) -> dict[str, dict[str, float]]:
    """Metrics of each task by name: AUC, GAUC, log loss and normalized entropy, or the mean squared error."""
    return {
        task.name: (
            binary_metrics(output_CT[:, t], labels[task.name], user_C).as_dict()
            if task.kind == "binary"
            else {"mse": float(np.mean((output_CT[:, t].astype(np.float64) - labels[task.name]) ** 2))}
        )
        for t, task in enumerate(tasks)
    }


def selection_score(metrics: Metrics) -> float | None:
    """What 'best' means, higher is better: the AUC of the first binary task, else the first task's error, negated.

    None where that is not defined, as without a positive or without a negative among the labels.
    """
    aucs = [task["auc"] for task in metrics.values() if "auc" in task]
    if aucs:
        return aucs[0]
    error = next(iter(metrics.values()))["mse"]
    return None if error is None else -error


def gather(value: Any, num_workers: int) -> list[Any]:
    """Every worker's value, by rank, on every worker."""
    if num_workers == 1:
        return [value]
    values: list[Any] = [None] * num_workers
    dist.all_gather_object(values, value)
    return values
