"""Scores from states as CUDA graphs: a batch costs one copy to the device, one replay and one copy back.

A graph serves every batch of up to U users and C candidates; sizes are rounded up to a few. What fills a batch up is a user without
events, whom the filling asks about, whatever the batch before left there.

R requests of one user each, C candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import Candidates, Int64
from longer.model.captured_call import Graphs, power_of_two, rounded
from longer.model.inputs import RequestTensors, under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.states import UserState, computing, context_of, gathered


class CapturedScores:
    """`states.score` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool, memory: Any) -> None:
        self._model, self._pool, self._graphs = model, pool, Graphs(pool.device, memory)

    @torch.inference_mode()
    def score(
        self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates
    ) -> npt.NDArray[np.float32]:
        """[C, tasks]: request r asks `states[r]` about its own candidates."""
        num_candidates = int(candidates.offsets_R1[-1])
        num_users, room = size = power_of_two(len(states)) + 1, rounded(num_candidates)
        last_ts_R = np.array([state.last_event_ts for state in states], np.int64)
        numbers = context_of(self._pool, states).arrays | {"last_ts": last_ts_R, "request_ts": request_ts_R}
        numbers_AU = np.zeros((len(numbers), num_users), np.int64)
        numbers_AU[:, : len(states)] = list(numbers.values())
        offsets_U1 = np.append(candidates.offsets_R1, np.full(num_users - len(states), num_candidates))
        offsets_U1[-1] = room
        features = {f"candidate.{name}": values for name, values in candidates.features.items()}
        names, of_filling = list(numbers), np.append(np.zeros_like(offsets_U1[1:]), room)
        graph = self._graphs.of(
            size,
            lambda tensors: self._outputs(names, tensors),
            lambda: (
                {"numbers": np.zeros_like(numbers_AU), "offsets": of_filling}
                | {name: np.zeros(room, values.dtype) for name, values in features.items()}
            ),
        )
        output_CT: Tensor = graph({"numbers": numbers_AU, "offsets": offsets_U1} | features)
        return output_CT[:num_candidates].cpu().numpy()

    def forget(self) -> None:
        """Nothing of anyone's requests is left in the graphs."""
        self._graphs.forget()

    def _outputs(self, names: list[str], tensors: dict[str, Tensor]) -> Tensor:
        model, pool = self._model, self._pool
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
