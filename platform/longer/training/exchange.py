"""What workers tell each other of the rows of large tables: which ones a batch reads, before its pass; their gradients, after it.

Whoever lays a batch out knows its rows. How many there are travels between the hosts while earlier steps run, so that shapes are
known when a step is launched and no step waits for its device.

U distinct rows that a batch here reads, N rows of all workers, d width, W workers, T tables, P parts of a table, X of all tables.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from longer.arrays import Int64
from longer.model.fuse import has_kernels
from longer.model.hashed_table import HashedTable, HeldRows
from longer.model.inputs import to_device
from longer.model.ranker import Ranker
from longer.training.table_gradients import Joined, TableGradient, joined

NO_ROW = torch.iinfo(torch.int32).max
"""Behind the rows of a worker that has fewer than another."""

_MOST_ROWS_A_READ = 64
"""A table with more rows than this for each read is not worth a pass over one byte a row."""


class Ahead(NamedTuple):
    """The distinct rows that a batch reads: ascending, table by table, on the host; and everyone's numbers, on their way."""

    rows_X: Tensor
    num_rows_TP: Tensor
    everyones: list[Tensor]
    on_their_way: dist.Work

    def num_rows_WTP(self) -> list[list[list[int]]]:
        """How many rows each worker's batch reads of each part of each table: waits for the last worker to lay its batch out."""
        self.on_their_way.wait()
        return torch.stack(self.everyones).tolist()


class Announcer:
    """Tells what batches read; all workers announce as many, one thread each, in the same order. `bounds` cut tables in parts.

    It speaks over gloo, beside what the devices exchange, and waits for nobody.
    """

    def __init__(self, tables: Mapping[str, HashedTable], bounds: Sequence[Sequence[int]], on_cuda: bool) -> None:
        self._tables, self._bounds, self._on_cuda = tables, bounds, on_cuda
        self._group = dist.new_group(backend="gloo")

    def __call__(self, keys: Mapping[str, npt.NDArray]) -> Ahead:
        rows = [
            distinct(table.rows_of(torch.tensor(keys[name])).numpy(), table.num_rows)
            for name, table in self._tables.items()
        ]
        cuts = [np.searchsorted(rows_U, bounds) for rows_U, bounds in zip(rows, self._bounds, strict=True)]
        num_rows_TP = torch.from_numpy(np.diff(np.stack(cuts)))
        everyones = [torch.empty_like(num_rows_TP) for _ in range(dist.get_world_size())]
        on_their_way = dist.all_gather(everyones, num_rows_TP, group=self._group, async_op=True)
        rows_X = torch.from_numpy(np.concatenate(rows).astype(np.int32))
        return Ahead(rows_X.pin_memory() if self._on_cuda else rows_X, num_rows_TP, everyones, on_their_way)


def distinct(rows_E: Int64, num_rows: int) -> Int64:
    """What `np.unique` gives, much sooner where a table is not far larger than what is read of it."""
    if num_rows > _MOST_ROWS_A_READ * len(rows_E):
        return np.unique(rows_E)
    is_read = np.zeros(num_rows, bool)
    is_read[rows_E] = True
    return np.flatnonzero(is_read)


class Beside:
    """A stream for what need not hold up the pass; on a CPU there is but one. Its memory is of use until `awaited` and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> AbstractContextManager:
        """Work in this context starts when what was asked of the device so far is done: memory that was freed is free by then."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def awaited(self) -> None:
        """What is asked of the device from now on finds that work done."""
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class ReplicatedTables:
    """Tables that every worker holds: each takes in all workers' gradients, one a row. All workers call all methods in step.

    Which rows there are travels and is joined in a stream of its own, beside the pass; the gradients follow it, of type `sent_as`
    where that is told, and are summed in their own, by rank.
    """

    def __init__(self, model: Ranker, device: torch.device, sent_as: torch.dtype | None) -> None:
        self._weights = [model.get_parameter(name) for name in model.large_tables()]
        self._device, self._sent_as = device, sent_as
        self._beside = Beside(device)
        bounds = [[0, table.num_rows] for table in model.large_tables().values()]
        self.announce = Announcer(model.large_tables(), bounds, device.type == "cuda")
        self._known: list[tuple[Tensor, int, Joined]] = []

    def begin(self, ahead: Ahead) -> dict[str, HeldRows]:
        """Before a batch's pass; the tables are read where they lie."""
        num_rows_WT = [[num for (num,) in of_worker] for of_worker in ahead.num_rows_WTP()]
        sizes_T = [max(1, *nums) for nums in zip(*num_rows_WT, strict=True)]
        with self._beside.begin():
            rows = to_device(ahead.rows_X, self._device).split([num for (num,) in ahead.num_rows_TP.tolist()])
            mine_X = rows[0].new_full((sum(sizes_T),), NO_ROW)
            for rows_U, room_U in zip(rows, mine_X.split(sizes_T), strict=True):
                room_U[: len(rows_U)] = rows_U
            all_X = mine_X.new_empty(len(num_rows_WT) * len(mine_X))
            dist.all_gather_into_tensor(all_X, mine_X)
            self._known = [
                (rows_U, size, joined(rows_WU.flatten(), has_kernels(weight), NO_ROW))
                for rows_U, size, rows_WU, weight in zip(
                    rows, sizes_T, all_X.view(-1, len(mine_X)).split(sizes_T, dim=1), self._weights, strict=True
                )
            ]
        return {}

    def summed(self, mine: Sequence[TableGradient]) -> list[TableGradient]:
        """After its pass: all workers' gradients of each table from this worker's."""
        self._beside.awaited()
        found = []
        for gradient, (rows_U, size, of_all) in zip(mine, self._known, strict=True):
            sent_Ud = laid_out(gradient, rows_U, size, self._sent_as)
            received_Nd = sent_Ud.new_empty(dist.get_world_size() * size, sent_Ud.shape[1])
            dist.all_gather_into_tensor(received_Nd, sent_Ud)
            found.append(of_all.sum(received_Nd, gradient.gradient_Ud.dtype))
        self._known = []
        return found


def laid_out(gradient: TableGradient, rows_U: Tensor, size: int, sent_as: torch.dtype | None) -> Tensor:
    """[size, d]: the gradient of each of `rows_U`, ascending, of which some may not have been read; zeros behind them."""
    num = len(rows_U)  # no more were read: what is further back is filling
    found_U, gradient_Ud = gradient.rows_U[:num], gradient.gradient_Ud[:num]
    place_U = torch.searchsorted(rows_U, found_U.to(rows_U.dtype))
    exists_U = torch.arange(len(found_U), device=rows_U.device) < gradient.num_rows.to(rows_U.device)
    dtype = sent_as or gradient_Ud.dtype
    out = gradient_Ud.new_zeros(size + 1, gradient_Ud.shape[1], dtype=dtype)
    return out.index_copy_(0, torch.where(exists_U, place_U, size), gradient_Ud.to(dtype))[:size]
