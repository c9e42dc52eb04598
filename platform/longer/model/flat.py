"""The training pass on CUDA: all tokens of a batch in one flat row, one attention a layer, nothing padded, the device never asked.

The same tokens and the same rule as the three steps of `Longer` (extend, tail, candidates), which keep their results for later;
here nothing is kept, so that every layer is one step over all tokens: query-window groups, then tails, then candidates. Where
everything lies follows from the batch on the host.

B histories, N full groups of all histories, P of them in query windows, R requests, T tail tokens of a request, C candidates,
D width, H heads, Z head width, K events in a group.
"""

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64, RequestBatch
from longer.model.inputs import BatchTensors, to_device
from longer.model.interactions import TILE_CANDIDATES, count_features
from longer.model.shared_attention import Readers, attend
from longer.windows import WindowRule

if TYPE_CHECKING:
    from longer.model.longer import Longer


T = TypeVar("T", Int64, Tensor)


class Layout(NamedTuple, Generic[T]):
    """Where everything of a batch lies: arrays on the host, tensors on the device. Tails and candidates follow groups everywhere.

    `start` and `size` of the N full groups and then the R partial ones among the events; `position` of the N groups, tails and
    candidates; `query` numbers the query windows' groups among the N. `visible` counts the groups of its history that each of
    the P + R*T + C tokens sees in the first layer, `visible_above` in the layers above.
    """

    start: T
    size: T
    position: T
    query: T
    visible: T
    visible_above: T
    group_offsets: T
    query_offsets: T
    num_groups: T
    num_queries: T
    segment_offsets: T
    candidate_offsets: T
    request_of_candidate: T
    row_of_candidate: T
    count_begin: T
    count_end: T
    previous_ts: T


def layout_of(batch: RequestBatch, windows: WindowRule, num_tail: int) -> Layout[Int64]:
    """The layout of a batch that has at least one event, on the host."""
    histories, merge_size, row_R = batch.histories, windows.merge_size, batch.row_R
    rows_B, offsets_B, first_index_B = np.arange(len(histories)), histories.offsets_B1[:-1], histories.first_index_B
    first_B, end_B = first_index_B // merge_size, histories.end_index_B // merge_size
    query_first_B = windows.query_start(histories.end_index_B)
    num_groups_B, num_queries_B = end_B - first_B, np.maximum(end_B - query_first_B, 0)
    row_N, slot_N = _ranges(num_groups_B)
    row_P, slot_P = _ranges(num_queries_B)
    group_P = query_first_B[row_P] + slot_P
    group_offsets_B1 = _offsets(num_groups_B)

    full_R = batch.history_end_R // merge_size
    partial_start_R = full_R * merge_size
    candidate_offsets_R1 = batch.candidates.offsets_R1
    num_candidates_R = np.diff(candidate_offsets_R1)
    request_C = np.repeat(np.arange(len(row_R)), num_candidates_R)
    requests_RT = np.repeat(np.arange(len(row_R)), num_tail)
    private = np.concatenate([requests_RT, request_C])
    asked_R = windows.num_groups(batch.history_end_R)
    position_RT = np.where(np.arange(num_tail) == 0, full_R[:, None], asked_R[:, None]).ravel()
    per_row_B1 = np.searchsorted(row_R, np.append(rows_B, len(rows_B)))
    count_begin_R = windows.history_start(batch.history_end_R) * merge_size - first_index_B[row_R]
    return Layout(
        start=np.concatenate(
            [offsets_B[row_N] + slot_N * merge_size, (offsets_B - first_index_B)[row_R] + partial_start_R]
        ),
        size=np.concatenate([np.full(len(row_N), merge_size), batch.history_end_R - partial_start_R]),
        position=np.concatenate([first_B[row_N] + slot_N, position_RT, asked_R[request_C]]),
        query=(group_offsets_B1[:-1] + query_first_B - first_B)[row_P] + slot_P,
        visible=np.concatenate([group_P - first_B[row_P] + 1, (full_R - first_B[row_R])[private]]),
        visible_above=np.concatenate([slot_P + 1, (full_R - query_first_B[row_R])[private]]),
        group_offsets=group_offsets_B1,
        query_offsets=_offsets(num_queries_B),
        num_groups=num_groups_B,
        num_queries=num_queries_B,
        segment_offsets=_offsets(
            np.concatenate([num_queries_B, np.diff(per_row_B1) * num_tail, np.diff(candidate_offsets_R1[per_row_B1])])
        ),
        candidate_offsets=candidate_offsets_R1,
        request_of_candidate=request_C,
        row_of_candidate=row_R[request_C],
        count_begin=count_begin_R[request_C],
        count_end=(batch.history_end_R - first_index_B[row_R])[request_C],
        previous_ts=_previous_ts(batch),
    )


def flat_forward(model: "Longer", batch: BatchTensors) -> Tensor:
    """[C, tasks]: what `Longer.forward` returns, on CUDA."""
    histories, num_requests, num_tail = batch.histories, batch.num_requests, model.embedding.num_globals + 1
    host = layout_of(batch.source, model.windows, num_tail)
    at = _upload(host, histories.event_ts_E.device)
    x_GD = model.embedding.event_groups(histories.features, histories.event_ts_E, at.previous_ts, at.start, at.size)
    num_groups = len(host.start) - num_requests
    x_ND, partial_RD = x_GD.split([num_groups, num_requests])
    globals_RMD = model.embedding.user_globals(histories.user_key_B[batch.row_R]).to(x_GD.dtype)
    tail_PD = torch.cat([partial_RD[:, None], globals_RMD], dim=1).flatten(0, 1)
    last_ts_R = histories.last_ts_R(batch.row_R, batch.history_end_R)
    request_RD = model.embedding.requests(batch.request_ts_R, last_ts_R)
    readers = _Readers.of(model, batch, host, at, num_tail)
    features_CF = (
        _features(model, batch, at, readers.candidates, request_RD.dtype) if model.settings.interactions else None
    )
    x_CD = model.enter(request_RD, at.request_of_candidate, features_CF, batch.candidates)

    if not len(x_CD):
        return model.leave(x_CD, features_CF, batch.candidates["item_id"])
    num_queries = len(host.query)
    private_PD = torch.cat([tail_PD.to(x_CD.dtype), x_CD])
    x_TD = torch.cat([x_ND.index_select(0, at.query).to(x_CD.dtype), private_PD])
    cos, sin = model.layers[0].rotation.turn(at.position, x_TD.dtype)
    window = torch.cat([at.query, torch.arange(num_groups, len(host.position), device=at.query.device)])
    turn = cos.index_select(0, window), sin.index_select(0, window)
    for layer, block in enumerate(model.layers):
        is_last = layer == len(model.layers) - 1
        sizes = [num_groups if layer == 0 else num_queries, num_requests * num_tail, len(x_CD)]
        x_AD, turn_A = x_TD, turn  # everything that has keys
        if layer == 0:
            x_AD, turn_A = torch.cat([x_ND.to(x_CD.dtype), private_PD]), (cos, sin)
        visible = at.visible if layer == 0 else at.visible_above
        if is_last:  # of which only the candidates are read
            x_TD, turn, visible = (
                x_TD[-len(x_CD) :],
                (turn[0][-len(x_CD) :], turn[1][-len(x_CD) :]),
                visible[-len(x_CD) :],
            )
        if layer == 0 or is_last:
            query, (key, value) = block.project_queries(x_TD, *turn), block.project_keys_values(x_AD, *turn_A)
        else:
            query, key, value = block.project(x_TD, *turn)
        groups, tails, own = zip(key.split(sizes), value.split(sizes), strict=True)
        tail_key, tail_value = (x.unflatten(0, (num_requests, num_tail)) for x in tails)
        attended = attend(query, groups, readers.of_layer(layer, is_last), visible, (tail_key, tail_value), own)
        x_TD = block.finish(x_TD, attended)
    return model.leave(x_TD, features_CF, batch.candidates["item_id"])


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
    def of(model: "Longer", batch: BatchTensors, host: Layout[Int64], at: Layout[Tensor], num_tail: int) -> "_Readers":
        num_rows, num_requests = len(host.num_groups), batch.num_requests
        tail_first = len(host.query)
        own_first = tail_first + num_requests * num_tail
        exists_RT = torch.ones(num_requests, num_tail, dtype=torch.bool, device=at.size.device)
        exists_RT[:, 0] = at.size[-num_requests:] > 0
        request_RT = torch.arange(num_requests * num_tail, device=at.size.device) // num_tail
        sees_CT = model.candidates_see_tail(exists_RT)[at.request_of_candidate]
        request_P = torch.cat([request_RT, at.request_of_candidate])
        sees_PT = torch.cat([model.tail_tokens_see(exists_RT).flatten(0, 1), sees_CT])
        runs_R1 = torch.arange(num_requests + 1, device=at.size.device) * num_tail + tail_first
        contexts = [
            (at.group_offsets[:-1], at.num_groups, int(host.num_groups.max())),
            (at.query_offsets[:-1], at.num_queries, int(host.num_queries.max())),
        ]
        offsets_JR1 = torch.stack([runs_R1, at.candidate_offsets + own_first])
        candidates_B1 = at.segment_offsets[2 * num_rows :] - own_first
        everyone = [
            Readers(at.segment_offsets, *context, tail_first, own_first, request_P, sees_PT, offsets_JR1)
            for context in contexts
        ]
        only_candidates = [
            Readers(candidates_B1, *context, 0, 0, at.request_of_candidate, sees_CT, at.candidate_offsets[None])
            for context in contexts
        ]
        return _Readers((everyone[0], everyone[1]), (only_candidates[0], only_candidates[1]))


def _features(
    model: "Longer", batch: BatchTensors, at: Layout[Tensor], candidates: Readers, dtype: torch.dtype
) -> Tensor:
    fields, histories = model.interaction_fields, batch.histories
    return count_features(
        torch.stack([histories.features[name] for name in fields]),
        histories.event_ts_E,
        histories.offsets_B1,
        candidates.offsets_S1,
        candidates.tiles(len(at.request_of_candidate), TILE_CANDIDATES),
        at.row_of_candidate,
        at.count_begin,
        at.count_end,
        batch.request_ts_R[at.request_of_candidate],
        torch.stack([batch.candidates[name] for name in fields], dim=-1),
        model.settings.count_events,
        dtype,
    )


def _upload(host: Layout[Int64], device: torch.device) -> Layout[Tensor]:
    """The arrays as tensors on the device, in one copy."""
    together = to_device(torch.from_numpy(np.concatenate(host)), device)
    return Layout(*together.split([len(array) for array in host]))


def _previous_ts(batch: RequestBatch) -> Int64:
    """[E]: time of the event before each event, across the start of the row."""
    histories = batch.histories
    previous_E = np.roll(histories.event_ts_E, 1)
    has_events_B = np.diff(histories.offsets_B1) > 0
    previous_E[histories.offsets_B1[:-1][has_events_B]] = histories.prev_event_ts_B[has_events_B]
    return previous_E


def _ranges(sizes_B: Int64) -> tuple[Int64, Int64]:
    """Row, and number inside it, of everything in rows of these sizes."""
    row_N = np.repeat(np.arange(len(sizes_B)), sizes_B)
    return row_N, np.arange(len(row_N)) - _offsets(sizes_B)[row_N]


def _offsets(sizes: Int64) -> Int64:
    return np.append(np.int64(0), np.cumsum(sizes))
