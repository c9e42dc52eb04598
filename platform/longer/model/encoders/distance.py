"""Scores by how far apart two events are, in events or in time."""

from typing import Any

import torch
from torch import Tensor

NUM_DISTANCES = 64


def half_octave(distance: Tensor) -> Tensor:
    """Class of a distance, uint8: 0 for none, then by half octaves."""
    return (1 + 2 * distance.clamp_min(1).float().log2()).clamp_max(NUM_DISTANCES - 1).mul(distance > 0).to(torch.uint8)


class Bias(torch.autograd.Function):
    """`table[classes]`, whose gradient counts classes instead of adding to a few addresses millions of times."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, classes: Tensor) -> Tensor:
        ctx.save_for_backward(classes)
        ctx.like = table
        return table[classes.long()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (classes,) = ctx.saved_tensors
        table = torch.bincount(classes.flatten(), gradient.flatten(), minlength=NUM_DISTANCES)
        return table.to(ctx.like.dtype), None
