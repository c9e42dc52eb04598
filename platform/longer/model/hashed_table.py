"""Tables of embeddings that grow with items and users: keys are hashed to rows, and a step trains the rows that it read.

E keys read, d width, U rows of a table.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.model.fuse import fused_on_cuda
from longer.model.small_tables import read_rows

TABLE_STD = 0.05
"""Of first weights."""
_NO_ROW = torch.iinfo(torch.int64).max


Reads = list[tuple[Tensor, Tensor]]
"""Rows of a table that a forward pass read, [E], and the gradients of what was read, [E, d]; a row may come again."""


class HeldRows(NamedTuple):
    """Some rows of a table, by ascending number, and their weights; room that is left has the number `_NO_ROW`."""

    rows_U: Tensor
    weight_Ud: Tensor

    def put(self, held: "HeldRows") -> None:
        """Takes in what another holds, which has no more rows."""
        size = len(held.rows_U)
        self.rows_U[:size].copy_(held.rows_U)
        self.rows_U[size:].fill_(_NO_ROW)
        self.weight_Ud[:size].copy_(held.weight_Ud)


class HashedTable(nn.Module):
    """Embedding of 63-bit keys in a fixed number of rows; row 0 is for the missing key 0. Collisions share a row.

    With `reads`, a backward pass notes there what rows were read and their gradients, and the table has none: whoever trains
    then updates those rows only. Without, the gradient is the parameter's, as large as the table. With `held`, what is read is
    read there, and noted by its place there.
    """

    def __init__(self, num_rows: int, width: int, std: float = TABLE_STD):
        super().__init__()
        self.num_rows = num_rows
        self.embedding = nn.Embedding(num_rows, width)
        self.reads: Reads | None = None
        self.held: HeldRows | None = None
        nn.init.normal_(self.embedding.weight, std=std)

    def rows_of(self, keys: Tensor) -> Tensor:
        """The row of each key."""
        return _rows_of(keys.flatten(), self.num_rows).view_as(keys)  # flat: one compiled kernel serves any shape

    def room(self, num_rows: int) -> HeldRows:
        """For any `num_rows` rows; nothing is there yet."""
        weight = self.embedding.weight
        rows_U = torch.full((num_rows,), _NO_ROW, device=weight.device)
        return HeldRows(rows_U, weight.new_zeros(num_rows, weight.shape[1]))

    def forward(self, keys: Tensor) -> Tensor:
        weight, rows = self.embedding.weight, self.rows_of(keys)
        if self.held is not None:
            weight, rows = self.held.weight_Ud, torch.searchsorted(self.held.rows_U, rows)
        if self.reads is None or not torch.is_grad_enabled():
            return read_rows(weight, rows)
        return _NotedLookup.apply(self.embedding.weight, weight, rows, self.reads)


@fused_on_cuda
def _rows_of(keys: Tensor, num_rows: int) -> Tensor:
    return torch.where(keys == 0, 0, keys % (num_rows - 1) + 1)


class _NotedLookup(torch.autograd.Function):
    """`learned` is the parameter for whose sake there is a backward pass, whether or not its memory is what is read."""

    @staticmethod
    def forward(ctx: Any, learned: Tensor, weight_Ud: Tensor, rows: Tensor, reads: Reads) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.reads = reads
        return F.embedding(rows, weight_Ud)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.reads.append((ctx.saved_tensors[0].flatten(), gradient.flatten(0, -2)))
        return None, None, None, None
