"""The training pass on CUDA: all tokens of a batch in one flat row, one attention a layer, nothing padded, the device never asked.

The same tokens and the same rule as the three steps of `Longer` (extend, tail, candidates), which keep their results for later;
here nothing is kept, so that every layer is one step over all tokens: query-window groups, then tails, then candidates. Where
everything lies follows from the batch on the host. Filled up to fixed sizes, a batch runs as a CUDA graph (`CapturedPass`).

B histories, N full groups of all histories, R requests, G = N + R groups with the partial ones, T tail tokens of a request, M of
them globals, C candidates, P tail tokens of all requests, or those and the candidates, A tokens with keys in a layer, J runs of a
request's queries, F interaction features, D width; of `x_TD`, T tokens that ask in a layer.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.inputs import tensors_of, under
from longer.model.interactions import TILE_CANDIDATES, count_features
from longer.model.layout import FlatBatch, Layout, flatten
from longer.model.shared_attention import Readers, attend_all

if TYPE_CHECKING:
    from longer.model.longer import Longer


def flat_forward(model: "Longer", batch: RequestBatch, device: torch.device | str) -> Tensor:
    """[C, tasks]: what `Longer.forward` returns, on CUDA."""
    flat = flatten(batch, model.windows, model.embedding.num_globals + 1)
    return flat_outputs(model, flat, tensors_of(flat.arrays, device))


def flat_outputs(model: "Longer", flat: FlatBatch, tensors: dict[str, Tensor]) -> Tensor:
    """[C, tasks]: the flat pass over a batch's arrays on the device; depends on nothing else of `flat` but its shapes."""
    at: Layout[Tensor] = Layout(**under("layout.", tensors))
    return _outputs(model, flat, at, under("event.", tensors), under("candidate.", tensors))


def _outputs(
    model: "Longer", flat: FlatBatch, at: Layout[Tensor], events: dict[str, Tensor], candidates: dict[str, Tensor]
) -> Tensor:
    num_groups, num_requests = flat.num_groups, flat.num_requests
    num_tail = model.embedding.num_globals + 1
    x_GD = model.embedding.event_groups(events, at.event_ts, at.previous_ts, at.start, at.size)
    x_ND, partial_RD = x_GD.split([num_groups, num_requests])
    globals_RMD = model.embedding.user_globals(at.user_key).to(x_GD.dtype)
    tail_PD = torch.cat([partial_RD[:, None], globals_RMD], dim=1).flatten(0, 1)
    request_RD = model.embedding.requests(at.request_ts, at.last_ts)
    readers = _Readers.of(model, flat, at, num_tail)
    features_CF = None
    if model.settings.interactions:
        features_CF = _features(model, at, events, candidates, readers.candidates, request_RD.dtype)
    x_CD = model.enter(request_RD, at.request_of_candidate, features_CF, candidates)
    if not len(x_CD):
        return model.leave(x_CD, features_CF, candidates["item_id"])
    private_PD = torch.cat([tail_PD, x_CD.to(tail_PD.dtype)])  # in bf16, a layer's inputs and outputs are bf16 too
    x_TD = torch.cat([x_ND.index_select(0, at.query), private_PD])
    all_turns = model.layers[0].rotation.turn(at.position, x_TD.dtype)
    window_turns = model.turns(at.position.index_select(0, at.window), x_TD.dtype)
    for number, layer in enumerate(model.layers):
        turns = (all_turns if number == 0 else window_turns[number]), window_turns[number]
        x_TD = layer.run(_layer, model, flat, at, readers, number, x_TD, x_ND, private_PD, *turns)
    return model.leave(x_TD, features_CF, candidates["item_id"])


def _layer(
    model: "Longer",
    flat: FlatBatch,
    at: Layout[Tensor],
    readers: "_Readers",
    layer: int,
    x_TD: Tensor,
    x_ND: Tensor,
    private_PD: Tensor,
    key_turns: tuple[Tensor, Tensor],
    query_turns: tuple[Tensor, Tensor],
) -> Tensor:
    """The tokens after one layer; after the last one the candidates, which alone are read."""
    block, num_candidates = model.layers[layer], len(at.request_of_candidate)
    is_last = layer == len(model.layers) - 1
    visible = at.visible if layer == 0 else at.visible_above
    if is_last:
        visible = visible[-num_candidates:]
        x_AD = torch.cat([x_ND, private_PD]) if layer == 0 else x_TD
        query, key, value, x_TD = block.project_last(x_AD, num_candidates, *key_turns)
    elif layer == 0:
        query = block.project_queries(x_TD, *query_turns)
        key, value = block.project_keys_values(torch.cat([x_ND, private_PD]), *key_turns)
    else:
        query, key, value = block.project(x_TD, *key_turns)
    num_tokens = flat.num_groups if layer == 0 else flat.num_queries
    sizes = num_tokens, len(private_PD) - num_candidates, num_candidates
    attended = attend_all(query, key, value, sizes, readers.of_layer(layer, is_last), visible)
    return block.finish(x_TD, attended)


class _Readers(NamedTuple):
    """Of all tokens and of candidates only, in the first layer and in the layers above."""

    everyone: tuple[Readers, Readers]
    only_candidates: tuple[Readers, Readers]

    @property
    def candidates(self) -> Readers:
        return self.only_candidates[0]

    def of_layer(self, layer: int, is_last: bool) -> Readers:
        return (self.only_candidates if is_last else self.everyone)[min(layer, 1)]

    @staticmethod
    def of(model: "Longer", flat: FlatBatch, at: Layout[Tensor], num_tail: int) -> "_Readers":
        num_rows, num_requests, device = len(at.num_groups), flat.num_requests, at.size.device
        tail_first = flat.num_queries
        own_first = tail_first + num_requests * num_tail
        is_partial_T = torch.arange(num_tail, device=device) == 0
        exists_RT = ~is_partial_T | (at.size[-num_requests:] > 0)[:, None]
        request_RT = torch.arange(num_requests * num_tail, device=device) // num_tail
        sees_CT = model.candidates_see_tail(exists_RT)[at.request_of_candidate]
        request_P = torch.cat([request_RT, at.request_of_candidate])
        sees_PT = torch.cat([model.tail_tokens_see(exists_RT).flatten(0, 1), sees_CT])
        runs_R1 = torch.arange(num_requests + 1, device=device) * num_tail + tail_first
        context = at.group_offsets[:-1], at.num_groups, flat.max_keys[0]
        offsets_JR1 = torch.stack([runs_R1, at.candidate_offsets + own_first])
        everyone = Readers(at.segment_offsets, *context, tail_first, own_first, request_P, sees_PT, offsets_JR1)
        candidates_B1 = at.segment_offsets[2 * num_rows :] - own_first
        only_candidates = Readers(
            candidates_B1, *context, 0, 0, at.request_of_candidate, sees_CT, at.candidate_offsets[None]
        )
        above = at.query_offsets[:-1], at.num_queries, flat.max_keys[1]
        return _Readers((everyone, everyone.over(*above)), (only_candidates, only_candidates.over(*above)))


def _features(
    model: "Longer",
    at: Layout[Tensor],
    events: dict[str, Tensor],
    candidates: dict[str, Tensor],
    readers: Readers,
    dtype: torch.dtype,
) -> Tensor:
    fields = model.interaction_fields
    return count_features(
        torch.stack([events[name] for name in fields]),
        at.event_ts,
        at.event_begin,
        readers.offsets_S1,
        readers.tiles(len(at.request_of_candidate), TILE_CANDIDATES),
        at.row_of_candidate,
        at.count_begin,
        at.count_end,
        at.request_ts[at.request_of_candidate],
        torch.stack([candidates[name] for name in fields], dim=-1),
        model.settings.count_events,
        dtype,
    )
