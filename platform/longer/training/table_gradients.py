"""What a step read of a large table, each row once with its whole gradient, and the update of those rows alone.

E reads, U rows of a table that were read, N rows of all workers, d width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longer.model.fuse import has_kernels
from longer.model.hashed_table import Reads

CHUNK_READS = 64
"""Reads that one program sums: a row that everybody reads is summed by many, then once more over their sums."""


@dataclass(frozen=True)
class TableGradient:
    """The gradient of `rows_U`, distinct; beyond the first `num_rows` is filling, with gradients of zero.

    The device alone knows `num_rows`, so that nobody waits for it and shapes do not depend on what was read.
    """

    rows_U: Tensor
    gradient_Ud: Tensor
    num_rows: Tensor


def combine(reads: Reads) -> TableGradient:
    """One gradient a row that was read: sums in a fixed order, no pass over the table."""
    rows_E, gradient_Ed = (torch.cat(parts) for parts in zip(*reads, strict=True))
    if has_kernels(gradient_Ed):
        return _combine_in_place(rows_E, gradient_Ed)
    rows_U, row_E = rows_E.unique(return_inverse=True)
    summed_Ud = gradient_Ed.new_zeros(len(rows_U), gradient_Ed.shape[1]).index_add_(0, row_E, gradient_Ed)
    return TableGradient(rows_U, summed_Ud, torch.tensor(len(rows_U)))


@dataclass(frozen=True)
class Joined:
    """The distinct rows among N of several workers, of which each has a row once, and where their gradients are found: [N] all."""

    rows_U: Tensor
    num_rows: Tensor
    order_N: Tensor
    bounds_N1: Tensor | None

    def sum(self, gradient_Nd: Tensor, dtype: torch.dtype) -> TableGradient:
        """The sums of each row's gradients, worker by worker."""
        if self.bounds_N1 is None:
            summed_Ud = gradient_Nd.new_zeros(len(self.rows_U) + 1, gradient_Nd.shape[1], dtype=dtype)
            summed_Ud.index_add_(0, self.order_N, gradient_Nd.to(dtype))
            return TableGradient(self.rows_U, summed_Ud[:-1], self.num_rows)
        from longer.training.table_triton import sum_ranges

        return TableGradient(
            self.rows_U, sum_ranges(gradient_Nd, self.order_N, self.bounds_N1, gradient_Nd.shape[1]), self.num_rows
        )


def joined(rows_N: Tensor, in_kernels: bool, no_row: int) -> Joined:
    """Needs no gradient, so that it can be found while they are computed; where `no_row` stands there is none."""
    if not in_kernels:
        rows_U, place_N = rows_N.unique(return_inverse=True)  # `no_row` is the last one
        rows_U = rows_U[rows_U != no_row]
        return Joined(rows_U, torch.tensor(len(rows_U)), place_N, None)
    sorted_N, order_N = rows_N.sort(stable=True)
    exists_N = sorted_N != no_row
    is_first_N = exists_N.clone()
    is_first_N[1:] &= sorted_N[1:] != sorted_N[:-1]
    row_N, place_N = is_first_N.cumsum(0), torch.arange(len(rows_N), device=rows_N.device, dtype=torch.int32)
    bounds_N1 = _positions(is_first_N, row_N, place_N, len(rows_N)).minimum(exists_N.sum(dtype=torch.int32))
    return Joined(_positions(is_first_N, row_N, sorted_N, 0)[:-1], row_N[-1], order_N, bounds_N1)


def _combine_in_place(rows_E: Tensor, gradient_Ed: Tensor) -> TableGradient:
    """Shapes that depend on E alone: U = E. Sorted by row, summed by chunks of reads, then by row."""
    from longer.training.table_triton import sum_ranges

    num_reads, width = gradient_Ed.shape
    sorted_E, order_E = rows_E.to(torch.int32).sort(stable=True)
    place_E = torch.arange(num_reads, device=rows_E.device, dtype=torch.int32)
    is_first_E = torch.ones_like(sorted_E, dtype=torch.bool)
    is_first_E[1:] = sorted_E[1:] != sorted_E[:-1]
    row_E = is_first_E.cumsum(0)
    row_start_E = _positions(is_first_E, row_E, place_E, 0)[row_E - 1]
    starts_chunk_E = (place_E - row_start_E) % CHUNK_READS == 0
    chunk_E = starts_chunk_E.cumsum(0)
    chunk_bounds = _positions(starts_chunk_E, chunk_E, place_E, num_reads)
    row_bounds = _positions(is_first_E, row_E, (chunk_E - 1).int(), 0)
    row_bounds = torch.where(
        torch.arange(num_reads + 1, device=rows_E.device) < row_E[-1], row_bounds, chunk_E[-1].int()
    )
    by_chunk = sum_ranges(gradient_Ed, order_E, chunk_bounds, width)
    rows_U = _positions(is_first_E, row_E, sorted_E, 0)[:-1]
    return TableGradient(rows_U, sum_ranges(by_chunk, None, row_bounds, width), row_E[-1])


def _positions(is_start_E: Tensor, number_E: Tensor, value_E: Tensor, filling: int) -> Tensor:
    """[E + 1]: the values at the starts, in order, and `filling` behind them; `number_E` counts the starts so far."""
    unread = len(value_E) + 2
    out = torch.full((unread + 1,), filling, dtype=value_E.dtype, device=value_E.device)
    return out.scatter_(0, torch.where(is_start_E, number_E, unread), value_E)[1:unread]
