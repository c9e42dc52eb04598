"""What candidates and new groups read of B users whose states lie in a pool: tables of numbers, no copy of any state.

B states, N rows of the pool, P numbers of all states (flat), L layers, T tail tokens, H heads, Z head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64
from longer.model.context import Groups, Tail
from longer.model.fuse import fused_on_cuda
from longer.model.inputs import tensors_of
from longer.model.pool import StatePool
from longer.model.state_layout import Places


@dataclass(frozen=True)
class PoolContext:
    """A `SharedContext` (`model.context`) in a pool. All arrays lie on the host, and go to the device in one copy."""

    pool: StatePool
    places: Places
    first_B: Int64
    query_first_B: Int64
    num_events_B: Int64

    @property
    def end_B(self) -> Int64:
        return self.num_events_B // self.pool.layout.windows.merge_size

    @property
    def arrays(self) -> dict[str, Int64]:
        """Everything that the device must know, each [B]."""
        layers = range(self.pool.layout.num_layers)
        return {
            "first": self.first_B,
            "query_first": self.query_first_B,
            "num_events": self.num_events_B,
            "event_ts": self.places.event_ts_B,
            "event_words": self.places.event_words_B,
            **{f"groups{layer}": self.places.layer_B(layer) for layer in layers},
            **{f"num_groups{layer}": self._num_keys_B(layer) for layer in layers},
            **{f"tail{layer}": self.places.tail_B(layer) for layer in layers},
        }

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        """`arrays` on the device."""
        return tensors_of(self.arrays, self.pool.device)

    def first_of_layer_B(self, layer: int) -> Tensor:
        return self.numbers["first" if layer == 0 else "query_first"]

    def groups(self, layer: int, dtype: torch.dtype) -> Groups:
        """Where they lie, as they are kept."""
        longest = int(self._num_keys_B(layer).max(initial=0))
        return _groups(self.pool, self.numbers, layer, dtype, longest)

    def rows(self, layer: int, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        sizes = self._num_keys_B(layer).tolist()
        if self.pool.layout.dtype != dtype:
            key_NHZ, value_NHZ = self._converted(layer, dtype)
            return key_NHZ.split(sizes), value_NHZ.split(sizes)
        spans = [slice(begin, begin + n) for begin, n in zip(self.places.layer_B(layer).tolist(), sizes, strict=True)]
        key_NHZ, value_NHZ = self.pool.keys_values
        return [key_NHZ[span] for span in spans], [value_NHZ[span] for span in spans]

    def tail(self, dtype: torch.dtype) -> Tail:
        """A copy of the states' own tokens: a few rows each."""
        return _tail(self.pool, self.numbers, dtype)

    def write_tail(self, tail: Tail) -> None:
        _write_tail(self.pool, self.numbers, tail)

    def _num_keys_B(self, layer: int) -> Int64:
        return self.end_B - (self.first_B if layer == 0 else self.query_first_B)

    def _converted(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        row_N, number_N = spans(np.zeros_like(self.first_B), self._num_keys_B(layer))
        rows = tensors_of({"rows": self.places.layer_B(layer)[row_N] + number_N}, self.pool.device)["rows"]
        return self.pool.read_rows(rows, dtype)


@dataclass(frozen=True)
class StagedContext:
    """The same from `PoolContext.arrays` on the device alone, so that other states can take their place in a captured graph.

    Its kernels read the pool where it lies, as they do those of `PoolContext`.
    """

    pool: StatePool
    numbers: dict[str, Tensor]

    def first_of_layer_B(self, layer: int) -> Tensor:
        return self.numbers["first" if layer == 0 else "query_first"]

    def groups(self, layer: int, dtype: torch.dtype) -> Groups:
        layout = self.pool.layout
        longest = layout.most_groups if layer == 0 else layout.most_query_groups
        return _groups(self.pool, self.numbers, layer, dtype, longest)

    def rows(self, layer: int, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        raise NotImplementedError("kernels read it, loops over histories do not")

    def tail(self, dtype: torch.dtype) -> Tail:
        return _tail(self.pool, self.numbers, dtype)

    def write_tail(self, tail: Tail) -> None:
        _write_tail(self.pool, self.numbers, tail)


def _groups(pool: StatePool, numbers: dict[str, Tensor], layer: int, dtype: torch.dtype, longest: int) -> Groups:
    kept = pool.layout.dtype
    assert kept in (dtype, torch.int8, torch.float8_e4m3fn), f"kernels that compute in {dtype} do not read {kept}"
    begin_B, num_keys_B = numbers[f"groups{layer}"], numbers[f"num_groups{layer}"]
    return Groups(pool.keys_values, begin_B, num_keys_B, longest, pool.scales)


def _tail(pool: StatePool, numbers: dict[str, Tensor], dtype: torch.dtype) -> Tail:
    rows_LBT, exists_BT = _tail_rows(*_tails(pool, numbers))
    key_LBTHZ, value_LBTHZ = pool.read_rows(rows_LBT, dtype)
    return Tail(list(key_LBTHZ), list(value_LBTHZ), exists_BT)


def _write_tail(pool: StatePool, numbers: dict[str, Tensor], tail: Tail) -> None:
    """Who fills a batch up has a tail in the pool's last row."""
    rows_LBT, _ = _tail_rows(*_tails(pool, numbers))
    pool.write_rows(rows_LBT, torch.stack(tail.keys), torch.stack(tail.values))


def _tails(pool: StatePool, numbers: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], int, int, int]:
    layout = pool.layout
    first_LB = [numbers[f"tail{layer}"] for layer in range(layout.num_layers)]
    return numbers["num_events"], first_LB, layout.num_tail, layout.windows.merge_size, pool.trash_row


@fused_on_cuda
def _tail_rows(
    num_events_B: Tensor, first_LB: list[Tensor], num_tail: int, merge_size: int, last_row: int
) -> tuple[Tensor, Tensor]:
    """[L, B, T] and [B, T]: the tails' rows in each layer, and which are there."""
    number_T = torch.arange(num_tail, device=num_events_B.device)
    rows_LBT = (torch.stack(first_LB)[..., None] + number_T).clamp_max(last_row)
    return rows_LBT, (number_T > 0) | (num_events_B % merge_size > 0)[:, None]


def spans(begin_B: Int64, end_B: Int64) -> tuple[Int64, Int64]:
    """Flat (row, value) pairs of begin_B[b] <= value < end_B[b]: `context.ranges` on the host."""
    length_B = np.maximum(end_B - begin_B, 0)
    row_P = np.repeat(np.arange(len(length_B)), length_B)
    return row_P, np.arange(len(row_P)) + (begin_B - np.cumsum(length_B) + length_B)[row_P]
