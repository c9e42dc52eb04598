"""What is kept between the three steps of the model, and how padded rows of groups grow and slide.

B histories, G context groups (padded), Q query-window groups (padded), N new groups in all histories (flat), R requests,
T tail tokens, D width, H heads, Z head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longer.model.shared_attention import Pair, Readers


@dataclass(frozen=True)
class Groups:
    """Keys and values of a layer's groups, flat, [N, H, Z]: history b's are the `num_keys_B[b]` rows from `begin_B[b]` on.

    With `scales_NH` each head of a key and a value is times one of them.
    """

    pair_NHZ: Pair
    begin_B: Tensor
    num_keys_B: Tensor
    max_keys: int
    scales_NH: Pair | None = None

    def readers(self, offsets_B1: Tensor, **reads: Any) -> Readers:
        """Of these groups, by queries sorted by history."""
        return Readers(offsets_B1, self.begin_B, self.num_keys_B, self.max_keys, **reads)

    def over(self, readers: Readers) -> Readers:
        """The same queries, of these groups."""
        return readers.over(self.begin_B, self.num_keys_B, self.max_keys)


class SharedContext(Protocol):
    """What tails and candidates read of B histories: full groups up to `end_B`, from `first_of_layer_B` on in each layer."""

    def first_of_layer_B(self, layer: int) -> Tensor: ...

    def groups(self, layer: int, dtype: torch.dtype) -> Groups:
        """A layer's groups, for queries of this type, as our kernels read them."""
        ...

    def rows(self, layer: int, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Each history's keys and values, as `attend_shared` reads them."""
        ...


@dataclass(frozen=True)
class Context:
    """The full groups of B histories: what candidates, requests and later groups read. Padded at the end.

    Layer 0 holds the history window, from group `first_B`; the layers above hold the query window, from group `query_first_B`.
    Both end before group `end_B`. `tokens_BQD` are the query window's inputs to the first layer.
    """

    first_B: Tensor
    query_first_B: Tensor
    end_B: Tensor
    tokens_BQD: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def first_of_layer_B(self, layer: int) -> Tensor:
        return self.first_B if layer == 0 else self.query_first_B

    def groups(self, layer: int, dtype: torch.dtype) -> Groups:
        """A layer's keys and values with the padded rows laid end to end."""
        num_rows, longest = self.keys[layer].shape[:2]
        begin_B = torch.arange(num_rows, device=self.first_B.device) * longest
        pair = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        return Groups(pair, begin_B, torch.full_like(begin_B, longest), longest)

    def rows(self, layer: int, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.keys[layer].unbind(), self.values[layer].unbind()


@dataclass(frozen=True)
class Tail:
    """Keys and values, a pair of [R, T, H, Z] a layer, of each request's partial newest group (if any) and user globals.

    `x_RTD` are the tokens as the last layer reads them; user states do not keep it.
    """

    keys: list[Tensor]
    values: list[Tensor]
    exists_RT: Tensor
    x_RTD: Tensor | None = None


def take_rows(table_R: Tensor, rows: Tensor) -> Tensor:
    """`table_R[rows]` through an embedding look-up, whose gradient is summed several times faster than an index's on a CPU."""
    if not len(table_R):
        return table_R[rows]
    return F.embedding(rows, table_R.flatten(1)).unflatten(-1, table_R.shape[1:])


def ranges(begin_B: Tensor, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """Flat (row, value) pairs of begin_B[b] <= value < end_B[b]."""
    length_B = (end_B - begin_B).clamp_min(0)
    row_P = torch.repeat_interleave(length_B)
    value_P = torch.arange(len(row_P), device=row_P.device) - (length_B.cumsum(0) - length_B)[row_P] + begin_B[row_P]
    return row_P, value_P


def row_offsets(row_P: Tensor, num_rows: int) -> Tensor:
    """[B + 1]: where each row's part of the sorted `row_P` begins, and the end."""
    return torch.searchsorted(row_P, torch.arange(num_rows + 1, device=row_P.device))


def splice(
    old_BG: Tensor,
    new_N: Tensor,
    old_first_B: Tensor,
    old_end_B: Tensor,
    first_B: Tensor,
    end_B: Tensor,
    row_N: Tensor,
    group_N: Tensor,
) -> Tensor:
    """Groups [first_B, end_B) of each row, padded with zeros: old ones of [old_first_B, old_end_B) still wanted, then new ones."""
    longest = int((end_B - first_B).max()) if len(first_B) else 0
    out_BG = new_N.new_zeros(len(first_B), longest, *new_N.shape[1:])
    if old_BG.shape[1]:
        row_P, group_P = ranges(torch.maximum(old_first_B, first_B), old_end_B)
        out_BG[row_P, group_P - first_B[row_P]] = old_BG[row_P, group_P - old_first_B[row_P]].to(out_BG.dtype)
    out_BG[row_N, group_N - first_B[row_N]] = new_N
    return out_BG
