"""Growth carried out: new groups' rows are written beside the old ones, in every layer, and the rest stays where it is.

What `Longer.extend` and `Longer.tail` do for padded contexts, with the same numbers. The device is never asked: rows are laid out
from each user's numbers in a `Room`, and what only fills it up goes to the pool's last row.

B users, E events, N new full groups of all users (flat), P computed group rows of all users (flat), T tail tokens, A computed rows
and tail tokens of all users (flat), G = N + B new and partial groups, R copied rows or vectors, M events new to the interaction
index, F fields of it, S segments of queries, or stretches to copy, D width, H heads, Z head width; of the pool's memory, N rows or
V vectors of I words.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longer.model.attention import attend_shared
from longer.model.context import Tail
from longer.model.fuse import fused_on_cuda, has_kernels
from longer.model.growth import Growth, Room
from longer.model.inputs import tensors_of, under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import PoolContext, StagedContext
from longer.model.pool_index import NewEvents, grow_index
from longer.model.shared_attention import Readers, attend

Numbers = dict[str, Tensor]
"""`Growth.numbers` on the device."""


class Spans(NamedTuple):
    """Flat (row, value) pairs of `begin_B[b] <= value < end_B[b]`, and fillers behind them that do not exist."""

    row_P: Tensor
    value_P: Tensor
    exists_P: Tensor
    offsets_B1: Tensor

    @staticmethod
    def of(begin_B: Tensor, end_B: Tensor, room: int) -> "Spans":
        offsets_B1 = torch.nn.functional.pad((end_B - begin_B).clamp_min(0).cumsum(0), (1, 0))
        place_P = torch.arange(room, device=begin_B.device)
        # all offsets: torch 2.11 compiles a search in a slice of them into one that starts before it
        row_P = (torch.searchsorted(offsets_B1, place_P, right=True) - 1).clamp_max(len(begin_B) - 1)
        return Spans(row_P, place_P + (begin_B - offsets_B1[:-1])[row_P], place_P < offsets_B1[-1:], offsets_B1)

    def at(self, first_B: Tensor, nowhere: int) -> Tensor:
        """[P]: places that count from `first_B` at value 0; `nowhere` for fillers."""
        return torch.where(self.exists_P, first_B[self.row_P] + self.value_P, nowhere)


def grow(model: Longer, growth: Growth) -> None:
    """Writes everything that the states after `growth.events` hold into their places."""
    arrays = growth.numbers() | {f"event.{name}": values for name, values in growth.event_arrays().items()}
    sent = tensors_of(arrays, growth.pool.device)
    carry_out(model, growth.context(), sent, under("event.", sent), growth.room())


def carry_out(
    model: Longer, context: PoolContext | StagedContext, at: Numbers, features: dict[str, Tensor], room: Room
) -> None:
    """`grow` from `Growth.numbers` and `Growth.event_arrays` on the device; `context` is that of the states as they will be."""
    pool, end_B, event_ts_E = context.pool, at["num_events"], features["event_ts"]
    group_N, start_G, size_G, row_N, vector_N, previous_ts_E = _new_groups(
        end_B, at, event_ts_E, model.windows.merge_size, room.groups, pool.trash_row, pool.trash_vector
    )
    x_GD = model.embedding.event_groups(features, event_ts_E, previous_ts_E, start_G, size_G)
    x_ND, partial_BD = x_GD.split([room.groups, len(end_B)])

    _copy(pool, at, room)
    turn = model.layers[0].rotation.turn(group_N, x_ND.dtype)
    pool.write_rows(row_N, *model.layers[0].project_keys_values(x_ND, *turn))
    pool.write_vectors(vector_N, x_ND)
    context.write_tail(
        _through_layers(model, context, at, model.tail_tokens(at["user_key"], partial_BD), room.computed)
    )
    if model.settings.interactions:
        keys_EF = torch.stack([features[name] for name in model.interaction_fields], dim=-1)
        num_new = min(room.events, len(end_B) * room.newest)
        grow_index(pool, at, room, _new_events(end_B, at, keys_EF, event_ts_E, model.windows.merge_size, num_new))


@fused_on_cuda
def _new_groups(
    end_B: Tensor, at: Numbers, event_ts_E: Tensor, merge_size: int, room: int, trash_row: int, trash_vector: int
) -> tuple[Tensor, ...]:
    """Number of each new group; first event and size of it, and of each partial one; where to write it; times before events."""
    full_B = end_B // merge_size
    new = Spans.of(at["new_begin"], full_B, room)
    start_N = at["event_0"][new.row_P] + new.value_P * merge_size
    start_G = torch.cat([start_N, at["event_0"] + full_B * merge_size])
    size_G = torch.cat([new.exists_P * merge_size, end_B - full_B * merge_size])
    in_query_N = new.value_P >= at["query_first"][new.row_P]
    vector_N = torch.where(in_query_N, new.at(at["vector"], trash_vector), trash_vector)
    has_events_B = at["num_new_events"] > 0
    previous_E = torch.nn.functional.pad(event_ts_E.roll(1), (0, 1))  # the last stands for users without events
    previous_E = previous_E.index_put(
        (torch.where(has_events_B, at["events_begin"], len(event_ts_E)),), at["prev_event_ts"]
    )
    return new.value_P, start_G, size_G, new.at(at["row0"], trash_row), vector_N, previous_E[:-1]


@fused_on_cuda
def _new_events(
    end_B: Tensor, at: Numbers, keys_EF: Tensor, event_ts_E: Tensor, merge_size: int, room: int
) -> NewEvents:
    index = Spans.of(at["index_begin"], end_B, room)
    event_M = index.at(at["event_0"], 0)
    number_M = index.value_P - (at["first"] * merge_size)[index.row_P]
    return NewEvents(keys_EF[event_M], event_ts_E[event_M], index.row_P, number_M, index.exists_P)


def _through_layers(
    model: Longer, context: PoolContext | StagedContext, at: Numbers, tail_BTD: Tensor, room: int
) -> Tail:
    """The computed rows, and behind them the tails, through the layers; a row's own group is its newest key.

    What `Longer.extend` and `Longer.tail` do one after the other, since a layer's tails only read what its rows are before it.
    """
    pool, layers, end_B = context.pool, model.layers, at["num_events"]
    group_P, vector_P, visible_2P, offsets_B1, *rows = _computed_rows(
        end_B, at, model.windows.merge_size, len(layers), room, pool.trash_row, pool.trash_vector
    )
    row_B = torch.arange(len(end_B), device=pool.device)
    exists_BT, sees_PT, request_P, position_P, *tail_visible = model.tail_reads(
        end_B, row_B, at["first"], at["query_first"]
    )
    x_AD = torch.cat([pool.read_vectors(vector_P, model.embedding.merge.weight.dtype), tail_BTD.flatten(0, 1)])
    visible_2A = torch.cat([visible_2P, torch.stack(tail_visible)], dim=1)
    turns = model.turns(torch.cat([group_P, position_P]), x_AD.dtype)
    offsets_S1 = torch.cat(
        [offsets_B1[:-1], room + torch.arange(len(end_B) + 1, device=pool.device) * exists_BT.shape[1]]
    )
    asking = _Asking(context, offsets_S1, room, request_P, sees_PT)
    tail = Tail([], [], exists_BT)
    for layer, block in enumerate(layers):
        is_last = layer == len(layers) - 1
        turn = turns[layer]
        query, key, value = (None, *block.project_keys_values(x_AD, *turn)) if is_last else block.project(x_AD, *turn)
        if layer > 0:
            pool.write_rows(rows[layer - 1], key[:room], value[:room])
        tail.keys.append(key[room:].unflatten(0, exists_BT.shape))
        tail.values.append(value[room:].unflatten(0, exists_BT.shape))
        if query is not None:
            x_AD = block.finish(x_AD, asking.attended(layer, query, visible_2A[min(layer, 1)], tail))
    return tail


@dataclass
class _Asking:
    """Computed rows, then tails, as queries: both in order of their users, the tails from `tail_first` on."""

    context: PoolContext | StagedContext
    offsets_S1: Tensor
    tail_first: int
    request_P: Tensor
    sees_PT: Tensor
    readers: Readers | None = None

    def attended(self, layer: int, query_AHZ: Tensor, visible_A: Tensor, tail: Tail) -> Tensor:
        """[A, D]: what they gather from their users' groups in this layer, and the tails from each other too."""
        own = tail.keys[layer], tail.values[layer]
        if not has_kernels(query_AHZ):
            return self._on_cpu(layer, query_AHZ, visible_A, *own)
        groups = self.context.groups(layer, query_AHZ.dtype)
        if self.readers is None:
            reads = {"tail_first": self.tail_first, "request_P": self.request_P, "sees_PT": self.sees_PT}
            self.readers = groups.readers(self.offsets_S1, **reads)
        self.readers = groups.over(self.readers)
        return attend(query_AHZ, groups.pair_NHZ, self.readers, visible_A, own, scales_NH=groups.scales_NH)

    def _on_cpu(self, layer: int, query_AHZ: Tensor, visible_A: Tensor, key_BTHZ: Tensor, value_BTHZ: Tensor) -> Tensor:
        rows, (num_users, num_tail) = self.context.rows(layer, query_AHZ.dtype), key_BTHZ.shape[:2]
        query, visible = (x.split([self.tail_first, num_users * num_tail]) for x in (query_AHZ, visible_A))
        nothing = query[0][:, None][:, :0]
        return torch.cat(
            [
                attend_shared(
                    query[0],
                    *rows,
                    self.offsets_S1[: num_users + 1].diff().tolist(),
                    visible[0],
                    nothing,
                    nothing,
                    nothing[..., 0, 0].bool(),
                ),
                attend_shared(
                    query[1],
                    *rows,
                    [num_tail] * num_users,
                    visible[1],
                    key_BTHZ.repeat_interleave(num_tail, dim=0),
                    value_BTHZ.repeat_interleave(num_tail, dim=0),
                    self.sees_PT,
                ),
            ]
        )


@fused_on_cuda
def _computed_rows(
    end_B: Tensor, at: Numbers, merge_size: int, num_layers: int, room: int, trash_row: int, trash_vector: int
) -> tuple[Tensor, ...]:
    """Number, input vector, and visible groups by layer of each computed row; its users' offsets; its row above the first layer."""
    computed = Spans.of(at["computed_begin"], end_B // merge_size, room)
    first_2B = torch.stack([at["first"], at["query_first"]])
    visible_2P = torch.where(computed.exists_P, computed.value_P - first_2B[:, computed.row_P] + 1, 0)
    rows = [computed.at(at[f"row{layer}"], trash_row) for layer in range(1, num_layers)]
    return computed.value_P, computed.at(at["vector"], trash_vector), visible_2P, computed.offsets_B1, *rows


def _copy(pool: StatePool, at: Numbers, room: Room) -> None:
    """What stays but lies elsewhere. Everything is read before anything is written: sources and targets may overlap."""
    layers, parts = range(pool.layout.num_layers), []
    if room.copied_rows:
        begin, old, new = (
            torch.cat([at[f"{name}{layer}"] for layer in layers]) for name in ("rows_begin", "old_row", "row")
        )
        rows = _copied(begin, at["old_full"].repeat(len(layers)), old, new, room.copied_rows, pool.trash_row)
        parts.append((pool.words_NI, *rows))
    if room.copied_vectors:
        begin, old, new = at["vectors_begin"], at["old_vector"], at["vector"]
        vectors = _copied(begin, at["old_full"], old, new, room.copied_vectors, pool.trash_vector)
        parts.append((pool.words_VI, *vectors))
    read = [words.index_select(0, from_R) for words, from_R, _ in parts]
    for (words, _, to_R), copied in zip(parts, read, strict=True):
        words.index_copy_(0, to_R, copied)


@fused_on_cuda
def _copied(
    begin_S: Tensor, end_S: Tensor, old_S: Tensor, new_S: Tensor, room: int, nowhere: int
) -> tuple[Tensor, Tensor]:
    """From where to where."""
    spans = Spans.of(begin_S, end_S, room)
    return spans.at(old_S, nowhere), spans.at(new_S, nowhere)
