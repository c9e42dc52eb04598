"""Large tables with their rows spread over the workers: each owns a block of every table, lends its rows to all and updates them.

A batch's rows come by an all-to-all exchange before its pass, their gradients go back by another after it: what is sent depends
on what was read, and no device holds a table. A worker's block is its model's parameter. It is cut from a whole model, which each
worker makes in host memory as it starts; the first worker's host holds whole tables again while a checkpoint is written.

U rows that a batch here reads, A rows that are asked of this worker, d width, W workers, T tables.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longer.model.fuse import has_kernels
from longer.model.hashed_table import HashedTable, HeldRows
from longer.model.inputs import to_device
from longer.model.ranker import Ranker
from longer.training.checkpoints import copied
from longer.training.exchange import NO_ROW, Ahead, Announcer, Beside, laid_out
from longer.training.table_gradients import Joined, TableGradient, joined


class _Loan(NamedTuple):
    """Rows of one table on their way: from this worker's block, how many to each worker, and how many come from each."""

    place_A: Tensor
    num_lent_W: list[int]
    num_held_W: list[int]


class ShardedTables:
    """The large tables of a model from which the other workers' rows are cut off; all workers call all methods in step.

    Gradients are sent as type `sent_as` where that is told, and summed in their own, by rank.
    """

    def __init__(self, model: Ranker, device: torch.device, sent_as: torch.dtype | None) -> None:
        self._rank, self._num_workers = dist.get_rank(), dist.get_world_size()
        self._tables, self._device, self._sent_as = model.large_tables(), device, sent_as
        self._loans, self._joined, self._beside = list[_Loan](), list[Joined](), Beside(device)
        for table in self._tables.values():
            table.embedding.weight = nn.Parameter(table.embedding.weight.detach()[self._rows(table)].clone())
        bounds = [self._bounds(table) for table in self._tables.values()]
        self.announce, self._announce_now = (Announcer(self._tables, bounds, device.type == "cuda") for _ in range(2))

    def begin(self, ahead: Ahead) -> dict[str, HeldRows]:
        """The rows of each table that this batch reads; their gradients are waited for by `summed`."""
        held, self._loans = self._lent(ahead)
        with self._beside.begin():
            self._joined = [
                # a step counts for a block of which nothing was read, too
                joined(place_A if len(place_A) else place_A.new_zeros(1), has_kernels(table.embedding.weight), NO_ROW)
                for table, (place_A, _, _) in zip(self._tables.values(), self._loans, strict=True)
            ]
        return held

    def begin_now(self, keys: Mapping[str, npt.NDArray]) -> dict[str, HeldRows]:
        """The same where nothing is learned, of a batch that nobody has announced; another thread may announce others."""
        return self._lent(self._announce_now(keys))[0]

    def _lent(self, ahead: Ahead) -> tuple[dict[str, HeldRows], list[_Loan]]:
        num_rows_TWW = list(zip(*ahead.num_rows_WTP(), strict=True))  # by table, worker that reads and worker that owns
        num_held_TW = [of_table[self._rank] for of_table in num_rows_TWW]
        num_lent_TW = [[owned_W[self._rank] for owned_W in of_table] for of_table in num_rows_TWW]
        rows_X = to_device(ahead.rows_X, self._device)
        asked = self._asked(rows_X, num_held_TW, num_lent_TW)
        held, loans = {}, []
        for (name, table), rows_U, place_A, num_held_W, num_lent_W in zip(
            self._tables.items(), rows_X.split([*map(sum, num_held_TW)]), asked, num_held_TW, num_lent_TW, strict=True
        ):
            place_A -= self._bounds(table)[self._rank]
            weight = table.embedding.weight.detach()
            lent_Ad = weight.index_select(0, place_A)
            held[name] = HeldRows(rows_U.long(), _exchange(lent_Ad, num_lent_W, num_held_W))
            loans.append(_Loan(place_A, num_lent_W, num_held_W))
        return held, loans

    def summed(self, mine: Sequence[TableGradient]) -> list[TableGradient]:
        """All workers' gradients of this worker's block of each table, from this worker's of the rows that it held."""
        self._beside.awaited()
        found = []
        for loan, of_all, gradient in zip(self._loans, self._joined, mine, strict=True):
            num_held = sum(loan.num_held_W)
            place_U = torch.arange(num_held, device=gradient.rows_U.device)
            sent_Ud = laid_out(gradient, place_U, num_held, self._sent_as)
            received_Ad = _exchange(sent_Ud, loan.num_held_W, loan.num_lent_W)
            if not len(received_Ad):
                received_Ad = received_Ad.new_zeros(1, received_Ad.shape[1])
            found.append(of_all.sum(received_Ad, gradient.gradient_Ud.dtype))
        return found

    def _asked(
        self, rows_X: Tensor, num_held_TW: Sequence[list[int]], num_lent_TW: Sequence[list[int]]
    ) -> list[Tensor]:
        """[A] of each table: the rows of this worker's block that the batches read, worker by worker, in one exchange."""
        by_table_and_owner = rows_X.split([num for held_W in num_held_TW for num in held_W])
        sent_X = torch.cat(
            [x for owner in range(self._num_workers) for x in by_table_and_owner[owner :: self._num_workers]]
        )
        num_lent_WT, num_held_WT = (list(zip(*nums_TW, strict=True)) for nums_TW in (num_lent_TW, num_held_TW))
        received_X = _exchange(sent_X, [*map(sum, num_held_WT)], [*map(sum, num_lent_WT)])
        by_worker_and_table = received_X.split([num for lent_T in num_lent_WT for num in lent_T])
        return [torch.cat(by_worker_and_table[number :: len(num_lent_TW)]) for number in range(len(num_lent_TW))]

    def own_rows(self, name: str) -> slice:
        """This worker's rows of a weight or moment of the whole model; `name` is the parameter's, or begins with it and a slash."""
        table = self._table_of(name)
        return slice(None) if table is None else self._rows(table)

    def whole(self, name: str, own: Tensor) -> Tensor:
        """All rows of a weight or moment, on the CPU: the first worker's is of use, the others' is what they gave to it."""
        table = self._table_of(name)
        if table is None or not own.dim():
            return copied(name, own)
        if self._rank > 0:
            dist.send(own.detach().contiguous(), 0)
            return own
        out = torch.empty(table.num_rows, *own.shape[1:], dtype=own.dtype)
        for worker, (begin, end) in enumerate(pairwise(self._bounds(table))):
            block = own.detach() if worker == 0 else own.new_empty(end - begin, *own.shape[1:])
            if worker > 0:
                dist.recv(block, worker)
            out[begin:end].copy_(block)
        return out

    def _table_of(self, name: str) -> HashedTable | None:
        return self._tables.get(name.partition("/")[0])

    def _rows(self, table: HashedTable) -> slice:
        bounds = self._bounds(table)
        return slice(bounds[self._rank], bounds[self._rank + 1])

    def _bounds(self, table: HashedTable) -> list[int]:
        """The first row of each worker, and the number of rows."""
        return [table.num_rows * worker // self._num_workers for worker in range(self._num_workers + 1)]


def over_owners(norm: Tensor) -> Tensor:
    """The norm of all workers' parts together."""
    squared = norm.square()
    dist.all_reduce(squared)
    return squared.sqrt()


def _exchange(x_N: Tensor, num_sent_W: list[int], num_received_W: list[int]) -> Tensor:
    """Parts of `x_N`, so long, to each worker in turn; what came from each, one after the other."""
    received_N = x_N.new_empty(sum(num_received_W), *x_N.shape[1:])
    dist.all_to_all_single(received_N, x_N.contiguous(), num_received_W, num_sent_W)
    return received_N
