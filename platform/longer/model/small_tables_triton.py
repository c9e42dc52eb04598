"""Triton kernel that sums gradients by the row of a table that was read. Imported on CUDA only (or under Triton's interpreter).

Most events read one of a few rows, so that adding each on its own has all of them wait for the same words of memory. Here a
program first sums the reads of each row in its block, by a product with the matrix that says which reads share a row.

E reads of a block, D columns of one.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_READS, _MOST_COLUMNS = 64, 64
_HIGH_BITS = tl.constexpr(-8192)
"""Of a float32, those that TF32 has; what is left of the number has again so many, and nothing worth telling beyond."""


def add_by_row(gradient_Ed: Tensor, rows_E: Tensor, out_Nd: Tensor) -> None:
    """Adds each read's gradient to its row of `out_Nd`, float32."""
    num_reads, width = gradient_Ed.shape
    if not num_reads:
        return
    block_d = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(width)))
    grid = triton.cdiv(num_reads, _BLOCK_READS), triton.cdiv(width, block_d)
    _small_table_kernel[grid](
        gradient_Ed, rows_E, out_Nd, num_reads, width, BLOCK_E=_BLOCK_READS, BLOCK_D=block_d, num_warps=4
    )


@triton.jit(do_not_specialize=["num_reads"])
def _small_table_kernel(GRADIENT, ROWS, OUT, num_reads, width, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    e_E, d_D = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists_E = e_E < num_reads
    row_E = tl.load(ROWS + e_E, exists_E, -1)
    is_same_EE = row_E[:, None] == row_E[None, :]
    is_first_E = tl.max((is_same_EE & (e_E[None, :] < e_E[:, None])).to(tl.int32), 1) == 0
    inside_ED = exists_E[:, None] & (d_D < width)[None, :]
    gradient_ED = tl.load(GRADIENT + e_E.to(tl.int64)[:, None] * width + d_D[None, :], inside_ED, 0.0).to(tl.float32)
    high_ED = (gradient_ED.to(tl.int32, bitcast=True) & _HIGH_BITS).to(tl.float32, bitcast=True)
    same_EE = is_same_EE.to(tl.float32)
    sum_ED = tl.dot(same_EE, high_ED, input_precision="tf32")
    sum_ED = tl.dot(same_EE, gradient_ED - high_ED, sum_ED, input_precision="tf32")
    to_ED = row_E.to(tl.int64)[:, None] * width + d_D[None, :]
    tl.atomic_add(OUT + to_ED, sum_ED, inside_ED & is_first_E[:, None], sem="relaxed")
