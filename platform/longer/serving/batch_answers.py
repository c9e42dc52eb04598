"""From a chunk of questions to the rows of an offline table.

`batch_scores`, `candidate_scores`, `top_items`: one row a request or user: `request_id` (requests only), `user_id`, `request_ts`,
`item_id` list and one list a task, `score_TASK`; the items in the request's or the candidates' order, or best first.
`user_vectors`: `user_id`, `request_ts`, `num_events` of the history, and `vector`, a list of float32.

R requests, I items, k best of them, T tasks, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from longer.arrays import Float32, Int64
from longer.data.columns import sizes_of
from longer.data.scores import score_column, score_rows
from longer.model.inputs import tensors_of
from longer.model.outputs import to_scores
from longer.schema import TIMESTAMP
from longer.serving.batch_input import Chunk, Items
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan
from longer.serving.offline import best_items, score_all, score_lists, waves
from longer.serving.packed import ALONE
from longer.serving.questions import Budget
from longer.serving.stages import stage


def computing_in(precision: str, device: str) -> AbstractContextManager:
    """Products of matrices in bf16, if that is the precision; sums and norms stay in float32."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class Answers:
    """How the plan's questions are answered by a model on its device."""

    plan: Plan
    budget: Budget
    items: Items | None
    item_features: dict[str, Tensor]
    turn: AbstractContextManager = ALONE
    """Held while the device is given work; entered many times, by one thread at a time."""
    before_sweep: Callable[[], None] = lambda: None
    """Called before lists of requests are swept."""

    @staticmethod
    def of(plan: Plan, budget: Budget, run: Run) -> "Answers":
        """Reads the items that users are asked about, if the plan has some."""
        items = Items.of(plan, run) if plan.kind in ("lists", "top_k") else None
        return Answers(plan, budget, items, tensors_of(items.features, plan.device) if items else {})

    @property
    def values_a_user(self) -> int:
        """What one user's row holds."""
        if self.items is None:
            return self.budget.model.settings.width
        return min(self.plan.top_k or len(self.items.item_id_I), len(self.items.item_id_I))

    @property
    def bytes_a_user(self) -> int:
        """What one user's row takes at most: the vector, or ids, the longest of them, and their scores."""
        num_values = self.values_a_user
        if self.items is None:
            return 4 * num_values
        size_I = sizes_of(self.items.item_id_I)
        longest = np.partition(size_I, len(size_I) - num_values)[len(size_I) - num_values :]
        return int(longest.sum()) + 4 * (1 + len(self.budget.model.tasks)) * num_values

    def num_scores(self, chunk: Chunk) -> int:
        """How many items the model scores for the chunk, kept or not."""
        if chunk.requests:
            return len(chunk.requests.item_id_C)
        return len(chunk.questions) * len(self.items.item_id_I) if self.items else 0

    @torch.inference_mode()
    def rows(self, chunk: Chunk) -> pa.Table:
        """One row a question, in the chunk's order."""
        with computing_in(self.plan.precision, self.plan.device):
            return self._rows(chunk)

    def _rows(self, chunk: Chunk) -> pa.Table:
        if chunk.requests:
            candidates = chunk.requests.candidates
            outputs_CT = score_lists(chunk.questions, candidates, self.budget, self.turn, self.before_sweep)
            return score_rows(chunk.requests, self._scores(outputs_CT), self.plan.schema)
        with self.turn:
            if self.plan.kind == "vectors":
                return self._vectors(chunk)
            return self._best(chunk) if self.plan.top_k else self._lists(chunk)

    def _lists(self, chunk: Chunk) -> pa.Table:
        outputs_RIT = self._empty(chunk)
        for rows_R, asked in waves(chunk.questions, self.budget):
            with stage("score"):
                for begin, block_RIT in score_all(asked, self.item_features, self.budget):
                    outputs_RIT[rows_R, begin : begin + block_RIT.shape[1]] = block_RIT.float().cpu().numpy()
        number_RI = np.broadcast_to(np.arange(self.values_a_user), outputs_RIT.shape[:2])
        return self._user_rows(chunk, number_RI, outputs_RIT)

    def _best(self, chunk: Chunk) -> pa.Table:
        assert self.plan.top_k
        outputs_RkT = self._empty(chunk)
        number_Rk = np.zeros(outputs_RkT.shape[:2], np.int64)
        for rows_R, asked in waves(chunk.questions, self.budget):
            with stage("score"):
                best = best_items(asked, self.item_features, self.plan.top_k, self.budget)
            number_Rk[rows_R], outputs_RkT[rows_R] = best
        return self._user_rows(chunk, number_Rk, outputs_RkT)

    def _vectors(self, chunk: Chunk) -> pa.Table:
        vectors_RD = np.empty((len(chunk.questions), self.values_a_user), np.float32)
        for rows_R, asked in waves(chunk.questions, self.budget):
            vectors_RD[rows_R] = asked.user_vectors_RD.float().cpu().numpy()
        counts = {"num_events": pa.array(chunk.questions.history_end_R)}
        return pa.table(self._whose(chunk) | counts | {"vector": _lists_of(vectors_RD)})

    def _user_rows(self, chunk: Chunk, number_RI: Int64, outputs_RIT: Float32) -> pa.Table:
        assert self.items
        item_id_C = self.items.item_id_I.take(pa.array(number_RI.ravel()))
        scores = self._scores(outputs_RIT.reshape(-1, outputs_RIT.shape[-1]))
        lists = {"item_id": _lists_of(number_RI, item_id_C)}
        lists |= {score_column(task): _lists_of(number_RI, pa.array(values)) for task, values in scores.items()}
        return pa.table(self._whose(chunk) | lists)

    def _whose(self, chunk: Chunk) -> dict[str, pa.Array]:
        return {
            "user_id": chunk.user_id_R,
            "request_ts": pa.array(chunk.questions.request_ts_R).cast(TIMESTAMP),
        }

    def _scores(self, outputs_CT: Float32) -> dict[str, Float32]:
        return to_scores(outputs_CT, self.budget.model.tasks)

    def _empty(self, chunk: Chunk) -> Float32:
        return np.empty((len(chunk.questions), self.values_a_user, len(self.budget.model.tasks)), np.float32)


def _lists_of(values_RI: npt.NDArray, flat: pa.Array | None = None) -> pa.Array:
    """Lists of equal length: of the values, or of `flat` in their place."""
    offsets = pa.array(np.arange(len(values_RI) + 1, dtype=np.int32) * values_RI.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(values_RI.ravel()) if flat is None else flat)
