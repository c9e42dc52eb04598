"""A step on several batches: their gradients are summed before the optimizer acts, so that memory holds one batch's activations."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longer.arrays import RequestBatch
from longer.model.inputs import to_tensors
from longer.training.steps import Stepper, loss_sum


def accumulated_step(
    stepper: Stepper, batches: Sequence[RequestBatch], weights: Sequence[float], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """As `Stepper.step`, of all batches together; workers reduce their gradients once, with the last one."""
    stepper.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=stepper.device)
    for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
        apart = isinstance(stepper.parallel, DistributedDataParallel) and number < len(batches)
        with stepper.parallel.no_sync() if apart else nullcontext():  # type: ignore[operator]
            tensors = to_tensors(batch, stepper.device)
            with stepper.autocast():
                output_CT = stepper.parallel(tensors)
            loss = weight * loss_sum(output_CT, tensors.labels, stepper.settings.tasks)
            (loss * (stepper.num_workers / num_candidates)).backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(stepper.model.parameters(), stepper.settings.clip_norm)
    stepper.optimizer.step()
    return total, norm
