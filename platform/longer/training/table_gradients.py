"""What a step read of a large table, each row once with its whole gradient, and the update of those rows alone.

E reads, U rows of a table that were read, d width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longer.model.embedding import Reads
from longer.model.fuse import has_kernels

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


def over_workers(mine: Sequence[TableGradient], meanwhile: Callable[[], None]) -> list[TableGradient]:
    """The sum of all workers' gradients of each table, the same on every worker; all call this with the same tables.

    What lies behind the rows of the worker that has most stays where it is: on CUDA that is most of it. The device does what
    `meanwhile` asks of it while the host learns that number and sees to the rest.
    """
    device = mine[0].rows_U.device
    most_T = torch.stack([gradient.num_rows.to(device, torch.int64) for gradient in mine])
    dist.all_reduce(most_T, dist.ReduceOp.MAX)
    sizes_T = most_T.to("cpu", non_blocking=True)
    known = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    meanwhile()
    if known:
        known.synchronize()
    return [_gathered(gradient, size) for gradient, size in zip(mine, sizes_T.tolist(), strict=True)]


def _gathered(mine: TableGradient, size: int) -> TableGradient:
    num_workers, filling = dist.get_world_size(), max(0, size - len(mine.rows_U))
    rows_U = F.pad(mine.rows_U[:size], (0, filling))
    gradient_Ud = F.pad(mine.gradient_Ud[:size], (0, 0, 0, filling))
    all_rows = rows_U.new_empty(num_workers * size)
    all_gradients = gradient_Ud.new_empty(num_workers * size, gradient_Ud.shape[1])
    dist.all_gather_into_tensor(all_rows, rows_U)
    dist.all_gather_into_tensor(all_gradients, gradient_Ud)
    return combine([(all_rows, all_gradients)])


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
