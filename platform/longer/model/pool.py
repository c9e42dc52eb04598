"""Memory for user states, allocated once: a state is one slot of rows, which attention reads where they lie.

A row holds the key and the value of one group, or of one tail token, in one layer; of rotated keys, as layers read them. A slot
for up to g groups holds, one after the other: g rows of the first layer; u = min(g, the query window's most groups) rows of each
layer above; T rows a layer of the tail; the query window's inputs to the first layer, two in a row; and the events' times and
sorted (key, number) pairs, for candidates to be counted. What a state holds starts at the front of each part.

B states, N rows of the pool, V = 2N vectors, G groups, T tail tokens, F interaction fields, H heads, Z head width, I int64 words.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64
from longer.model.longer import Longer
from longer.model.pinned import pinned_words
from longer.slots import Move, SlotAllocator, slot_sizes, units_for
from longer.windows import WindowRule

Precision = Literal["float64", "float32", "bf16", "int8", "fp8"]
"""What keys and values are kept in. int8 has a float32 scale for each head of each vector; fp8 is float8_e4m3fn."""

DTYPES: dict[Precision, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_WORD_BYTES = 8
_FP8_MAX = 448.0


@dataclass(frozen=True)
class StateLayout:
    """Sizes of everything in a slot; the same for all states of models of one shape, whatever their weights."""

    windows: WindowRule
    num_heads: int
    head_width: int
    num_layers: int
    num_tail: int
    num_fields: int
    precision: Precision

    @staticmethod
    def of(model: Longer, precision: Precision) -> "StateLayout":
        num_fields = len(model.interaction_fields) if model.settings.interactions else 0
        heads = model.settings.num_heads
        return StateLayout(
            windows=model.windows,
            num_heads=heads,
            head_width=model.settings.width // heads,
            num_layers=len(model.layers),
            num_tail=model.embedding.num_globals + 1,
            num_fields=num_fields,
            precision=precision,
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @cached_property
    def vector_words(self) -> int:
        """int64 words of one key or value, a scale of each head included."""
        num_bytes = self.num_heads * (self.head_width * self.dtype.itemsize + (4 if self.precision == "int8" else 0))
        return -(-num_bytes // _WORD_BYTES)

    @property
    def row_bytes(self) -> int:
        return 2 * self.vector_words * _WORD_BYTES

    @property
    def most_groups(self) -> int:
        """Groups of the longest history window."""
        return self.windows.history_groups + self.windows.stride_groups

    @property
    def most_query_groups(self) -> int:
        return self.windows.query_groups + self.windows.stride_groups

    def upper_groups(self, groups: Int64) -> Int64:
        """Groups that the layers above have room for in slots for `groups` groups."""
        return np.minimum(groups, self.most_query_groups)

    def event_words(self, groups: Int64) -> Int64:
        """int64 words of one field's pairs, and of the events' times."""
        return (groups + 1) * self.windows.merge_size

    def num_rows(self, groups: Int64) -> Int64:
        """Rows of a slot for `groups` full groups and a partial one."""
        return self._event_rows(groups) + -(
            -(self.num_fields + 1) * self.event_words(groups) * bool(self.num_fields) // (2 * self.vector_words)
        )

    @property
    def largest_rows(self) -> int:
        return int(self.num_rows(np.array(self.most_groups)))

    @property
    def smallest_rows(self) -> int:
        return int(self.num_rows(np.array(0)))

    def groups_in(self, slot_rows_B: Int64) -> Int64:
        """[B]: the most groups that slots of so many rows have room for."""
        return self._groups_by_rows.searchsorted(slot_rows_B, side="right") - 1

    @cached_property
    def _groups_by_rows(self) -> Int64:
        return self.num_rows(np.arange(self.most_groups + 1))

    def _tail_rows(self, groups: Int64) -> Int64:
        return groups + (self.num_layers - 1) * self.upper_groups(groups)

    def _token_rows(self, groups: Int64) -> Int64:
        return self._tail_rows(groups) + self.num_layers * self.num_tail

    def _event_rows(self, groups: Int64) -> Int64:
        return self._token_rows(groups) + (self.upper_groups(groups) + 1) // 2


@dataclass(frozen=True)
class Places:
    """Where B states lie: slots from row `start_B` on, with room for `groups_B` groups."""

    layout: StateLayout
    start_B: Int64
    groups_B: Int64

    def layer_B(self, layer: int) -> Int64:
        """First row of a layer's groups."""
        if layer == 0:
            return self.start_B
        return self.start_B + self.groups_B + (layer - 1) * self.layout.upper_groups(self.groups_B)

    def tail_B(self, layer: int) -> Int64:
        """First row of a layer's tail."""
        return self.start_B + self.layout._tail_rows(self.groups_B) + layer * self.layout.num_tail

    @property
    def tokens_B(self) -> Int64:
        """First vector of the query window's inputs."""
        return 2 * (self.start_B + self.layout._token_rows(self.groups_B))

    @property
    def event_ts_B(self) -> Int64:
        """First word of the events' times; a field's pairs are `event_words` words further each."""
        return 2 * self.layout.vector_words * (self.start_B + self.layout._event_rows(self.groups_B))

    @property
    def event_words_B(self) -> Int64:
        return self.layout.event_words(self.groups_B)


class StatePool:
    """`num_bytes` of rows on a device, or in host memory that a device copies from (`pinned`), rounded up to whole slabs.

    One row more stands at the end, for writes that nobody reads. All of it is zero at first.
    """

    def __init__(
        self, layout: StateLayout, num_bytes: int, device: torch.device | str = "cpu", pinned: bool = False
    ) -> None:
        self.layout = layout
        slab_rows = 2 * layout.largest_rows
        num_rows = -(-num_bytes // (slab_rows * layout.row_bytes)) * slab_rows
        shape = num_rows + 1, 2 * layout.vector_words
        if pinned:
            self.words_NI = pinned_words(shape[0] * shape[1]).view(shape)
        elif torch.device(device).type == "cpu":
            self.words_NI = torch.from_numpy(np.zeros(shape, np.int64))  # takes memory as it is used
        else:
            self.words_NI = torch.zeros(shape, dtype=torch.int64, device=device)
        self.slots = SlotAllocator(num_rows, layout.largest_rows, layout.smallest_rows, _weakly(self._move))

    @staticmethod
    def sizes_of(layout: StateLayout) -> list[int]:
        """Rows of the sizes that slots have."""
        return slot_sizes(2 * layout.largest_rows, layout.smallest_rows)

    @staticmethod
    def bytes_for(layout: StateLayout, slot_bytes: int) -> int:
        """Of a pool in which slots of so many bytes in all always find room."""
        slot_rows, slab_rows = slot_bytes // layout.row_bytes, 2 * layout.largest_rows
        return units_for(slot_rows, slab_rows, StatePool.sizes_of(layout)) * layout.row_bytes

    @property
    def device(self) -> torch.device:
        return self.words_NI.device

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return self.slots.num_units * self.layout.row_bytes

    @cached_property
    def words_I(self) -> Tensor:
        """All of it as int64 words."""
        return self.words_NI.view(-1)

    @cached_property
    def words_VI(self) -> Tensor:
        return self.words_NI.view(-1, self.layout.vector_words)

    @cached_property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """All keys and values where they lie, two of [N, H, Z], in the precision that they are kept in."""
        heads, width = self.layout.num_heads, self.layout.head_width
        both = self.words_VI.view(self.layout.dtype)[:, : heads * width].unflatten(1, (heads, width))
        return both[0::2], both[1::2]

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """What each head of all keys and values is times of, two of [N, H]; None where they are kept as they are."""
        if self.layout.precision != "int8":
            return None
        both = self.words_VI.view(torch.float32)[:, -self.layout.num_heads :]
        return both[0::2], both[1::2]

    @property
    def trash_word(self) -> int:
        return self.words_NI.numel() - 1

    @property
    def trash_row(self) -> int:
        return len(self.words_NI) - 1

    @property
    def trash_vector(self) -> int:
        return len(self.words_VI) - 1

    def clear(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Overwrites rows, so many from each start on, in one launch."""
        torch._foreach_zero_([self.words_NI[start : start + num_rows] for start, num_rows in ranges])

    def clear_rests(self) -> None:
        """Overwrites all that is in no slot, wherever something has been since the last time."""
        self.clear([*self.slots.rests(), (self.trash_row, 1)])

    def places(self, starts: Int64, sizes: Int64) -> Places:
        return Places(self.layout, starts, self.layout.groups_in(sizes))

    def read_rows(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, each [..., H, Z]."""
        words = self.words_NI.index_select(0, rows.flatten()).view(-1, self.layout.vector_words)
        key, value = self._decoded(words, dtype).unflatten(0, (-1, 2)).unbind(1)
        return key.unflatten(0, rows.shape), value.unflatten(0, rows.shape)

    def write_rows(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Puts keys and values, each [..., H, Z], into rows."""
        both = torch.stack([key.flatten(0, -3), value.flatten(0, -3)], dim=1).flatten(0, 1)
        self.words_NI.index_copy_(0, rows.flatten(), self._encoded(both).view(-1, self.words_NI.shape[1]))

    def read_vectors(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """[P, D]"""
        return self._decoded(self.words_VI.index_select(0, vectors), dtype).flatten(1)

    def write_vectors(self, vectors: Tensor, x_PD: Tensor) -> None:
        x_PHZ = x_PD.unflatten(1, (self.layout.num_heads, self.layout.head_width))
        self.words_VI.index_copy_(0, vectors, self._encoded(x_PHZ))

    def _encoded(self, x_PHZ: Tensor) -> Tensor:
        """[P, words] of vectors, as they are kept."""
        layout, num_values = self.layout, self.layout.num_heads * self.layout.head_width
        if layout.precision != "int8" and num_values * layout.dtype.itemsize == layout.vector_words * _WORD_BYTES:
            return self._as_kept(x_PHZ).flatten(1).contiguous().view(torch.int64)
        words = self.words_NI.new_zeros(len(x_PHZ), layout.vector_words)
        if layout.precision == "int8":
            x_PHZ = x_PHZ.float()
            scale_PH = x_PHZ.abs().amax(-1).clamp_min(1e-12) / 127
            words.view(torch.float32)[:, -layout.num_heads :] = scale_PH
            x_PHZ = (x_PHZ / scale_PH[..., None]).round()
        words.view(layout.dtype)[:, :num_values] = self._as_kept(x_PHZ).flatten(1)
        return words

    def _as_kept(self, x_PHZ: Tensor) -> Tensor:
        if self.layout.precision == "fp8":
            x_PHZ = x_PHZ.clamp(-_FP8_MAX, _FP8_MAX)
        return x_PHZ.to(self.layout.dtype)

    def _decoded(self, words_PI: Tensor, dtype: torch.dtype) -> Tensor:
        """[P, H, Z] of vectors as they are kept."""
        layout = self.layout
        kept = words_PI.view(layout.dtype)[:, : layout.num_heads * layout.head_width]
        x_PHZ = kept.to(dtype).unflatten(1, (layout.num_heads, layout.head_width))
        if layout.precision == "int8":
            x_PHZ = x_PHZ * words_PI.view(torch.float32)[:, -layout.num_heads :, None].to(dtype)
        return x_PHZ

    def _move(self, moves: list[Move]) -> None:
        for source, target, size in moves:
            self.words_NI[target : target + size].copy_(self.words_NI[source : source + size])


def _weakly(move: Callable[[list[Move]], None]) -> Callable[[list[Move]], None]:
    """The method, without keeping its pool: a pool's memory goes with the last who holds it, not when garbage is collected."""
    method = weakref.WeakMethod(move)

    def carry_out(moves: list[Move]) -> None:
        bound = method()
        assert bound is not None  # whoever allocates holds the pool
        bound(moves)

    return carry_out
