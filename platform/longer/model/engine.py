"""One model with the pool that its states lie in: `states`' three functions as the device does them best."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy.typing as npt
import torch
from torch import nn

from longer.arrays import Candidates, Histories, Int64
from longer.model.captured_call import Graphs
from longer.model.captured_growth import CapturedGrowth
from longer.model.captured_scores import CapturedScores
from longer.model.fuse import has_kernels, plainly
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.states import Grow, UserState, append, computing_dtype, encode, score
from longer.slots import Slot

Score = Callable[[Sequence[UserState], Int64, Candidates], npt.NDArray]


class StateEngine:
    """Encodes, appends and scores as `states` does; captured on CUDA, where kernels read what the pool keeps.

    Each call is one copy to the device and one replay there: three of a batch that has states to encode and to append to. One for
    all would take a graph for each combination of their sizes, to save two copies and launches and no kernel.

    `is_plain`: neither captured nor compiled, for the few calls of whom that would take longer than all that they ask; the same
    products in the same types, GELU in the same form.
    """

    def __init__(self, model: Longer, pool: StatePool, is_plain: bool = False) -> None:
        self.model, self.pool, self._is_plain = model, pool, is_plain
        is_on_kernels = has_kernels(model.norm_head.weight)
        self._served = _with_products_in(computing_dtype(model, pool), model) if is_on_kernels else model
        self._grow: Grow | None = None
        self._score: Score = partial(score, self._served, pool)
        self._graphs: tuple[Graphs, ...] = ()
        if is_on_kernels and not is_plain:
            memory = torch.cuda.graph_pool_handle()
            growth, scores = CapturedGrowth(self._served, pool, memory), CapturedScores(self._served, pool, memory)
            self._grow, self._score, self._graphs = growth.grow, scores.score, (growth.graphs, scores.graphs)

    def encode(self, histories: Histories, slots: Sequence[Slot]) -> list[UserState]:
        with self._how():
            return encode(self._served, self.pool, histories, slots, self._grow)

    def append(self, states: Sequence[UserState], new: Histories, slots: Sequence[Slot]) -> list[UserState]:
        with self._how():
            return append(self._served, self.pool, states, new, slots, self._grow)

    def score(self, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates) -> npt.NDArray:
        with self._how():
            return self._score(states, request_ts_R, candidates)

    def forget_inputs(self) -> None:
        """Overwrites what graphs keep of the calls before, events among it; what states keep is the pool's."""
        for graphs in self._graphs:
            graphs.forget()
            self.pool.clear([(self.pool.trash_row, 1)])  # what growth leaves there is read by the filling of scores

    def _how(self) -> AbstractContextManager:
        return plainly() if self._is_plain else nullcontext()


def _with_products_in(dtype: torch.dtype, model: Longer) -> Longer:
    """The model with matrices in this type, so that no replay casts them anew, but for that of the outputs; it shares its tables
    with the other."""
    twin = copy.deepcopy(model, {id(table): table for table in model.embedding_parameters()})
    for module in twin.modules():
        if isinstance(module, nn.Linear) and module is not twin.head[-1]:
            module.to(dtype)
    for block in twin.layers:
        block.join_projections()
    return twin
