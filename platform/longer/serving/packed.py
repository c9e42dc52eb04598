"""Lists scored by the model's own forward pass, as training computes it: a user's requests whose windows agree are a pack.

A pack's history is encoded once for its requests and then forgotten: the next pack encodes its window anew. On a GPU a batch of
packs is one flat pass in which everything lies side by side, so that there is little to launch.

C candidates, R requests, P packs, U users, T tasks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Candidates, Float32, Int64, RequestBatch, offsets_of
from longer.data.batches import Packs, plan_packs
from longer.model.flat import flat_outputs
from longer.model.fuse import has_kernels, plainly
from longer.model.inputs import tensors_of, to_tensors
from longer.model.layout import Sizes, flatten
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.serving.questions import Questions, candidates_of
from longer.serving.stages import stage
from longer.training.loader import prefetch

_SIZES_STEP = 64
"""Batches are filled up to multiples of it: compiled code is never made anew, for sizes of one or for those that 16 divides."""

_BATCHES_AHEAD = 1
"""Besides one that waits to be taken in: what they read lies on the device, and two buckets are laid out at once."""

ALONE: AbstractContextManager = nullcontext()
"""The turn of who shares the device with nobody."""

Pass = Callable[[], Tensor]
"""[C, T] outputs of a batch that lies on the device."""


@dataclass(frozen=True)
class Packed:
    """Requests in packs, and what is known of a pack before anything is computed."""

    model: Ranker
    questions: Questions
    candidates: Candidates
    packs: Packs

    @staticmethod
    def of(model: Ranker, questions: Questions, candidates: Candidates, max_requests: int) -> "Packed":
        """Every request once, at most so many in a pack."""
        packs = plan_packs(questions.row_R, questions.history_end_R, model.windows, max_requests)
        return Packed(model, questions, candidates, packs)

    def cut(self, most_tokens: int) -> "Packed":
        """The same candidates in packs of fewer than twice so many tokens of theirs and of their requests."""
        lengths_R = np.diff(self.candidates.offsets_R1)
        parts_R = np.maximum(1, -(-lengths_R // most_tokens))
        request_N = np.repeat(
            np.arange(len(lengths_R)), parts_R
        )  # one with many candidates is asked about a part at a time
        part_N = np.arange(len(request_N)) - (np.cumsum(parts_R) - parts_R)[request_N]
        offsets = np.append(
            self.candidates.offsets_R1[request_N] + part_N * most_tokens, self.candidates.offsets_R1[-1]
        )
        of_parts = replace(self.candidates, offsets_R1=offsets)
        max_requests = int(np.diff(self.packs.offsets_P1).max())
        packed = Packed.of(self.model, self.questions.take(request_N), of_parts, max_requests)
        tokens_N = (np.diff(offsets) + self.model.embedding.num_globals + 1)[packed.packs.order_R]
        before_N, pack_N = (
            np.cumsum(tokens_N) - tokens_N,
            np.repeat(np.arange(len(packed.packs)), packed.num_requests_P),
        )
        piece_N = (before_N - before_N[packed.packs.offsets_P1[:-1]][pack_N]) // most_tokens
        first = np.flatnonzero(np.diff(pack_N, prepend=-1) | np.diff(piece_N, prepend=-1))
        return replace(packed, packs=Packs(packed.packs.order_R, np.append(first, len(tokens_N))))

    def take(self, packs_N: Int64) -> "Packed":
        return replace(self, packs=self.packs.take(packs_N))

    @property
    def newest_P(self) -> Int64:
        """Each pack's newest request."""
        return self.packs.order_R[self.packs.offsets_P1[1:] - 1]

    @property
    def row_P(self) -> Int64:
        return self.questions.row_R[self.newest_P]

    @property
    def end_P(self) -> Int64:
        return self.questions.history_end_R[self.newest_P]

    @property
    def start_P(self) -> Int64:
        """Where each pack's history window begins, in events."""
        return self.model.windows.history_start(self.end_P) * self.model.windows.merge_size

    @property
    def num_events_P(self) -> Int64:
        return self.end_P - self.start_P

    @property
    def num_requests_P(self) -> Int64:
        return np.diff(self.packs.offsets_P1)

    @property
    def num_candidates_P(self) -> Int64:
        return self.packs.sums(np.diff(self.candidates.offsets_R1))

    def passes(self, cost_P: Int64, most: int) -> Iterator[tuple[Int64, Pass]]:
        """Numbers of candidates, and the pass that scores them: packs in order, of this cost at most or one pack alone."""
        ends_P1 = offsets_of(cost_P)
        begin = 0
        while begin < len(self.packs):
            end = max(begin + 1, int(np.searchsorted(ends_P1, ends_P1[begin] + most, side="right")) - 1)
            picked_C, batch = self._batch(np.arange(begin, end))
            if len(picked_C):
                yield picked_C, laid_out(self.model, batch)
            begin = end

    def _batch(self, packs_N: Int64) -> tuple[Int64, RequestBatch]:
        """Its candidates' numbers, and a batch; history i is that of pack i."""
        chosen = self.take(packs_N)
        requests = chosen.packs.order_R
        picked_C, candidates = candidates_of(self.candidates, requests)
        return picked_C, RequestBatch(
            histories=self.questions.histories.slice_events(chosen.row_P, chosen.start_P, chosen.end_P),
            row_R=np.repeat(np.arange(len(packs_N)), chosen.num_requests_P),
            history_end_R=self.questions.history_end_R[requests],
            request_ts_R=self.questions.request_ts_R[requests],
            candidates=candidates,
            request_id_R=requests,
        )


def score_packed(
    packed: Packed, cost_P: Int64, most: int, outputs_CT: Float32, turn: AbstractContextManager = ALONE
) -> None:
    """Writes the outputs of all of the packs' candidates, batches of cost `most` at most.

    The first batches are laid out before it is this caller's `turn` at the device, which ends when the last is launched: they are
    waited for afterwards, while others launch theirs.
    """
    passes, scored = prefetch(packed.passes(cost_P, most), _BATCHES_AHEAD), list[tuple[Int64, Tensor]]()
    with stage("lay out"):
        following = next(passes, None)
    with turn:
        while following is not None:
            with stage("score"):
                picked_C, run = following
                scored.append((picked_C, run().float().to("cpu", non_blocking=True)))
            with stage("lay out"):
                following = next(passes, None)
        wait = _until_now(packed.model)
    with stage("score"):
        wait()
        for picked_C, of_batch_CT in scored:
            outputs_CT[picked_C] = of_batch_CT.numpy()


def _until_now(model: Ranker) -> Callable[[], None]:
    """Waits for what the model's device has been asked until now, not for what others ask it afterwards."""
    if not model.norm_head.weight.is_cuda:
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize


def laid_out(model: Ranker, batch: RequestBatch) -> Pass:
    """The forward pass over the batch, which is on the device when this returns, or on its way there; for any thread."""
    weight, num_candidates = model.norm_head.weight, int(batch.candidates.offsets_R1[-1])
    is_flat = isinstance(model, Longer) and model.has_flat_pass and has_kernels(weight)
    if is_flat and len(batch.histories.event_ts_E):
        sizes = Sizes.of(batch, model.windows)
        filled = Sizes(*(-(-max(size, 1) // _SIZES_STEP) * _SIZES_STEP for size in sizes))
        flat = flatten(batch, model.windows, model.embedding.num_globals + 1, filled._replace(rows=sizes.rows))
        arrays, shapes = tensors_of(flat.arrays, weight.device), replace(flat, arrays={})
        return lambda: flat_outputs(cast(Longer, model), shapes, arrays)[:num_candidates]
    tensors = to_tensors(batch, weight.device)
    how = plainly if is_flat else nullcontext  # nobody in the batch has done anything: too seldom to compile for

    def steps() -> Tensor:
        with how():
            return model(tensors)

    return steps
