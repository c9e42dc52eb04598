"""Reading tables of few rows, which every event reads: on CUDA their gradient is summed without contention.

E reads of any shape, d width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longer.model.fuse import has_kernels


def read_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """[..., d]: the rows of a table; what `F.embedding` gives, and its gradient."""
    if has_kernels(weight) and torch.is_grad_enabled():
        return Lookup.apply(weight, rows)
    return F.embedding(rows, weight)


class Lookup(torch.autograd.Function):
    """`F.embedding`, which `torch.compile` fuses with its neighbours, and a gradient from `sum_by_row`, which it leaves alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight, rows)
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, rows = ctx.saved_tensors
        return sum_by_row(gradient, rows, weight.shape[0]), None


@torch.library.custom_op("longer::sum_by_row", mutates_args=())
def sum_by_row(gradient: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows, d]: for each row of a table, the sum of the gradients of its reads; sums are float32, in no fixed order."""
    from longer.model.small_tables_triton import add_by_row

    out = gradient.new_zeros(num_rows, gradient.shape[-1], dtype=torch.float32)
    add_by_row(gradient.reshape(-1, gradient.shape[-1]).contiguous(), rows.reshape(-1).contiguous(), out)
    return out.to(gradient.dtype)


@sum_by_row.register_fake
def _(gradient: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return gradient.new_empty(num_rows, gradient.shape[-1])
