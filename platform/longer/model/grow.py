"""Growth carried out: new groups' rows are written beside the old ones, in every layer, and the rest stays where it is.

What `Longer.extend` and `Longer.tail` do for padded contexts, with the same numbers. The device is never asked: rows are laid out
from each user's numbers in a `Room`, and what only fills it up goes to the pool's last row.

B users, E events, N new full groups of all users (flat), P computed group rows of all users (flat), R copied rows or vectors, M
events new to the interaction index.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longer.model.attention import attend_shared
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
    if room.computed:
        _grow_layers(model, context, at, room.computed)
    row_B = torch.arange(len(end_B), device=pool.device)
    context.write_tail(model.tail_of_groups(context, row_B, end_B, at["user_key"], partial_BD))
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


def _grow_layers(model: Longer, context: PoolContext | StagedContext, at: Numbers, room: int) -> None:
    """The computed rows through the layers; a row's own group is its newest key."""
    pool, layers = context.pool, model.layers
    group_P, vector_P, visible_2P, offsets_B1, *rows = _computed_rows(
        at["num_events"], at, model.windows.merge_size, len(layers), room, pool.trash_row, pool.trash_vector
    )
    x_PD = pool.read_vectors(vector_P, model.embedding.merge.weight.dtype)
    turn = layers[0].rotation.turn(group_P, x_PD.dtype)
    readers: Readers | None = None
    for layer, block in enumerate(layers):
        if layer > 0:
            pool.write_rows(rows[layer - 1], *block.project_keys_values(x_PD, *turn))
        if layer < len(layers) - 1:
            query_PHZ, visible_P = block.project_queries(x_PD, *turn), visible_2P[min(layer, 1)]
            if has_kernels(query_PHZ):
                groups = context.groups(layer, query_PHZ.dtype)
                readers = groups.over(readers) if readers else groups.readers(offsets_B1)
                attended_PD = attend(query_PHZ, groups.pair_NHZ, readers, visible_P, scales_NH=groups.scales_NH)
            else:
                attended_PD = _attended(context, layer, query_PHZ, visible_P, offsets_B1)
            x_PD = block.finish(x_PD, attended_PD)


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


def _attended(
    context: PoolContext | StagedContext, layer: int, query_PHZ: Tensor, num_visible_P: Tensor, offsets_B1: Tensor
) -> Tensor:
    """[P, D]: what computed rows gather from their users' groups, without kernels of ours; fillers count to the last user."""
    nothing = query_PHZ[:, None][:, :0]
    num_queries = offsets_B1.diff().tolist()
    num_queries[-1] += len(query_PHZ) - sum(num_queries)
    return attend_shared(
        query_PHZ,
        *context.rows(layer, query_PHZ.dtype),
        num_queries,
        num_visible_P,
        nothing,
        nothing,
        nothing[..., 0, 0].bool(),
    )


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
