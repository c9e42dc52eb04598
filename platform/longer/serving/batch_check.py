"""Online equals offline: some requests of every run go through the serving path's own scorer, and the scores are compared.

Of users' vectors, the serving path's own states: the user's token once more from what a state keeps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from longer.arrays import Float32, Int64
from longer.data.columns import flat_list, single_array
from longer.data.scores import (
    absolute_gaps,
    check_gaps,
    most_difference,
    score_column,
    typical_size,
)
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.model.fuse import plainly
from longer.model.inputs import event_tensors
from longer.model.states import gather
from longer.serving.batch_input import Chunk, Items
from longer.serving.batch_plan import Plan
from longer.serving.resolver import Pending
from longer.serving.scorer import Scorer, ScoreRequest
from longer.serving.stages import collected_ms, stage
from longer.training_settings import TaskKind

_SCORE = score_column("")

_MOST_CANDIDATES = 200
"""Candidates of a request that are compared, spread evenly."""

_FEWEST_LEFT_OUT = 200
_PART_LEFT_OUT = 0.01
_PIECE_ITEMS = 4096


@dataclass
class OnlineCheck:
    """Compares a bucket's rows as they come, requests `numbers` of the bucket; keeps the largest difference."""

    plan: Plan
    scorer: Scorer | None
    """None where there is no serving path: `numbers` are then none."""
    items: Items | None
    numbers: Int64
    num_left_out: int = _FEWEST_LEFT_OUT
    max_abs_diff: float = 0.0
    num_compared: int = 0

    def see(self, chunk: Chunk, rows: pa.Table) -> None:
        """ArithmeticError if the serving path scores one of the chosen requests otherwise than its row says."""
        here = self.numbers[(self.numbers >= chunk.first) & (self.numbers < chunk.first + len(rows))] - chunk.first
        if not len(here):
            return
        with stage("check"), collected_ms():  # the serving path's own stages are not the bucket's
            self._see(chunk, rows, here)

    def _see(self, chunk: Chunk, rows: pa.Table, here: Int64) -> None:
        tasks = [name.removeprefix(_SCORE) for name in rows.column_names if name.startswith(_SCORE)]
        scales = {task: typical_size(_flat(rows[score_column(task)]), self._kind(task)) for task in tasks}
        if self.plan.kind == "vectors":
            for r in here.tolist():
                offline = np.array(rows["vector"][r].as_py())
                self._note(self._online_vector(chunk, r), offline, "regression", "a user's vectors")
        else:
            lengths = pc.list_value_length(rows["item_id"]).to_numpy()[here]
            here = here[lengths > 0]
            self._compare(chunk, here, rows, scales)
            if self.plan.top_k and self.items:
                self._check_left_out(chunk, here, rows, scales)
        self.num_compared += len(here)

    def _compare(self, chunk: Chunk, here: Int64, rows: pa.Table, scales: dict[str, float]) -> None:
        """All of them at once, as a replica would answer a batch."""
        asked, chosen = [], []
        for r in here.tolist():
            ids = rows["item_id"][r].as_py()
            some = _spread(len(ids))
            chosen.append(some)
            features = {} if chunk.rows is None else self._features(chunk.rows.slice(r, 1), some)
            asked.append(_request(chunk, r, [ids[i] for i in some], features))
        for r, some, scores in zip(here.tolist(), chosen, self._online(asked), strict=True):
            for task, online in scores.items():
                offline = np.array(rows[score_column(task)][r].as_py(), np.float32)
                self._note(online, offline[some], self._kind(task), f"scores of {task}", scales[task])

    def _check_left_out(self, chunk: Chunk, here: Int64, rows: pa.Table, scales: dict[str, float]) -> None:
        """Items that are not among a user's best, drawn for this user, score no more than the last that is."""
        assert self.items
        all_ids = self.items.item_id_I
        for r in here.tolist():
            drawn = np.random.default_rng(int(chunk.questions.histories.user_key_B[r]))
            chosen = drawn.choice(len(all_ids), min(len(all_ids), self.num_left_out), replace=False, shuffle=False)
            ids = all_ids.take(pa.array(chosen))
            others = ids.filter(pc.invert(pc.is_in(ids, single_array(rows["item_id"].slice(r, 1)).flatten())))
            for begin in range(0, len(others), _PIECE_ITEMS):
                [scored] = self._online([_request(chunk, r, others.slice(begin, _PIECE_ITEMS), {})])
                task, scores = next(iter(scored.items()))
                last = np.float32(rows[score_column(task)][r].as_py()[-1])
                at_most = np.full(len(scores), last)
                self._note(np.maximum(scores, last), at_most, self._kind(task), f"scores of {task}", scales[task])

    def _online(self, asked: list[ScoreRequest]) -> list[dict[str, np.ndarray]]:
        assert self.scorer
        results = self.scorer.score(asked)
        for result in results:
            if isinstance(result, UserError):
                raise result
        return [result.scores for result in results if not isinstance(result, UserError)]

    @torch.inference_mode()
    @plainly()
    def _online_vector(self, chunk: Chunk, r: int) -> np.ndarray:
        """The user's own token, made from the state that the serving path has of the user at the time of the request."""
        assert self.scorer
        scorer, model, user_id = self.scorer, self.scorer.model, chunk.user_id_R.slice(r, 1)
        asked = Pending(user_id, int(stable_keys(user_id)[0]), int(chunk.questions.request_ts_R[r]), None)
        try:
            scorer.states.resolve([asked])
            if asked.error:
                raise asked.error
            assert asked.state
            together = gather(model, scorer.cache.pool, [asked.state])
            events = event_tensors(asked.state.partial, model.norm_head.weight.device)
            row_1 = torch.zeros_like(together.num_events_B)
            partial = model.partial_groups(events, model.embedding.events(events), row_1, together.num_events_B)
            partial_1D = model.embedding.groups(*partial)
            tail = model.tail_of_groups(together.context, row_1, together.num_events_B, events.user_key_B, partial_1D)
        finally:
            scorer.cache.release()
        assert tail.x_RTD is not None
        return tail.x_RTD[0, -1].double().cpu().numpy()

    def _features(self, request: pa.Table, some: Int64) -> dict[str, list[Any]]:
        values = {name: request[name][0].as_py() for name in self.plan.schema.features_of("item")}
        return {name: [of_item[i] for i in some] for name, of_item in values.items()}

    def _kind(self, task: str) -> TaskKind:
        assert self.scorer
        return next(known.kind for known in self.scorer.model.tasks if known.name == task)

    def _note(
        self, online: np.ndarray, offline: np.ndarray, kind: TaskKind, what: str, scale: float | None = None
    ) -> None:
        self.max_abs_diff = max(self.max_abs_diff, float(absolute_gaps(online, offline).max()))
        most = most_difference(self.plan.precision)
        check_gaps(online, offline, kind, what, "the offline and the serving path", scale, most)


def _request(chunk: Chunk, r: int, ids: list[Any] | pa.Array, features: dict[str, list[Any]]) -> ScoreRequest:
    return ScoreRequest(chunk.user_id_R[r].as_py(), ids, features, int(chunk.questions.request_ts_R[r]))


def chosen_numbers(num_requests: int, num_chosen: int) -> Int64:
    """Numbers of the requests that are compared, spread evenly; the same ones every time."""
    chosen = min(num_requests, num_chosen)
    return np.arange(chosen) * num_requests // max(1, chosen)


def num_left_out(num_requests: int, num_items: int, num_chosen: int) -> int:
    """Items of each chosen user's catalogue that are scored to see that none of them belongs among the best.

    Together a hundredth of the pairs of user and item that the bucket scores, or all items of each: where m pairs that belong
    among the best are missing, alike for all users, a run meets about m / 100, however large the catalogue, and so misses all of
    them with a probability of e^(-m/100). A part f of the items lost for N users is m = f * top_k * N.
    """
    a_user = _PART_LEFT_OUT * num_requests * num_items / max(1, num_chosen)
    return min(num_items, max(_FEWEST_LEFT_OUT, round(a_user)))


def _flat(lists: pa.ChunkedArray) -> Float32:
    return flat_list(lists)[1].to_numpy()


def _spread(num: int) -> Int64:
    return chosen_numbers(num, _MOST_CANDIDATES)
