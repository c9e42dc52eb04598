"""Scores from states as CUDA graphs: a batch costs one copy to the device, one replay and one copy back.

A graph serves every batch of up to U users and C candidates; sizes are rounded up to a few, and what fills a batch up is a user
without events, whom the filling asks about.

R requests of one user each, C candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import Candidates, Int64
from longer.model.captured_call import Arrays, Graphs, power_of_two, rounded
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
        size = power_of_two(len(states)), rounded(num_candidates)
        arrays = self._arrays(states, request_ts_R, candidates, *size)
        graph = self._graphs.of(size, self._outputs, lambda: arrays)
        output_CT: Tensor = graph(arrays)
        return output_CT[:num_candidates].cpu().numpy()

    def _arrays(
        self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates, num_users: int, num_rows: int
    ) -> Arrays:
        """Everything on the host, filled up: one more user than `num_users` owns what is left of the candidates."""
        filling = num_users + 1 - len(states)
        context = context_of(self._pool, states, filling)
        last_ts = np.array([state.last_event_ts for state in states], np.int64)
        offsets = np.append(candidates.offsets_R1, np.full(filling, candidates.offsets_R1[-1]))
        offsets[-1] = num_rows
        return {
            **{f"context.{name}": values for name, values in context.arrays.items()},
            "last_ts": np.append(last_ts, np.zeros(filling, np.int64)),
            "request_ts": np.append(request_ts_R, np.zeros(filling, np.int64)),
            "offsets": offsets,
            **{
                f"candidate.{name}": np.append(values, np.zeros(num_rows - len(values), values.dtype))
                for name, values in candidates.features.items()
            },
        }

    def _outputs(self, tensors: dict[str, Tensor]) -> Tensor:
        model, pool = self._model, self._pool
        with computing(model, pool):
            numbers = under("context.", tensors)
            together = gathered(model, StagedContext(pool, numbers), numbers, tensors["last_ts"])
            requests = RequestTensors(
                row_R=torch.arange(len(tensors["request_ts"]), device=pool.device),
                history_end_R=together.num_events_B,
                request_ts_R=tensors["request_ts"],
                candidate_offsets_R1=tensors["offsets"],
                candidates=under("candidate.", tensors),
                labels={},
            )
            return together.outputs(model, requests)
