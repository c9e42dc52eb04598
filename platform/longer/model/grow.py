"""Growth carried out: new groups' rows are written beside the old ones, in every layer, and the rest stays where it is.

What `Longer.extend` and `Longer.tail` do for padded contexts, with the same numbers. The device is never asked: rows are laid out
from each user's numbers in a `Room`, and what only fills it up goes to the pool's last row.

B users, E events, N new full groups of all users (flat), P computed group rows of all users (flat), R copied rows or vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longer.model.attention import attend_shared
from longer.model.fuse import has_kernels
from longer.model.growth import Growth, Room
from longer.model.inputs import tensors_of, under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import PoolContext, StagedContext
from longer.model.pool_index import grow_index
from longer.model.shared_attention import attend


@dataclass(frozen=True)
class Spans:
    """Flat (row, value) pairs of `begin_B[b] <= value < end_B[b]`, and fillers behind them that do not exist."""

    row_P: Tensor
    value_P: Tensor
    exists_P: Tensor
    offsets_B1: Tensor

    @staticmethod
    def of(begin_B: Tensor, end_B: Tensor, room: int) -> "Spans":
        offsets_B1 = torch.nn.functional.pad((end_B - begin_B).clamp_min(0).cumsum(0), (1, 0))
        place_P = torch.arange(room, device=begin_B.device)
        row_P = torch.searchsorted(offsets_B1[1:], place_P, right=True).clamp_max(len(begin_B) - 1)
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
    model: Longer,
    context: PoolContext | StagedContext,
    at: dict[str, Tensor],
    features: dict[str, Tensor],
    room: Room,
) -> None:
    """`grow` from `Growth.numbers` and `Growth.event_arrays` on the device; `context` is that of the states as they will be."""
    pool, merge_size = context.pool, model.windows.merge_size
    end_B, event_0_B, event_ts_E = at["num_events"], at["event_0"], features["event_ts"]
    full_B = end_B // merge_size
    new = Spans.of(at["new_begin"], full_B, room.groups)
    start_N = event_0_B[new.row_P] + new.value_P * merge_size
    x_GD = model.embedding.event_groups(
        features,
        event_ts_E,
        _previous_ts(event_ts_E, at),
        torch.cat([start_N, event_0_B + full_B * merge_size]),
        torch.cat([new.exists_P * merge_size, end_B - full_B * merge_size]),
    )
    x_ND, partial_BD = x_GD.split([room.groups, len(end_B)])

    _copy(pool, at, room)
    pool.write_rows(new.at(at["row0"], pool.trash_row), *model.layers[0].keys_values(x_ND, new.value_P))
    is_in_query_N = new.value_P >= at["query_first"][new.row_P]
    pool.write_vectors(torch.where(is_in_query_N, new.at(at["vector"], pool.trash_vector), pool.trash_vector), x_ND)
    if room.computed:
        _grow_layers(model, context, at, Spans.of(at["computed_begin"], full_B, room.computed))
    row_B = torch.arange(len(end_B), device=pool.device)
    context.write_tail(model.tail_of_groups(context, row_B, end_B, at["user_key"], partial_BD))
    if model.settings.interactions:
        index = Spans.of(at["index_begin"], end_B, min(room.events, len(end_B) * room.newest))
        event_M = index.at(event_0_B, 0)
        keys_MF = torch.stack([features[name][event_M] for name in model.interaction_fields], dim=-1)
        number_M = index.value_P - (at["first"] * merge_size)[index.row_P]
        new_events = (keys_MF, event_ts_E[event_M], index.row_P, number_M, index.exists_P)
        grow_index(pool, at, room, *new_events)


def _previous_ts(event_ts_E: Tensor, at: dict[str, Tensor]) -> Tensor:
    """[E]: time of the event before each, which a user's first one is told. Users without events say what nobody reads."""
    padded_E = torch.nn.functional.pad(event_ts_E.roll(1), (0, 1))
    nowhere = len(event_ts_E)
    padded_E[torch.where(at["num_new_events"] > 0, at["events_begin"], nowhere)] = at["prev_event_ts"]
    return padded_E[:-1]


def _grow_layers(model: Longer, context: PoolContext | StagedContext, at: dict[str, Tensor], computed: Spans) -> None:
    """The computed rows through the layers; a row's own group is its newest key."""
    pool, group_P = context.pool, computed.value_P
    first = [at["first"], at["query_first"]]
    visible = [torch.where(computed.exists_P, group_P - first_B[computed.row_P] + 1, 0) for first_B in first]
    x_PD = pool.read_vectors(computed.at(at["vector"], pool.trash_vector), model.embedding.merge.weight.dtype)
    turn = model.layers[0].rotation.turn(group_P, x_PD.dtype)
    for layer, block in enumerate(model.layers):
        if layer > 0:
            pool.write_rows(computed.at(at[f"row{layer}"], pool.trash_row), *block.project_keys_values(x_PD, *turn))
        if layer < len(model.layers) - 1:
            query_PHZ = block.project_queries(x_PD, *turn)
            x_PD = block.finish(x_PD, _attended(context, layer, query_PHZ, computed, visible[min(layer, 1)]))


def _attended(
    context: PoolContext | StagedContext, layer: int, query_PHZ: Tensor, computed: Spans, num_visible_P: Tensor
) -> Tensor:
    """[P, D]: what computed rows gather from their users' groups."""
    offsets_B1 = computed.offsets_B1
    if has_kernels(query_PHZ):
        groups = context.groups(layer, query_PHZ.dtype)
        return attend(query_PHZ, groups.pair_NHZ, groups.readers(offsets_B1), num_visible_P)
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


def _copy(pool: StatePool, at: dict[str, Tensor], room: Room) -> None:
    """What stays but lies elsewhere. Everything is read before anything is written: sources and targets may overlap."""
    layers, parts = range(pool.layout.num_layers), []
    if room.copied_rows:
        begin, old, new = (
            torch.cat([at[f"{name}{layer}"] for layer in layers]) for name in ("rows_begin", "old_row", "row")
        )
        rows = Spans.of(begin, at["old_full"].repeat(len(layers)), room.copied_rows)
        parts.append((pool.words_NI, rows.at(old, pool.trash_row), rows.at(new, pool.trash_row)))
    if room.copied_vectors:
        vectors = Spans.of(at["vectors_begin"], at["old_full"], room.copied_vectors)
        from_R, to_R = (vectors.at(at[name], pool.trash_vector) for name in ("old_vector", "vector"))
        parts.append((pool.words_VI, from_R, to_R))
    read = [words.index_select(0, from_R) for words, from_R, _ in parts]
    for (words, _, to_R), copied in zip(parts, read, strict=True):
        words.index_copy_(0, to_R, copied)
