"""User states: encode once, append as events arrive, score any candidates; always equal to the training forward pass.

A state holds everything that later requests of its user need: keys and values of the full groups and of the tail, the inputs of
the query window (for when it moves), the events of the partial newest group, and the index that counts candidates. States are
immutable: an append returns a new one. All three functions take batches of users of different lengths.

B users, G groups, L events of the window, F interaction fields, T tail tokens, H heads, Z head width, D width, Q query groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longer.arrays import Candidates, Histories, Int64
from longer.model.context import Context, Tail
from longer.model.inputs import RequestTensors, event_tensors, feature_tensors, to_device
from longer.model.interactions import PAD, InteractionIndex, merge, slide
from longer.model.longer import Longer

_OBJECT_BYTES = 5_000
"""Memory of a state's Python and tensor objects besides their data, as measured over thousands of states of three layers."""


@dataclass(frozen=True)
class UserState:
    """What is kept of one user who has `num_events` events over all time, the windows' newest `num_events - first_index` here."""

    user_key: int
    first_index: int
    num_events: int
    last_event_ts: int
    query_first: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens_QD: Tensor
    tail_keys: tuple[Tensor, ...]
    tail_values: tuple[Tensor, ...]
    tail_exists_T: Tensor
    pairs_FL: Tensor
    event_ts_L: Tensor
    partial: Histories

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor and array of the state."""
        tensors = [*self.keys, *self.values, *self.tail_keys, *self.tail_values]
        tensors += [self.tokens_QD, self.tail_exists_T, self.pairs_FL, self.event_ts_L]
        arrays = [self.partial.event_ts_E, *self.partial.features.values()]
        return _OBJECT_BYTES + sum(t.nbytes for t in tensors) + sum(a.nbytes for a in arrays)


@torch.inference_mode()
def encode(model: Longer, histories: Histories) -> list[UserState]:
    """States of B users from scratch. Each history starts at or before its user's history window; it may be empty."""
    end_B = histories.end_index_B
    start_B = model.windows.history_start(end_B) * model.windows.merge_size
    window = histories.slice_events(np.arange(len(histories)), start_B, end_B)
    index = InteractionIndex.build(event_tensors(window, _device(model)), model.interaction_fields)
    pairs = [index.pairs_BFL[b, :, :n] for b, n in enumerate(np.diff(window.offsets_B1))]
    times = [index.event_ts_BL[b, :n] for b, n in enumerate(np.diff(window.offsets_B1))]
    return _advance(model, None, window, pairs, times)


@torch.inference_mode()
def append(model: Longer, states: Sequence[UserState], new: Histories) -> list[UserState]:
    """The states with each user's new events added: `new.first_index_B[b] == states[b].num_events`; rows may be empty.

    Costs what the new events cost, but for once in a stride, when the query window's rows are recomputed from kept inputs.
    """
    device, merge_size = _device(model), model.windows.merge_size
    first_B = model.windows.history_start(new.end_index_B) * merge_size
    keys_FE = torch.from_numpy(np.stack([new.features[name] for name in model.interaction_fields])).to(device)
    new_ts_E = torch.from_numpy(new.event_ts_E).to(device)
    pairs, times = [], []
    for state, first, begin, end in zip(states, first_B.tolist(), new.offsets_B1[:-1], new.offsets_B1[1:], strict=True):
        dropped = first - state.first_index
        grown = merge(state.pairs_FL, keys_FE[:, begin:end])
        pairs.append(slide(grown, dropped) if dropped else grown)
        times.append(torch.cat([state.event_ts_L, new_ts_E[begin:end]])[dropped:])
    partial = Histories.concatenate([state.partial for state in states])
    context = Context(
        first_B=torch.tensor([s.first_index // merge_size for s in states], device=device),
        query_first_B=torch.tensor([s.query_first for s in states], device=device),
        end_B=torch.tensor([s.num_events // merge_size for s in states], device=device),
        tokens_BQD=_pad(s.tokens_QD for s in states),
        keys=_pad_layers(states, lambda s: s.keys),
        values=_pad_layers(states, lambda s: s.values),
    )
    return _advance(model, context, partial.followed_by(new), pairs, times)


@torch.inference_mode()
def score(model: Longer, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates) -> np.ndarray:
    """[C, tasks] float outputs as the model's forward pass gives: request r asks `states[r]` about its own candidates."""
    device, together = _device(model), gather(model, states)
    requests = RequestTensors(
        row_R=torch.arange(len(states), device=device),
        history_end_R=together.num_events_B,
        request_ts_R=to_device(torch.from_numpy(request_ts_R), device),
        candidate_offsets_R1=to_device(torch.from_numpy(candidates.offsets_R1), device),
        candidates=feature_tensors(candidates, device),
        labels={},
    )
    return together.outputs(model, requests).cpu().numpy()


@dataclass(frozen=True)
class Gathered:
    """The states of B users as one batch that candidates read."""

    context: Context
    tail: Tail
    index: InteractionIndex
    num_events_B: Tensor
    last_event_ts_B: Tensor

    def outputs(self, model: Longer, requests: RequestTensors) -> Tensor:
        """[C, tasks] of requests that ask one user each, in order; the device is not waited for."""
        index = self.index if model.settings.interactions else None
        return model.candidates(self.context, self.tail, index, requests, self.last_event_ts_B)


def gather(model: Longer, states: Sequence[UserState]) -> Gathered:
    """The states padded to the longest, one copy of each."""
    merge_size = model.windows.merge_size
    numbers = [
        (
            s.first_index // merge_size,
            s.query_first,
            s.num_events // merge_size,
            s.first_index,
            s.num_events,
            s.last_event_ts,
        )
        for s in states
    ]
    first_B, query_first_B, end_B, first_index_B, num_events_B, last_event_ts_B = to_device(
        torch.tensor(numbers).T.contiguous(), _device(model)
    )
    context = Context(
        first_B=first_B,
        query_first_B=query_first_B,
        end_B=end_B,
        tokens_BQD=states[0].tokens_QD[None, :0],
        keys=_pad_layers(states, lambda s: s.keys),
        values=_pad_layers(states, lambda s: s.values),
    )
    tail = Tail(
        keys=[torch.stack(layer) for layer in zip(*(s.tail_keys for s in states), strict=True)],
        values=[torch.stack(layer) for layer in zip(*(s.tail_values for s in states), strict=True)],
        exists_RT=torch.stack([s.tail_exists_T for s in states]),
    )
    index = InteractionIndex(
        pairs_BFL=pad_sequence([s.pairs_FL.T for s in states], batch_first=True, padding_value=PAD).transpose(1, 2),
        event_ts_BL=_pad(s.event_ts_L for s in states),
        first_index_B=first_index_B,
    )
    return Gathered(context, tail, index, num_events_B, last_event_ts_B)


def _advance(
    model: Longer, old: Context | None, events: Histories, pairs: Sequence[Tensor], times: Sequence[Tensor]
) -> list[UserState]:
    """States after `events`, each of which starts on a group: at its history window without `old`, else where `old` ends."""
    windows, tensors = model.windows, event_tensors(events, _device(model))
    end_B = tensors.first_index_B + tensors.num_events_B
    x_Ed = model.embedding.events(tensors)
    num_new_B = end_B // windows.merge_size - tensors.first_index_B // windows.merge_size
    context = model.extend(
        old, model.full_groups(tensors, x_Ed), num_new_B, windows.history_start(end_B), windows.query_start(end_B)
    )
    row_B = torch.arange(len(events), device=end_B.device)
    partial_BKd, exists_BK = model.partial_groups(tensors, x_Ed, row_B, end_B)
    tail = model.tail(context, row_B, end_B, tensors.user_key_B, partial_BKd, exists_BK)
    last_ts_B = tensors.last_ts_R(row_B, end_B).tolist()
    partial = events.slice_events(
        np.arange(len(events)), events.end_index_B // windows.merge_size * windows.merge_size, events.end_index_B
    )
    first_B, query_first_B, full_B = (t.tolist() for t in (context.first_B, context.query_first_B, context.end_B))
    return [
        UserState(
            user_key=int(events.user_key_B[b]),
            first_index=first_B[b] * windows.merge_size,
            num_events=int(end),
            last_event_ts=last_ts_B[b],
            query_first=query_first_B[b],
            keys=tuple(_rows_of(context.keys, b, first_B[b], query_first_B[b], full_B[b])),
            values=tuple(_rows_of(context.values, b, first_B[b], query_first_B[b], full_B[b])),
            tokens_QD=context.tokens_BQD[b, : full_B[b] - query_first_B[b]].clone(),
            tail_keys=tuple(layer[b].clone() for layer in tail.keys),
            tail_values=tuple(layer[b].clone() for layer in tail.values),
            tail_exists_T=tail.exists_RT[b].clone(),
            pairs_FL=pairs[b].clone(),
            event_ts_L=times[b].clone(),
            partial=partial.slice_events(
                np.array([b]), partial.first_index_B[b : b + 1], partial.end_index_B[b : b + 1]
            ),
        )
        for b, end in enumerate(events.end_index_B)
    ]


def _rows_of(layers: Sequence[Tensor], b: int, first: int, query_first: int, end: int) -> Iterator[Tensor]:
    """One user's unpadded rows of each layer, copied so that the state does not hold on to the batch."""
    for number, layer in enumerate(layers):
        yield layer[b, : end - (first if number == 0 else query_first)].clone()


def _pad(tensors: Iterator[Tensor]) -> Tensor:
    return pad_sequence(list(tensors), batch_first=True)


def _pad_layers(states: Sequence[UserState], layers_of: Callable[[UserState], tuple[Tensor, ...]]) -> list[Tensor]:
    return [pad_sequence(list(layer), batch_first=True) for layer in zip(*map(layers_of, states), strict=True)]


def _device(model: Longer) -> torch.device:
    return model.norm_head.weight.device
