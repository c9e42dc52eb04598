"""One optimizer step and one validation, on any number of workers. torch and torch.distributed; no Ray.

C candidates, T tasks.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longer.arrays import RequestBatch
from longer.config import TaskSettings, TrainSettings
from longer.model.inputs import to_tensors
from longer.model.ranker import Ranker
from longer.training.metrics import binary_metrics

_FINAL_LEARNING_RATE_SHARE = 0.05


def make_optimizer(model: Ranker, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW in two groups: dense layers decay, embedding tables learn at their own rate and do not."""
    groups = [
        {"params": model.dense_parameters(), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": model.embedding_parameters(), "lr": settings.embedding_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, num_steps: int, warmup_share: float) -> None:
    """Linear warm-up to each group's peak, then a cosine down to a twentieth of it; a pure function of the step."""
    warmup = max(1, round(num_steps * warmup_share))
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    share = (step + 1) / warmup if step < warmup else cosine + (1 - cosine) * _FINAL_LEARNING_RATE_SHARE
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def loss_sum(output_CT: Tensor, labels: dict[str, Tensor], tasks: tuple[TaskSettings, ...]) -> Tensor:
    """Weighted sum over candidates and tasks: cross-entropy of binary tasks, squared error of regression tasks; float32."""
    total = output_CT.new_zeros((), dtype=torch.float32)
    for index, task in enumerate(tasks):
        output_C, label_C = output_CT[:, index].float(), labels[task.name]
        loss = F.binary_cross_entropy_with_logits if task.kind == "binary" else F.mse_loss
        total = total + task.weight * loss(output_C, label_C, reduction="sum")
    return total


@dataclass
class Stepper:
    """Applies steps to a model that may be wrapped for data parallelism, whose wrapper then averages gradients."""

    model: Ranker
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    settings: TrainSettings
    device: torch.device
    num_workers: int

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def step(self, batch: RequestBatch, weight: float, num_candidates: int) -> tuple[Tensor, Tensor]:
        """This worker's loss sum and the gradient norm before clipping.

        The loss is divided by the candidates of the whole step, so the gradient does not depend on the number of workers.
        `weight` is 0 for a worker that has no requests in this step: it joins the others with a borrowed batch.
        """
        tensors = to_tensors(batch, self.device)
        with self.autocast():
            output_CT = self.parallel(tensors)
        loss = weight * loss_sum(output_CT, tensors.labels, self.settings.tasks)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * (self.num_workers / num_candidates)).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss.detach(), norm

    @torch.inference_mode()
    def outputs(self, batch: RequestBatch) -> np.ndarray:
        """[C, T] in float32, in evaluation mode."""
        self.model.eval()
        with self.autocast():
            output_CT = self.model(to_tensors(batch, self.device))
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


def selection_score(metrics: dict[str, dict[str, float]]) -> float:
    """What 'best' means, higher is better: the AUC of the first binary task, else the first task's error, negated."""
    aucs = [task["auc"] for task in metrics.values() if "auc" in task]
    score = aucs[0] if aucs else -next(iter(metrics.values()))["mse"]
    return score if math.isfinite(score) else -math.inf


def gather(value: Any, num_workers: int) -> list[Any]:
    """Every worker's value, by rank, on every worker."""
    if num_workers == 1:
        return [value]
    values: list[Any] = [None] * num_workers
    dist.all_gather_object(values, value)
    return values
