"""The training pass on CUDA: all tokens of a batch in one flat row, one attention a layer, nothing padded, the device never asked.

The same tokens and the same rule as the three steps of `Longer` (extend, tail, candidates), which keep their results for later;
here nothing is kept, so that every layer is one step over all tokens: query-window groups, then tails, then candidates. Where
everything lies follows from the batch on the host. Filled up to fixed sizes, a batch runs as a CUDA graph (`CapturedPass`).

B histories, N full groups of all histories, P of them in query windows, R requests, T tail tokens of a request, C candidates,
D width, H heads, Z head width, K events in a group.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import Int64, RequestBatch
from longer.model.inputs import packed, to_device, unpacked
from longer.model.interactions import TILE_CANDIDATES, count_features
from longer.model.shared_attention import Readers, attend
from longer.windows import WindowRule

if TYPE_CHECKING:
    from longer.model.longer import Longer


T = TypeVar("T", Int64, Tensor)


class Sizes(NamedTuple):
    """How much of everything a batch has, or may have: batches filled up to the same sizes have the same shapes."""

    events: int
    groups: int
    queries: int
    rows: int
    requests: int
    candidates: int

    @staticmethod
    def of(batch: RequestBatch, windows: WindowRule) -> "Sizes":
        end_B = batch.histories.end_index_B
        num_groups = (end_B // windows.merge_size - batch.histories.first_index_B // windows.merge_size).sum()
        num_queries = np.maximum(end_B // windows.merge_size - windows.query_start(end_B), 0).sum()
        num_candidates = batch.candidates.offsets_R1[-1]
        return Sizes(
            len(batch.histories.event_ts_E), int(num_groups), int(num_queries), len(batch.histories), batch.num_requests,
            int(num_candidates),
        )  # fmt: skip


class Layout(NamedTuple, Generic[T]):
    """Where everything of a batch lies: arrays on the host, tensors on the device. Tails and candidates follow groups everywhere.

    `start` and `size` of the N full groups and then the R partial ones among the events; `position` of the N groups, tails and
    candidates; `query` numbers the query windows' groups among the N, `window` the P groups, tails and candidates among all those
    positions. `visible` counts the groups of its history that each of the P + R*T + C tokens sees in the first layer,
    `visible_above` in the layers above.
    """

    start: T
    size: T
    position: T
    query: T
    window: T
    visible: T
    visible_above: T
    group_offsets: T
    query_offsets: T
    num_groups: T
    num_queries: T
    segment_offsets: T
    event_begin: T
    candidate_offsets: T
    request_of_candidate: T
    row_of_candidate: T
    count_begin: T
    count_end: T
    user_key: T
    request_ts: T
    last_ts: T
    event_ts: T
    previous_ts: T


@dataclass(frozen=True)
class FlatBatch:
    """A batch laid out for the flat pass, on the host (`arrays`); the ints are its shapes."""

    arrays: dict[str, npt.NDArray]
    num_groups: int
    num_queries: int
    num_requests: int
    max_keys: tuple[int, int]


def flatten(batch: RequestBatch, windows: WindowRule, num_tail: int, room: Sizes | None = None) -> FlatBatch:
    """The layout of a batch that has at least one event, with its features and labels, on the host.

    With `room`, everything is filled up to these sizes with what nobody reads, plus a row and a request that it belongs to; the
    outputs of the batch's own candidates come first and are the same.
    """
    layout = _layout(batch, windows, num_tail, room or Sizes.of(batch, windows), is_filled=room is not None)
    histories = batch.histories
    num_events, num_candidates = len(layout.event_ts), len(layout.request_of_candidate)
    arrays = {f"layout.{name}": array for name, array in layout._asdict().items()}
    arrays |= {f"event.{name}": _fill(x, num_events) for name, x in histories.features.items()}
    arrays |= {f"candidate.{name}": _fill(x, num_candidates) for name, x in batch.candidates.features.items()}
    arrays |= {f"label.{name}": _fill(x, num_candidates) for name, x in batch.labels.items()}
    num_requests = len(layout.request_ts)
    bounds = windows.history_groups + windows.stride_groups, windows.query_groups + windows.stride_groups
    max_keys = bounds if room else (int(layout.num_groups.max()), int(layout.num_queries.max()))
    return FlatBatch(arrays, len(layout.start) - num_requests, len(layout.query), num_requests, max_keys)


def _layout(batch: RequestBatch, windows: WindowRule, num_tail: int, room: Sizes, is_filled: bool) -> Layout[Int64]:
    histories, merge_size = batch.histories, windows.merge_size
    num_rows, num_requests = room.rows + is_filled, room.requests + is_filled
    offsets_B, first_index_B = _fill(histories.offsets_B1[:-1], num_rows), _fill(histories.first_index_B, num_rows)
    end_index_B = _fill(histories.end_index_B, num_rows)
    first_B, end_B = first_index_B // merge_size, end_index_B // merge_size
    query_first_B = windows.query_start(end_index_B)
    num_groups_B, num_queries_B = end_B - first_B, np.maximum(end_B - query_first_B, 0)
    row_N, slot_N = _ranges(num_groups_B)
    row_P, slot_P = _ranges(num_queries_B)
    group_P = query_first_B[row_P] + slot_P
    group_offsets_B1 = _offsets(num_groups_B)
    num_groups_B[-1] += room.groups - len(
        row_N
    )  # of the row that nobody asks about; nothing is left where nothing is filled
    num_queries_B[-1] += room.queries - len(row_P)

    row_R = _fill(batch.row_R, num_requests, num_rows - 1)
    history_end_R = _fill(batch.history_end_R, num_requests)
    full_R, asked_R = history_end_R // merge_size, windows.num_groups(history_end_R)
    partial_start_R = full_R * merge_size
    size_R = history_end_R - partial_start_R
    candidate_offsets_R1 = _fill(batch.candidates.offsets_R1, num_requests + 1, int(batch.candidates.offsets_R1[-1]))
    candidate_offsets_R1[-1] = room.candidates
    request_C = np.repeat(np.arange(num_requests), np.diff(candidate_offsets_R1))
    private = np.concatenate([np.repeat(np.arange(num_requests), num_tail), request_C])
    position_RT = np.where(np.arange(num_tail) == 0, full_R[:, None], asked_R[:, None]).ravel()
    position_N = _fill(first_B[row_N] + slot_N, room.groups)
    query_P = _fill((group_offsets_B1[:-1] + query_first_B - first_B)[row_P] + slot_P, room.queries)
    per_row_B1 = np.searchsorted(row_R, np.arange(num_rows + 1))
    count_begin_R = windows.history_start(history_end_R) * merge_size - first_index_B[row_R]
    visible_P = _fill(group_P - first_B[row_P] + 1, room.queries)
    start_R = (offsets_B - first_index_B)[row_R] + partial_start_R
    return Layout(
        start=np.concatenate([_fill(offsets_B[row_N] + slot_N * merge_size, room.groups), start_R]),
        size=np.concatenate([_fill(np.full(len(row_N), merge_size), room.groups), size_R]),
        position=np.concatenate([position_N, position_RT, asked_R[request_C]]),
        query=query_P,
        window=np.concatenate([query_P, room.groups + np.arange(len(private))]),
        visible=np.concatenate([visible_P, (full_R - first_B[row_R])[private]]),
        visible_above=np.concatenate([_fill(slot_P + 1, room.queries), (full_R - query_first_B[row_R])[private]]),
        group_offsets=_offsets(num_groups_B),
        query_offsets=_offsets(num_queries_B),
        num_groups=num_groups_B,
        num_queries=num_queries_B,
        segment_offsets=_offsets(
            np.concatenate([num_queries_B, np.diff(per_row_B1) * num_tail, np.diff(candidate_offsets_R1[per_row_B1])])
        ),
        event_begin=offsets_B,
        candidate_offsets=candidate_offsets_R1,
        request_of_candidate=request_C,
        row_of_candidate=row_R[request_C],
        count_begin=count_begin_R[request_C],
        count_end=(history_end_R - first_index_B[row_R])[request_C],
        user_key=_fill(histories.user_key_B, num_rows)[row_R],
        request_ts=_fill(batch.request_ts_R, num_requests),
        last_ts=_fill(_last_ts(batch), num_requests),
        event_ts=_fill(histories.event_ts_E, room.events),
        previous_ts=_fill(_previous_ts(batch), room.events),
    )


def flat_forward(model: "Longer", batch: RequestBatch, device: torch.device | str) -> Tensor:
    """[C, tasks]: what `Longer.forward` returns, on CUDA."""
    flat = flatten(batch, model.windows, model.embedding.num_globals + 1)
    buffers = {dtype: to_device(buffer, device) for dtype, buffer in packed(flat.arrays).items()}
    return flat_outputs(model, flat, unpacked(buffers, flat.arrays))


def flat_outputs(model: "Longer", flat: FlatBatch, tensors: dict[str, Tensor]) -> Tensor:
    """[C, tasks]: the flat pass over a batch's arrays on the device; depends on nothing else of `flat` but its shapes."""
    at, events, candidates = (
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for prefix in ("layout.", "event.", "candidate.")
    )
    return _outputs(model, flat, Layout(**at), events, candidates)


def _outputs(
    model: "Longer", flat: FlatBatch, at: Layout[Tensor], events: dict[str, Tensor], candidates: dict[str, Tensor]
) -> Tensor:
    num_groups, num_queries, num_requests = flat.num_groups, flat.num_queries, flat.num_requests
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
    private_PD = torch.cat([tail_PD.to(x_CD.dtype), x_CD])
    x_TD = torch.cat([x_ND.index_select(0, at.query).to(x_CD.dtype), private_PD])
    cos, sin = model.layers[0].rotation.turn(at.position, x_TD.dtype)
    turn = cos.index_select(0, at.window), sin.index_select(0, at.window)
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
    return model.leave(x_TD, features_CF, candidates["item_id"])


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
        contexts = (
            (at.group_offsets[:-1], at.num_groups, flat.max_keys[0]),
            (at.query_offsets[:-1], at.num_queries, flat.max_keys[1]),
        )
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


def _last_ts(batch: RequestBatch) -> Int64:
    """[R]: time of the event just before each request's end."""
    histories, row_R = batch.histories, batch.row_R
    offset_R = batch.history_end_R - histories.first_index_B[row_R]
    event_R = np.where(offset_R > 0, histories.offsets_B1[row_R] + offset_R - 1, 0)
    return np.where(offset_R > 0, histories.event_ts_E[event_R], histories.prev_event_ts_B[row_R])


def _previous_ts(batch: RequestBatch) -> Int64:
    """[E]: time of the event before each event, across the start of the row."""
    histories = batch.histories
    previous_E = np.roll(histories.event_ts_E, 1)
    has_events_B = np.diff(histories.offsets_B1) > 0
    previous_E[histories.offsets_B1[:-1][has_events_B]] = histories.prev_event_ts_B[has_events_B]
    return previous_E


def _fill(array: npt.NDArray, size: int, value: int = 0) -> npt.NDArray:
    """The array, and `value` after it up to `size`."""
    return np.concatenate([array, np.full(size - len(array), value, array.dtype)])


def _ranges(sizes_B: Int64) -> tuple[Int64, Int64]:
    """Row, and number inside it, of everything in rows of these sizes."""
    row_N = np.repeat(np.arange(len(sizes_B)), sizes_B)
    return row_N, np.arange(len(row_N)) - _offsets(sizes_B)[row_N]


def _offsets(sizes: Int64) -> Int64:
    return np.append(np.int64(0), np.cumsum(sizes))
