"""Scores from states as CUDA graphs: a batch costs one copy to the device, one replay and one copy back.

A graph serves every batch of up to U users and C candidates; sizes are rounded up to a few. What fills a batch up is a user without
events, whom the filling asks about, whatever the batch before left there. To capture a graph takes many times as long as a batch,
and its first one waits for it: so a batch whose size is new is scored by a larger graph, where one of up to about twice the size
is there (`SizeChoice`).

R requests of one user each, C candidates.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import Candidates, Int64, power_of_two
from longer.model.captured_call import Graphs, rounded
from longer.model.inputs import RequestTensors, under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.states import UserState, computing, context_of, gathered

OFTEN = 32
"""Batches of one size that a larger graph scores before they get one of their own."""

_HARDLY_MORE = 1024
"""Candidates whose scores cost hardly more than those of fewer: most of the time goes to what all of them share."""

Size = tuple[int, int]
"""Users, one for the filling included, and candidates that a graph has room for."""


class SizeChoice:
    """By which graph a batch is scored, so that few batches wait for one to be captured: those for which none of up to about twice
    their size is there, or is any more (`Graphs`), and, once, those of a size that comes often."""

    def __init__(self) -> None:
        self._num_lent = Counter[Size]()

    def of(self, size: Size, captured: Collection[Size]) -> Size:
        """The batch's own size, where it has a graph or is to get one, else that of another graph."""
        if size in captured:
            return size
        larger = [other for other in captured if _stands_in(other, size)]
        if larger and self._num_lent[size] < OFTEN:
            self._num_lent[size] += 1
            return min(larger, key=lambda other: other[::-1])
        del self._num_lent[size]
        return size


def _stands_in(other: Size, size: Size) -> bool:
    """Whether the other has the room, and not much more than twice of it."""
    (users, room), (num_users, num_candidates) = other, size
    most = max(2 * num_candidates, _HARDLY_MORE)
    return num_users <= users < 2 * num_users and num_candidates <= room <= most


class CapturedScores:
    """`states.score` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool, memory: Any) -> None:
        self._model, self._pool, self._choice = model, pool, SizeChoice()
        self.graphs = Graphs[Size](pool.device, memory)
        self._names = [*context_of(pool, []).arrays, "last_ts", "request_ts"]
        tails = {f"tail{layer}": pool.trash_row for layer in range(pool.layout.num_layers)}
        of_nobody = {"event_ts": pool.trash_word, **tails}  # it reads the pool's last row, which is in no slot
        self._nobody_A1 = np.array([[of_nobody.get(name, 0)] for name in self._names], np.int64)

    @torch.inference_mode()
    def score(
        self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates
    ) -> npt.NDArray[np.float32]:
        """[C, tasks]: request r asks `states[r]` about its own candidates."""
        num_candidates = int(candidates.offsets_R1[-1])
        own = power_of_two(len(states)) + 1, rounded(num_candidates)
        num_users, room = size = self._choice.of(own, self.graphs.sizes)
        last_ts_R = np.array([state.last_event_ts for state in states], np.int64)
        numbers = context_of(self._pool, states).arrays | {"last_ts": last_ts_R, "request_ts": request_ts_R}
        numbers_AU = self._nobody_A1.repeat(num_users, 1)
        numbers_AU[:, : len(states)] = list(numbers.values())
        offsets_U1 = np.append(candidates.offsets_R1, np.full(num_users - len(states), num_candidates))
        offsets_U1[-1] = room
        features = {f"candidate.{name}": values for name, values in candidates.features.items()}
        of_filling = np.append(np.zeros_like(offsets_U1[1:]), room)
        graph = self.graphs.of(
            size,
            self._outputs,
            lambda: (
                {"numbers": self._nobody_A1.repeat(num_users, 1), "offsets": of_filling}
                | {name: np.zeros(room, values.dtype) for name, values in features.items()}
            ),
        )
        output_CT: Tensor = graph({"numbers": numbers_AU, "offsets": offsets_U1} | features)
        return output_CT[:num_candidates].cpu().numpy()

    def _outputs(self, tensors: dict[str, Tensor]) -> Tensor:
        model, pool, names = self._model, self._pool, self._names
        numbers = dict(zip(names, tensors["numbers"].view(len(names), -1).unbind(), strict=True))
        with computing(model, pool):
            together = gathered(model, StagedContext(pool, numbers), numbers, numbers["last_ts"])
            requests = RequestTensors(
                row_R=torch.arange(len(numbers["last_ts"]), device=pool.device),
                history_end_R=together.num_events_B,
                request_ts_R=numbers["request_ts"],
                candidate_offsets_R1=tensors["offsets"],
                candidates=under("candidate.", tensors),
                labels={},
            )
            return together.outputs(model, requests)
