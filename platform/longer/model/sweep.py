"""Users carried forward in time: each history encoded once, appended to, and every request on the way scored.

What `states` does for users who come one by one, for many users whose requests are known: contexts stay side by side on the
device, and all requests of a stretch in which a user's windows stand still read one context, each up to its own last event.

B users, R requests, C candidates in all of them, T tail tokens, D width, K events in a group.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Histories, Int64
from longer.model.context import Context, Tail
from longer.model.inputs import EventTensors, RequestTensors, event_tensors, on
from longer.model.interactions import InteractionIndex
from longer.model.longer import Longer


@dataclass(frozen=True)
class Asked:
    """R requests, sorted by user, whose users' contexts are there, with the requests' own tokens."""

    model: Longer
    context: Context
    index: InteractionIndex | None
    tail: Tail
    row_R: Int64
    requests: RequestTensors
    last_event_ts_R: Tensor

    @property
    def num_groups(self) -> int:
        """Groups of the longest context."""
        return self.context.keys[0].shape[1]

    @property
    def user_vectors_RD(self) -> Tensor:
        """Each user's own global token as the last layer reads it, [R, D]: it has gathered the whole history window."""
        assert self.tail.x_RTD is not None
        return self.tail.x_RTD[:, -1]

    @torch.inference_mode()
    def outputs(self, first: int, end: int, offsets_N1: Int64, candidates: dict[str, Tensor]) -> Tensor:
        """[C, tasks] as the model's forward pass gives, for candidates of requests `first` to `end`; the device is not waited for.

        Request `first + n` has the candidates `offsets_N1[n]` to `offsets_N1[n + 1]`: all that it is asked about, or a part.
        """
        begin_row, end_row = int(self.row_R[first]), int(self.row_R[end - 1]) + 1
        asked = self.requests
        (candidate_offsets,) = on(self.last_event_ts_R.device, offsets_N1)
        part = RequestTensors(
            row_R=asked.row_R[first:end] - begin_row,
            history_end_R=asked.history_end_R[first:end],
            request_ts_R=asked.request_ts_R[first:end],
            candidate_offsets_R1=candidate_offsets,
            candidates=candidates,
            labels={},
        )
        tail = Tail(
            [layer[first:end] for layer in self.tail.keys],
            [layer[first:end] for layer in self.tail.values],
            self.tail.exists_RT[first:end],
        )
        context, index = _rows(self.context, begin_row, end_row), self.index
        if index is not None:
            rows = slice(begin_row, end_row)
            index = InteractionIndex(index.pairs_BFL[rows], index.event_ts_BL[rows], index.first_index_B[rows])
        return self.model.candidates(context, tail, index, part, self.last_event_ts_R[first:end])


class Sweep:
    """Contexts of B users that only move forward. `histories` reaches back to the first window that each user is asked about."""

    def __init__(self, model: Longer, histories: Histories) -> None:
        self._model, self._device = model, model.norm_head.weight.device
        self._events = event_tensors(histories, self._device)
        self._context: Context | None = None
        self._index: InteractionIndex | None = None
        self._end_B = np.zeros(0, np.int64)  # of the context, in groups

    @torch.inference_mode()
    def advance(self, end_B: Int64) -> None:
        """The first `len(end_B)` users now stand at absolute event index `end_B`; the users behind them are dropped for good.

        Costs what the events since the last stand cost, and once in a stride the query window (`Longer.extend`); besides, the index
        that interactions are counted with, which is sorted anew. A user whose windows have left everything behind that is kept
        starts anew.
        """
        windows, num_users = self._model.windows, len(end_B)
        first_B, query_first_B = windows.history_start(end_B), windows.query_start(end_B)
        first, query_first = on(self._device, first_B, query_first_B)
        begin_B = first_B
        old = None
        if self._context is not None:
            kept_end_B = self._end_B[:num_users]
            begin_B = np.maximum(kept_end_B, first_B)
            old = _rows(self._context, 0, num_users)
            if (kept_end_B < first_B).any():
                (gone,) = on(self._device, kept_end_B < first_B)
                old = _forget(old, gone, first)
        rows = np.arange(num_users)
        events = self._slice(rows, begin_B * windows.merge_size, end_B)
        new_ND = self._model.full_groups(events, self._model.embedding.events(events))
        (num_new,) = on(self._device, end_B // windows.merge_size - begin_B)
        self._context = self._model.extend(old, new_ND, num_new, first, query_first)
        self._end_B = end_B // windows.merge_size
        if self._model.settings.interactions:
            window = self._slice(rows, first_B * windows.merge_size, end_B)
            self._index = InteractionIndex.build(window, self._model.interaction_fields)

    @torch.inference_mode()
    def ask(self, row_R: Int64, history_end_R: Int64, request_ts_R: Int64) -> Asked:
        """Requests of the users, sorted by `row_R`, each about the events before `history_end_R`.

        A request may lie before its user's stand as long as its windows are those of the stand.
        """
        assert self._context is not None
        merge_size = self._model.windows.merge_size
        events = self._slice(row_R, history_end_R // merge_size * merge_size, history_end_R)
        no_candidates_R1 = np.zeros(len(row_R) + 1, np.int64)
        row, end, request_ts, offsets = on(self._device, row_R, history_end_R, request_ts_R, no_candidates_R1)
        requests = RequestTensors(row, end, request_ts, offsets, candidates={}, labels={})
        each_R, end_R = torch.arange(len(row_R), device=self._device), requests.history_end_R
        groups = self._model.partial_groups(events, self._model.embedding.events(events), each_R, end_R)
        tail = self._model.tail(self._context, requests.row_R, end_R, events.user_key_B, *groups)
        last_event_ts_R = events.last_ts_R(each_R, end_R)
        return Asked(self._model, self._context, self._index, tail, row_R, requests, last_event_ts_R)

    def _slice(self, rows_N: Int64, starts_N: Int64, ends_N: Int64) -> EventTensors:
        """Events of absolute index in [starts_N[i], ends_N[i]) of row `rows_N[i]`, which lie on the device already."""
        row_N, start_N, end_N = on(self._device, rows_N, starts_N, ends_N)
        return self._events.slice_events(row_N, start_N, end_N, int((ends_N - starts_N).sum()))


def _rows(context: Context, begin: int, end: int) -> Context:
    """Users `begin` to `end` of a context: views."""
    return Context(
        context.first_B[begin:end],
        context.query_first_B[begin:end],
        context.end_B[begin:end],
        context.tokens_BQD[begin:end],
        [layer[begin:end] for layer in context.keys],
        [layer[begin:end] for layer in context.values],
    )


def _forget(context: Context, gone_B: Tensor, first_B: Tensor) -> Context:
    """The context as if users `gone_B` had nothing yet, with windows that start at `first_B`."""
    return replace(
        context,
        first_B=torch.where(gone_B, first_B, context.first_B),
        query_first_B=torch.where(gone_B, first_B, context.query_first_B),
        end_B=torch.where(gone_B, first_B, context.end_B),
    )
