"""What lies where in a user state, which is one slot of rows of a pool.

A row holds the key and the value of one group, or of one tail token, in one layer; of rotated keys, as layers read them. A slot
for up to g groups holds, one after the other: g rows of the first layer; u = min(g, the query window's most groups) rows of each
layer above; T rows a layer of the tail; the query window's inputs to the first layer, two in a row; and the events' times and
sorted (key, number) pairs, for candidates to be counted. What a state holds starts at the front of each part.

B states, G groups, T tail tokens, F interaction fields.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from longer.arrays import Int64
from longer.model.longer import Longer
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
WORD_BYTES = 8


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
        return -(-num_bytes // WORD_BYTES)

    @property
    def row_bytes(self) -> int:
        return 2 * self.vector_words * WORD_BYTES

    @property
    def most_groups(self) -> int:
        """Room for the groups of any history window: one more than the longest has."""
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
