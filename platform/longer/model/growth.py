"""How states in a pool grow: new groups' rows are written beside the old ones, in every layer, and the rest stays where it is.

What `Longer.extend` and `Longer.tail` do for padded contexts, with the same numbers. Where everything lies is worked out on the
host; the device is never asked.

B users, E events, N new full groups of all users (flat), P computed group rows of all users (flat), R copied rows or vectors, M
events new to an index.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Histories, Int64
from longer.model.attention import attend_shared
from longer.model.fuse import has_kernels
from longer.model.inputs import tensors_of, under
from longer.model.longer import Longer
from longer.model.pool import Places, StatePool
from longer.model.pool_context import PoolContext, spans
from longer.model.pool_index import IndexStep
from longer.model.shared_attention import attend


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
    def has_moved_B(self) -> Int64:
        return (self.first_B != self.old_first_B) | (self.query_first_B != self.old_query_first_B)

    @cached_property
    def new_groups(self) -> tuple[Int64, Int64]:
        """User and number of the N new full groups that are still in the history window."""
        return spans(np.maximum(self.old_full_B, self.first_B), self.full_B)

    @cached_property
    def computed(self) -> tuple[Int64, Int64]:
        """User and number of the P groups whose rows are computed: the new ones, or the query window where the windows moved."""
        begin_B = np.where(self.has_moved_B, self.query_first_B, np.maximum(self.old_full_B, self.query_first_B))
        return spans(begin_B, self.full_B)

    def event_number(self, row: Int64, index: Int64) -> Int64:
        """Where a user's events with these absolute indices lie among `events`."""
        return self.events.offsets_B1[row] + index - self.events.first_index_B[row]

    def group_arrays(self) -> dict[str, Int64]:
        """`start` and `size` of the N full groups' events, then of the B partial ones."""
        row_N, group_N = self.new_groups
        first_N = self.event_number(row_N, group_N * self.merge_size)
        row_B, begin_B = np.arange(len(self.full_B)), self.full_B * self.merge_size
        return {
            "start": np.concatenate([first_N, self.event_number(row_B, begin_B)]),
            "size": np.concatenate([np.full(len(row_N), self.merge_size), self.end_index_B - begin_B]),
        }

    def row_arrays(self) -> dict[str, Int64]:
        """Rows and vectors to write: `layer0` and `tokens` of new groups, `query` and `layer1` and so on of computed ones."""
        row_N, group_N = self.new_groups
        row_P, group_P = self.computed
        query_N = np.flatnonzero(group_N >= self.query_first_B[row_N])
        above_P = group_P - self.query_first_B[row_P]
        arrays = {
            "group": group_N,
            "layer0": self.places.layer_B(0)[row_N] + group_N - self.first_B[row_N],
            "in_query": query_N,
            "tokens": (self.places.tokens_B - self.query_first_B)[row_N[query_N]] + group_N[query_N],
            "computed": group_P,
            "query": self.places.tokens_B[row_P] + above_P,
        }
        for layer in range(1, self.pool.layout.num_layers):
            arrays[f"layer{layer}"] = self.places.layer_B(layer)[row_P] + above_P
        return arrays

    def copy_arrays(self) -> dict[str, Int64]:
        """Rows and vectors that stay but lie elsewhere: where windows moved, or the slot is another."""
        is_elsewhere_B = self.places.start_B != self.old_places.start_B
        rows = [self._copied(self.old_first_B, self.first_B, self.old_places.layer_B(0), self.places.layer_B(0))]
        stand_B = is_elsewhere_B & ~self.has_moved_B
        for layer in range(1, self.pool.layout.num_layers):
            first_B = np.where(stand_B, self.query_first_B, self.old_full_B)  # computed anew where the windows moved
            rows.append(self._copied(first_B, first_B, self.old_places.layer_B(layer), self.places.layer_B(layer)))
        tokens = self._copied(
            self.old_query_first_B, self.query_first_B, self.old_places.tokens_B, self.places.tokens_B
        )
        source_R, target_R = (np.concatenate(part) for part in zip(*rows, strict=True))
        return {"from_row": source_R, "to_row": target_R, "from_vector": tokens[0], "to_vector": tokens[1]}

    def _copied(self, old_first_B: Int64, first_B: Int64, old_begin_B: Int64, begin_B: Int64) -> tuple[Int64, Int64]:
        """From where to where the old groups from `first_B` on have to go."""
        is_put = old_begin_B - old_first_B == begin_B - first_B  # nothing to do
        row_R, group_R = spans(np.where(is_put, self.old_full_B, np.maximum(old_first_B, first_B)), self.old_full_B)
        return (old_begin_B - old_first_B)[row_R] + group_R, (begin_B - first_B)[row_R] + group_R

    def index_step(self) -> tuple[IndexStep, Int64]:
        """How the interaction index grows, and which of `events` are new to it, [M]."""
        first_index_B = self.first_B * self.merge_size
        begin_B = np.maximum(self.old_num_events_B, first_index_B)
        row_M, index_M = spans(begin_B, self.end_index_B)
        kept_B = self.old_num_events_B - self.old_first_index_B
        dropped_B = np.minimum(first_index_B - self.old_first_index_B, kept_B)
        step = IndexStep(
            old=self.old_places,
            new=self.places,
            kept_B=kept_B,
            dropped_B=dropped_B,
            row_M=row_M,
            slot_M=index_M - begin_B[row_M],
            number_M=index_M - first_index_B[row_M],
        )
        return step, self.event_number(row_M, index_M)

    def context(self) -> PoolContext:
        return PoolContext(self.pool, self.places, self.first_B, self.query_first_B, self.end_index_B)


def grow(model: Longer, growth: Growth) -> None:
    """Writes everything that the states after `growth.events` hold into their places."""
    pool, events = growth.pool, growth.events
    num_users, step = len(events), growth.index_step()
    arrays = growth.group_arrays() | growth.row_arrays() | growth.copy_arrays()
    arrays |= {"user_key": events.user_key_B, "end_index": growth.end_index_B, "index_event": step[1]}
    arrays |= _event_arrays(events)
    at = tensors_of(arrays, pool.device)
    features = under("event.", at)
    x_GD = model.embedding.event_groups(features, at["event_ts"], at["previous_ts"], at["start"], at["size"])
    x_ND, partial_BD = x_GD.split([len(x_GD) - num_users, num_users])

    _copy(pool, at)
    pool.write_rows(at["layer0"], *model.layers[0].keys_values(x_ND, at["group"]))
    pool.write_vectors(at["tokens"], x_ND.index_select(0, at["in_query"]))
    context = growth.context()
    _grow_layers(model, growth, context, at, pool.read_vectors(at["query"], x_ND.dtype))
    row_B = torch.arange(num_users, device=pool.device)
    context.write_tail(model.tail_of_groups(context, row_B, at["end_index"], at["user_key"], partial_BD))
    if model.settings.interactions:
        keys_MF = torch.stack([features[name][at["index_event"]] for name in model.interaction_fields], dim=-1)
        step[0].carry_out(pool, keys_MF, at["event_ts"][at["index_event"]])


def _grow_layers(model: Longer, growth: Growth, context: PoolContext, at: dict[str, Tensor], x_PD: Tensor) -> None:
    """The computed rows through the layers; a row's own group is its newest key."""
    row_P, group_P = growth.computed
    if not len(row_P):
        return
    num_queries_B = np.bincount(row_P, minlength=len(growth.events))
    visible = [group_P - first_B[row_P] + 1 for first_B in (growth.first_B, growth.query_first_B)]
    sent = tensors_of(
        {"visible0": visible[0], "visible1": visible[1], "offsets": np.append(0, np.cumsum(num_queries_B))},
        growth.pool.device,
    )
    for layer, block in enumerate(model.layers):
        if layer > 0:
            growth.pool.write_rows(at[f"layer{layer}"], *block.keys_values(x_PD, at["computed"]))
        if layer < len(model.layers) - 1:
            query_PHZ = block.queries(x_PD, at["computed"])
            num_visible_P = sent[f"visible{min(layer, 1)}"]
            if has_kernels(query_PHZ):
                groups = context.groups(layer, query_PHZ.dtype)
                attended_PD = attend(query_PHZ, groups.pair_NHZ, groups.readers(sent["offsets"]), num_visible_P)
            else:
                nothing = query_PHZ[:, None][:, :0]
                attended_PD = attend_shared(
                    query_PHZ,
                    *context.rows(layer, query_PHZ.dtype),
                    num_queries_B.tolist(),
                    num_visible_P,
                    nothing,
                    nothing,
                    nothing[..., 0, 0].bool(),
                )
            x_PD = block.finish(x_PD, attended_PD)


def _copy(pool: StatePool, at: dict[str, Tensor]) -> None:
    """Everything is read before anything is written: sources and targets may overlap."""
    rows_RI = pool.words_NI.index_select(0, at["from_row"])
    vectors_VI = pool.words_VI.index_select(0, at["from_vector"])
    pool.words_NI.index_copy_(0, at["to_row"], rows_RI)
    pool.words_VI.index_copy_(0, at["to_vector"], vectors_VI)


def _event_arrays(events: Histories) -> dict[str, np.ndarray]:
    """The events, with the time before each; one that nobody reads if there are none."""
    previous_E = np.roll(events.event_ts_E, 1)
    has_events_B = np.diff(events.offsets_B1) > 0
    previous_E[events.offsets_B1[:-1][has_events_B]] = events.prev_event_ts_B[has_events_B]
    arrays = {"event_ts": events.event_ts_E, "previous_ts": previous_E}
    arrays |= {f"event.{name}": values for name, values in events.features.items()}
    return arrays if len(previous_E) else {name: np.zeros(1, x.dtype) for name, x in arrays.items()}
