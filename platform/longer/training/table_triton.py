"""Triton kernels that sum gradients of table rows and update those rows. Imported on CUDA only.

E summands of a block, d width, U rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_VALUES = 2048
"""Values that a program holds at once: enough reads in flight, few enough registers."""


def sum_ranges(values_Ed: Tensor, order_E: Tensor | None, bounds: Tensor, width: int) -> Tensor:
    """[N, d] in float32: sums of `values_Ed[order_E[bounds[n]:bounds[n + 1]]]`, in that order; without `order_E`, as they lie."""
    num_ranges = len(bounds) - 1
    out = values_Ed.new_empty(num_ranges, width, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(width))
    _sum_kernel[(num_ranges,)](
        values_Ed, bounds if order_E is None else order_E, bounds, out, width, HAS_ORDER=order_E is not None,
        BLOCK_E=max(4, _BLOCK_VALUES // block_d), BLOCK_D=block_d,
    )  # fmt: skip
    return out


def update_rows(
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    rows_U: Tensor,
    gradient_Ud: Tensor,
    num_rows: Tensor,
    scale: Tensor,
    learning_rate: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam on the first `num_rows` of these rows, where `scale` times their gradient is not zero."""
    width = weight.shape[1]
    block_d = max(16, triton.next_power_of_2(width))
    block_u = max(1, _BLOCK_VALUES // block_d)
    _update_kernel[(triton.cdiv(len(rows_U), block_u),)](
        weight, *moments, rows_U, gradient_Ud, num_rows, scale, learning_rate, step, width, *betas, eps,
        BLOCK_U=block_u, BLOCK_D=block_d,
    )  # fmt: skip


@triton.jit
def _sum_kernel(
    VALUES, ORDER, BOUNDS, OUT, width, HAS_ORDER: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0)
    begin, end = tl.load(BOUNDS + n), tl.load(BOUNDS + n + 1)
    e_E, d_D = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_E):
        exists_E = at + e_E < end
        place_E = (at + e_E).to(tl.int64)
        if HAS_ORDER:
            place_E = tl.load(ORDER + place_E, exists_E, 0)
        inside_ED = exists_E[:, None] & (d_D < width)[None, :]
        values_ED = tl.load(VALUES + place_E[:, None] * width + d_D[None, :], inside_ED, 0.0)
        sum_D += tl.sum(values_ED.to(tl.float32), 0)
    tl.store(OUT + n.to(tl.int64) * width + d_D, sum_D, d_D < width)


@triton.jit
def _update_kernel(
    WEIGHT, MEAN, SQUARE, ROWS, GRADIENT, NUM_ROWS, SCALE, LEARNING_RATE, STEP, width, beta_mean, beta_square, eps,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u_U, d_D = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_D)
    num_rows = tl.load(NUM_ROWS)
    if tl.program_id(0) * BLOCK_U >= num_rows:
        return
    exists_U = u_U < num_rows
    inside_UD = exists_U[:, None] & (d_D < width)[None, :]
    gradient_UD = tl.load(GRADIENT + u_U.to(tl.int64)[:, None] * width + d_D[None, :], inside_UD, 0.0) * tl.load(SCALE)
    learns_UD = inside_UD & (tl.max((gradient_UD != 0.0).to(tl.int32), 1) > 0)[:, None]
    at_UD = tl.load(ROWS + u_U, exists_U, 0).to(tl.int64)[:, None] * width + d_D[None, :]
    step = tl.load(STEP)
    mean_UD = tl.load(MEAN + at_UD, learns_UD, 0.0)
    square_UD = tl.load(SQUARE + at_UD, learns_UD, 0.0)
    mean_UD += (1 - beta_mean) * (gradient_UD - mean_UD)
    square_UD = beta_square * square_UD + (1 - beta_square) * gradient_UD * gradient_UD
    bias_mean, bias_square = 1 - tl.exp2(step * tl.log2(beta_mean)), 1 - tl.exp2(step * tl.log2(beta_square))
    root_UD = tl.sqrt(square_UD) / tl.sqrt(bias_square) + eps
    weight_UD = tl.load(WEIGHT + at_UD, learns_UD, 0.0) - tl.load(LEARNING_RATE) / bias_mean * mean_UD / root_UD
    tl.store(MEAN + at_UD, mean_UD, learns_UD)
    tl.store(SQUARE + at_UD, square_UD, learns_UD)
    tl.store(WEIGHT + at_UD, weight_UD, learns_UD)
