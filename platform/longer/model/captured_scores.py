"""Scores from states as CUDA graphs: a batch costs one copy to the device, one replay and one copy back.

A graph serves every batch of up to U users and C candidates; sizes are rounded up to a few, and what fills a batch up is a user
without events, whom the filling asks about.

R requests of one user each, C candidates.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longer.arrays import Candidates, Int64
from longer.model.inputs import RequestTensors, under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.states import UserState, computing, computing_dtype, context_of, gathered, score

MAX_GRAPHS = 64
"""Graphs kept, the last used ones: two a size of batch would be enough if batches were alike."""

_WARM_UP_CALLS = 2
_STEPS_BETWEEN_POWERS = 4


Score = Callable[[Sequence[UserState], Int64, Candidates], npt.NDArray]


def scorer_of(model: Longer, pool: StatePool) -> Score:
    """`states.score` of these: captured on CUDA, where the pool keeps what the kernels read."""
    if pool.device.type == "cuda" and pool.layout.dtype == computing_dtype(model, pool):
        return CapturedScores(model, pool).score
    return partial(score, model, pool)


class CapturedScores:
    """`states.score` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool) -> None:
        self._model, self._pool = _with_products_in(computing_dtype(model, pool), model), pool
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._memory = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def score(
        self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates
    ) -> npt.NDArray[np.float32]:
        """[C, tasks]: request r asks `states[r]` about its own candidates."""
        num_candidates = int(candidates.offsets_R1[-1])
        size = _power_of_two(len(states)), _rounded(num_candidates)
        arrays = self._arrays(states, request_ts_R, candidates, *size)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = _Graph(self._model, self._pool, arrays, self._memory)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(size)
        return graph.replay(arrays)[:num_candidates].cpu().numpy()

    def _arrays(
        self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates, num_users: int, num_rows: int
    ) -> dict[str, npt.NDArray]:
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


class _Graph:
    """One captured size: its inputs are views of one buffer on the device, which one pinned buffer is copied to."""

    def __init__(self, model: Longer, pool: StatePool, arrays: dict[str, npt.NDArray], memory: Any) -> None:
        self._host, self._views = _buffer(arrays)
        self._device = self._host.to(pool.device)
        tensors = {
            name: self._device[begin:end].view(torch.from_numpy(arrays[name][:0]).dtype)
            for name, (begin, end) in self._views.items()
        }
        self._fill(arrays)
        self._device.copy_(self._host)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP_CALLS):
                self._outputs(model, pool, tensors)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._output_CT = self._outputs(model, pool, tensors)

    def replay(self, arrays: dict[str, npt.NDArray]) -> Tensor:
        """[C, tasks], filling included; valid until the next replay of any graph."""
        self._fill(arrays)
        self._device.copy_(self._host, non_blocking=True)
        self._graph.replay()
        return self._output_CT

    def _fill(self, arrays: dict[str, npt.NDArray]) -> None:
        """Only after the results of the last replay were read, which were computed after it had been copied."""
        host = self._host.numpy()
        for name, (begin, end) in self._views.items():
            host[begin:end] = arrays[name].view(np.uint8)

    @staticmethod
    def _outputs(model: Longer, pool: StatePool, tensors: dict[str, Tensor]) -> Tensor:
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


def _with_products_in(dtype: torch.dtype, model: Longer) -> Longer:
    """The model with matrices in this type, so that no replay casts them anew; it shares its tables with the other."""
    twin = copy.deepcopy(model, {id(table): table for table in model.embedding_parameters()})
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return twin


def _buffer(arrays: dict[str, npt.NDArray]) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Pinned bytes for all arrays, each on a word of eight, and where each lies."""
    views, at = {}, 0
    for name, array in arrays.items():
        views[name] = at, at + array.nbytes
        at += -(-array.nbytes // 8) * 8
    return torch.empty(at, dtype=torch.uint8, pin_memory=True), views


def _power_of_two(n: int) -> int:
    return 1 << (max(1, n) - 1).bit_length()


def _rounded(n: int) -> int:
    """Up to one of a few sizes: from a power of two to the next in four steps, of 64 at least."""
    step = max(64, _power_of_two(n) // (2 * _STEPS_BETWEEN_POWERS))
    return max(1, -(-n // step)) * step
