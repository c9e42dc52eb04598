"""Large tables with their rows spread over the workers: each owns a block of every table, lends its rows to all and updates them.

A batch's rows come by an all-to-all exchange before its pass, their gradients go back by another after it: no worker holds a table,
and what is sent depends on what was read. A worker's block is its model's parameter.

U rows that a batch here reads, A rows that are asked of this worker, d width, W workers, T tables.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longer.model.embedding import HashedTable, HeldRows
from longer.model.ranker import Ranker
from longer.training.checkpoints import copied
from longer.training.table_gradients import combine


class _Loan(NamedTuple):
    """Rows of one table on their way: from this worker's block, how many to each worker, and how many come from each."""

    place_A: Tensor
    num_lent_W: list[int]
    num_held_W: list[int]


class ShardedTables:
    """The large tables of a model from which the other workers' rows are cut off; all workers call all methods in step."""

    def __init__(self, model: Ranker) -> None:
        self._rank, self._num_workers = dist.get_rank(), dist.get_world_size()
        self._tables, self._loans = model.large_tables(), dict[str, _Loan]()
        for table in self._tables.values():
            table.embedding.weight = nn.Parameter(self._block(table, table.embedding.weight.detach()).clone())

    def fetch(self, keys: Mapping[str, Tensor]) -> dict[str, HeldRows]:
        """The rows of each table that these keys read; their gradients are waited for by `give_back`."""
        rows = {name: table.rows_of(keys[name]).unique() for name, table in self._tables.items()}
        cuts_TW1 = [
            torch.searchsorted(rows[name], torch.tensor(self._bounds(table), device=rows[name].device))
            for name, table in self._tables.items()
        ]
        num_held_WT = torch.stack(cuts_TW1).diff().T.contiguous()
        num_lent_WT = torch.empty_like(num_held_WT)
        dist.all_to_all_single(num_lent_WT, num_held_WT)
        num_held_TW, num_lent_TW = torch.stack([num_held_WT.T, num_lent_WT.T]).tolist()
        held = {}
        for (name, table), num_held_W, num_lent_W in zip(self._tables.items(), num_held_TW, num_lent_TW, strict=True):
            place_A = _exchange(rows[name], num_held_W, num_lent_W) - self._bounds(table)[self._rank]
            self._loans[name] = _Loan(place_A, num_lent_W, num_held_W)
            lent_Ad = table.embedding.weight.detach()[place_A]
            held[name] = HeldRows(rows[name], _exchange(lent_Ad, num_lent_W, num_held_W))
        return held

    def give_back(self) -> None:
        """What the tables noted of the rows that were fetched last becomes what all workers noted of this worker's block."""
        for name, table in self._tables.items():
            assert table.reads is not None
            loan, mine = self._loans.pop(name), combine(table.reads)
            num_held, width = sum(loan.num_held_W), mine.gradient_Ud.shape[1]
            exists_U = torch.arange(len(mine.rows_U), device=mine.rows_U.device) < mine.num_rows.to(mine.rows_U.device)
            place_U = torch.where(exists_U, mine.rows_U.long(), num_held)  # filling goes behind
            gradient_Ud = mine.gradient_Ud.new_zeros(num_held + 1, width).index_copy_(0, place_U, mine.gradient_Ud)
            gradient_Ad = _exchange(gradient_Ud[:num_held], loan.num_held_W, loan.num_lent_W)
            place_A = loan.place_A
            if not len(place_A):  # a step counts for a block of which nothing was read, too
                place_A, gradient_Ad = place_A.new_zeros(1), gradient_Ad.new_zeros(1, width)
            table.reads[:] = [(place_A, gradient_Ad)]

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This worker's part of a weight or moment of the whole model; `name` is the parameter's, or begins with it and a slash."""
        table = self._table_of(name)
        return whole if table is None or not whole.dim() else self._block(table, whole)

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The opposite, copied to the CPU: the first worker's is of use, the others' is what they gave to it."""
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

    def _block(self, table: HashedTable, whole: Tensor) -> Tensor:
        bounds = self._bounds(table)
        return whole[bounds[self._rank] : bounds[self._rank + 1]]

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
