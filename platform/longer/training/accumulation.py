"""A step on several batches: their gradients are summed before the optimizer acts, so that memory holds one batch's activations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.captured import Staged
from longer.model.inputs import to_tensors
from longer.training.steps import Stepper, loss_sum


def accumulated_step(
    stepper: Stepper, batches: Sequence[RequestBatch | Staged], weights: Sequence[float], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """As `Stepper.step`, of all batches together, none of them staged: a captured pass would replace the gradients before it."""
    stepper.optimizer.zero_grad()
    total = torch.zeros((), device=stepper.device)
    for batch, weight in zip(batches, weights, strict=True):
        assert isinstance(batch, RequestBatch)
        tensors = to_tensors(batch, stepper.device)
        with stepper.autocast():
            output_CT = stepper.model(tensors)
        loss = weight * loss_sum(output_CT, tensors.labels, stepper.settings.tasks)
        (loss / num_candidates).backward()
        total += loss.detach()
    return total, stepper.optimizer.step(stepper.num_workers)
