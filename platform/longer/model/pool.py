"""Memory for user states, allocated once: a state is one slot of rows, which attention reads where they lie.

What lies where in a slot, `state_layout` says.

N rows of the pool, V = 2N vectors, P some of them, H heads, Z head width, I int64 words.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64
from longer.model.pinned import pinned_words
from longer.model.state_layout import WORD_BYTES, Places, StateLayout
from longer.slots import Move, SlotAllocator, slot_sizes, units_for

_FP8_MAX = 448.0


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
        if layout.precision != "int8" and num_values * layout.dtype.itemsize == layout.vector_words * WORD_BYTES:
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
