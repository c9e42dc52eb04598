"""What it takes for states in a pool to grow, worked out on the host: a few numbers a user, and how many rows of each kind.

The rows themselves are laid out on the device (`model.grow`), in rooms at least as large as needed, so that a captured graph
serves other users than those it was captured with.

B users, E events.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from longer.arrays import Histories, Int64
from longer.model.pool import StatePool
from longer.model.pool_context import PoolContext
from longer.model.state_layout import Places


@dataclass(frozen=True)
class Room:
    """How many of each kind there is room for. What fills a room up is written where nobody reads.

    `groups` are new full ones, `computed` group rows that pass through the layers, `copied` rows and vectors that change their
    places, all of all users. Of one user's index, `kept` events stand and `newest` come; `moves` tells whether any that stand go
    or change their places.
    """

    events: int
    groups: int
    computed: int
    copied_rows: int
    copied_vectors: int
    kept: int
    newest: int
    moves: bool


@dataclass(frozen=True)
class Growth:
    """B states that become those after `events`, which start on the first group that a state lacks: its partial one, or its first.

    Old and new places may be the same. A user who has nothing yet counts as one whose state ends where the history window starts.
    """

    pool: StatePool
    events: Histories
    old_places: Places
    old_first_index_B: Int64
    old_query_first_B: Int64
    old_num_events_B: Int64
    places: Places

    @property
    def merge_size(self) -> int:
        return self.pool.layout.windows.merge_size

    @property
    def layers(self) -> range:
        return range(self.pool.layout.num_layers)

    @cached_property
    def end_index_B(self) -> Int64:
        return self.events.end_index_B

    @cached_property
    def first_B(self) -> Int64:
        return self.pool.layout.windows.history_start(self.end_index_B)

    @cached_property
    def query_first_B(self) -> Int64:
        return self.pool.layout.windows.query_start(self.end_index_B)

    @cached_property
    def full_B(self) -> Int64:
        """Group after the last full one."""
        return self.end_index_B // self.merge_size

    @cached_property
    def old_first_B(self) -> Int64:
        return self.old_first_index_B // self.merge_size

    @cached_property
    def old_full_B(self) -> Int64:
        return self.events.first_index_B // self.merge_size

    @cached_property
    def has_moved_B(self) -> npt.NDArray[np.bool_]:
        return (self.first_B != self.old_first_B) | (self.query_first_B != self.old_query_first_B)

    @cached_property
    def is_elsewhere_B(self) -> npt.NDArray[np.bool_]:
        return self.places.start_B != self.old_places.start_B

    @cached_property
    def new_begin_B(self) -> Int64:
        """First new full group that is still in the history window; they end before `full_B`."""
        return np.maximum(self.old_full_B, self.first_B)

    @cached_property
    def computed_begin_B(self) -> Int64:
        """First group whose rows are computed: the first new one, or the query window's where the windows moved."""
        return np.where(self.has_moved_B, self.query_first_B, np.maximum(self.old_full_B, self.query_first_B))

    @cached_property
    def index_begin_B(self) -> Int64:
        """Absolute index of the first event that is new to the interaction index."""
        return np.maximum(self.old_num_events_B, self.first_B * self.merge_size)

    @cached_property
    def kept_B(self) -> Int64:
        """Events that the interaction index holds, of which the first `dropped_B` go."""
        return self.old_num_events_B - self.old_first_index_B

    @cached_property
    def dropped_B(self) -> Int64:
        return np.minimum((self.first_B - self.old_first_B) * self.merge_size, self.kept_B)

    @cached_property
    def copied_begin(self) -> list[Int64]:
        """First old group, of each layer, whose row has to go elsewhere; they end before `old_full_B`.

        Rows of the layers above are computed anew where the windows moved.
        """
        is_put_B = ~self.is_elsewhere_B & (self.old_first_B == self.first_B)
        begin = [np.where(is_put_B, self.old_full_B, np.maximum(self.old_first_B, self.first_B))]
        stays_B = self.is_elsewhere_B & ~self.has_moved_B
        return begin + [np.where(stays_B, self.query_first_B, self.old_full_B)] * (len(self.layers) - 1)

    @cached_property
    def tokens_begin_B(self) -> Int64:
        """First old group whose input vector has to go elsewhere."""
        is_put_B = ~self.is_elsewhere_B & (self.old_query_first_B == self.query_first_B)
        return np.where(is_put_B, self.old_full_B, np.maximum(self.old_query_first_B, self.query_first_B))

    def numbers(self) -> dict[str, Int64]:
        """What the device must know of the users, each [B].

        `row0` and so on are the row of group 0 in each layer, were it kept, and `vector` that of its input vector; `event_0` is
        where event 0 would lie among `events`.
        """
        events, old, new = self.events, self.old_places, self.places
        arrays = {
            **self.context().arrays,
            "user_key": events.user_key_B,
            "event_0": events.offsets_B1[:-1] - events.first_index_B,
            "events_begin": events.offsets_B1[:-1],
            "num_new_events": np.diff(events.offsets_B1),
            "prev_event_ts": events.prev_event_ts_B,
            "new_begin": self.new_begin_B,
            "computed_begin": self.computed_begin_B,
            "old_full": self.old_full_B,
            "old_vector": old.tokens_B - self.old_query_first_B,
            "vector": new.tokens_B - self.query_first_B,
            "vectors_begin": self.tokens_begin_B,
            "index_begin": self.index_begin_B,
            "old_event_ts": old.event_ts_B,
            "old_event_words": old.event_words_B,
            "kept": self.kept_B,
            "dropped": self.dropped_B,
        }
        for layer in self.layers:
            old_first_B, first_B = (
                (self.old_first_B, self.first_B) if layer == 0 else (self.old_query_first_B, self.query_first_B)
            )
            arrays[f"old_row{layer}"] = old.layer_B(layer) - old_first_B
            arrays[f"row{layer}"] = new.layer_B(layer) - first_B
            arrays[f"rows_begin{layer}"] = self.copied_begin[layer]
        return arrays

    def event_arrays(self) -> dict[str, npt.NDArray]:
        """The events, each [E]; one that nobody reads if there are none."""
        arrays = {"event_ts": self.events.event_ts_E, **self.events.features}
        return arrays if len(self.events.event_ts_E) else {name: np.zeros(1, x.dtype) for name, x in arrays.items()}

    @cached_property
    def most_kept(self) -> int:
        """Events that stand in one user's index, at most."""
        return int(self.kept_B.max(initial=0))

    @cached_property
    def most_newest(self) -> int:
        """Events new to one user's index, at most."""
        return int((self.end_index_B - self.index_begin_B).max(initial=0))

    @property
    def num_events(self) -> int:
        return max(1, len(self.events.event_ts_E))

    def room(self) -> Room:
        """Exactly as much as it takes."""
        return Room(
            events=self.num_events,
            groups=_total(self.new_begin_B, self.full_B),
            computed=_total(self.computed_begin_B, self.full_B),
            copied_rows=sum(_total(begin_B, self.old_full_B) for begin_B in self.copied_begin),
            copied_vectors=_total(self.tokens_begin_B, self.old_full_B),
            kept=self.most_kept,
            newest=self.most_newest,
            moves=bool((self.dropped_B > 0).any() or self.is_elsewhere_B.any()),
        )

    def context(self) -> PoolContext:
        return PoolContext(self.pool, self.places, self.first_B, self.query_first_B, self.end_index_B)


def _total(begin_B: Int64, end_B: Int64) -> int:
    return int(np.maximum(end_B - begin_B, 0).sum())
