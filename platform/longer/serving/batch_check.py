"""Online equals offline: some requests of every run go through the serving path's own scorer, and the scores are compared.

Of users' vectors, the serving path's own states: the user's token once more from what a state keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from longer.arrays import Float32, Histories, Int64
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
from longer.serving.pending import Pending
from longer.serving.room import BATCH_USERS
from longer.serving.scorer import Scorer, ScoreRequest
from longer.serving.stages import collected_ms, stage
from longer.training_settings import TaskKind

_SCORE = score_column("")

_MOST_CANDIDATES = 200
"""Candidates of a request that are compared, the last of a long list among them."""

_MOST_FOR_SCALE = 1 << 16

_FEWEST_LEFT_OUT = 200
_PART_LEFT_OUT = 0.01
_NOTHING: Mapping[str, Any] = {}

Seed = tuple[int, ...]
"""Of a run's version and a bucket: what is drawn is the same every time, and other rows with the next version."""


@dataclass(frozen=True)
class _Scored:
    """A request to compare, with what the run says of its candidates, by task; or what they may have at most, if left out."""

    check: "OnlineCheck"
    request: ScoreRequest
    offline: dict[str, Float32]
    scales: dict[str, float]
    left_out_C: Int64 | None = None
    """Numbers of the plan's items that the request is about, whose ids are laid out when it is asked."""
    piece: int = 0
    """Pieces of one number, of different users, are asked together."""

    @property
    def num_candidates(self) -> int:
        return len(self.request.item_ids if self.left_out_C is None else self.left_out_C)

    def asked(self) -> ScoreRequest:
        if self.left_out_C is None:
            return self.request
        assert self.check.items
        return replace(self.request, item_ids=self.check.items.item_id_I.take(pa.array(self.left_out_C)))


@dataclass
class OnlineCheck:
    """What of a bucket is compared: requests `numbers` of it, noted as they come; keeps the largest difference."""

    plan: Plan
    scorer: Scorer | None
    """None where there is no serving path: `numbers` are then none."""
    items: Items | None
    numbers: Int64
    most_candidates: int
    seed: Seed
    num_left_out: int = _FEWEST_LEFT_OUT
    max_abs_diff: float = 0.0
    num_compared: int = 0
    _num_seen: int = 0
    _scored: list[_Scored] = field(default_factory=list)
    _vectors: list[tuple[Pending, Float32]] = field(default_factory=list)

    @property
    def num_candidates(self) -> int:
        """Of what is noted so far."""
        return sum(scored.num_candidates for scored in self._scored)

    def see(self, chunk: Chunk, rows: pa.Table) -> None:
        """Notes those of the chunk's rows that are chosen."""
        here = self.numbers[(self.numbers >= chunk.first) & (self.numbers < chunk.first + len(rows))] - chunk.first
        if not len(here):
            return
        self._num_seen += len(here)
        with stage("check"):
            if self.plan.kind == "vectors":
                self._vectors += [
                    (_pending(chunk, r), np.array(rows["vector"][r].as_py(), np.float32)) for r in here.tolist()
                ]
            else:
                self._note_scores(chunk, here, rows)

    def _note_scores(self, chunk: Chunk, here: Int64, rows: pa.Table) -> None:
        tasks = [name.removeprefix(_SCORE) for name in rows.column_names if name.startswith(_SCORE)]
        scales = {task: self._scale(_flat(rows[score_column(task)]), task) for task in tasks}
        for r in here.tolist():
            ids = single_array(rows["item_id"].slice(r, 1)).flatten()
            if not len(ids):
                continue
            some = chosen_numbers(len(ids), _MOST_CANDIDATES, (*self.seed, chunk.first + r))
            features = ({}, {}) if chunk.rows is None else self._features(chunk.rows.slice(r, 1), some)
            offline = {task: np.array(rows[score_column(task)][r].as_py(), np.float32) for task in tasks}
            of_some = {task: scores[some] for task, scores in offline.items()}
            self._scored.append(_Scored(self, _request(chunk, r, ids.take(pa.array(some)), *features), of_some, scales))
            if self.plan.top_k and self.items:
                self._note_left_out(chunk, r, rows, offline[tasks[0]][-1], {tasks[0]: scales[tasks[0]]})

    def _note_left_out(self, chunk: Chunk, r: int, rows: pa.Table, last: np.float32, scales: dict[str, float]) -> None:
        """Items that are not among a user's best, drawn for this row: they score no more than the last that is."""
        assert self.items
        all_ids, [task] = self.items.item_id_I, scales
        drawn = np.random.default_rng((*self.seed, chunk.first + r))
        chosen = drawn.choice(len(all_ids), min(len(all_ids), self.num_left_out), replace=False, shuffle=False)
        is_best_I = pc.is_in(all_ids, single_array(rows["item_id"].slice(r, 1)).flatten())
        others = chosen[~is_best_I.to_numpy(zero_copy_only=False)[chosen]]
        size = max(1, self.most_candidates // len(self.numbers))
        for piece, begin in enumerate(range(0, len(others), size)):
            some = others[begin : begin + size]
            at_most = {task: np.full(len(some), last)}
            self._scored.append(_Scored(self, _request(chunk, r, []), at_most, scales, some, piece))

    def _features(self, request: pa.Table, some: Int64) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Of some of its items, and its own."""
        of_items, own = (
            {name: request[name][0].as_py() for name in self.plan.schema.features_of(of)} for of in ("item", "request")
        )
        return {name: [values[i] for i in some] for name, values in of_items.items()}, own

    def _scale(self, scores_C: Float32, task: str) -> float:
        """Of so many of a chunk's scores, drawn, that more would not tell it better."""
        if len(scores_C) > _MOST_FOR_SCALE:
            scores_C = scores_C[np.random.default_rng(self.seed).integers(len(scores_C), size=_MOST_FOR_SCALE)]
        return typical_size(scores_C, self._kind(task))

    def _kind(self, task: str) -> TaskKind:
        assert self.scorer
        return next(known.kind for known in self.scorer.model.tasks if known.name == task)

    def _note(
        self, online: np.ndarray, offline: np.ndarray, kind: TaskKind, what: str, scale: float | None = None
    ) -> None:
        self.max_abs_diff = max(self.max_abs_diff, float(absolute_gaps(online, offline).max()))
        most = most_difference(self.plan.precision)
        check_gaps(online, offline, kind, what, "the offline and the serving path", scale, most)


def compare(checks: Sequence[OnlineCheck]) -> None:
    """Compares what buckets of one actor have noted; ArithmeticError if the serving path answers any of it otherwise than its row
    says, or a request was never seen.

    All is asked together, as a replica answers a batch: of `most_candidates` at most or one request.
    """
    for check in checks:
        if check._num_seen != len(check.numbers):
            raise ArithmeticError(
                f"{len(check.numbers)} requests were to be compared, {check._num_seen} of them were met"
            )
    vectors = [(check, *noted) for check in checks for noted in check._vectors]
    with stage("check"), collected_ms():  # the serving path's own stages are not the bucket's
        for begin in range(0, len(vectors), BATCH_USERS):
            _compare_vectors(vectors[begin : begin + BATCH_USERS])
        for together in _batches(checks):
            _compare_scores(together)


def _batches(checks: Sequence[OnlineCheck]) -> Iterator[list[_Scored]]:
    """Rows first, then pieces of what was left out."""
    together: list[_Scored] = []
    num_candidates = 0
    all_scored = [scored for check in checks for scored in check._scored]
    for scored in sorted(all_scored, key=lambda scored: (scored.left_out_C is not None, scored.piece)):
        num_candidates += scored.num_candidates
        if together and num_candidates > scored.check.most_candidates:
            yield together
            together, num_candidates = [], scored.num_candidates
        together.append(scored)
    if together:
        yield together


def _compare_scores(together: list[_Scored]) -> None:
    scorer = together[0].check.scorer
    assert scorer
    for scored, result in zip(together, scorer.score([scored.asked() for scored in together]), strict=True):
        if isinstance(result, UserError):
            raise result
        check = scored.check
        for task, offline in scored.offline.items():
            online = result.scores[task]
            if scored.left_out_C is not None:
                online = np.maximum(online, offline)
            check._note(online, offline, check._kind(task), f"scores of {task}", scored.scales[task])
        check.num_compared += scored.left_out_C is None


def _compare_vectors(together: list[tuple[OnlineCheck, Pending, Float32]]) -> None:
    scorer = together[0][0].scorer
    assert scorer
    online_BD = _online_vectors(scorer, [asked for _, asked, _ in together])
    for online, (check, _, offline) in zip(online_BD, together, strict=True):
        check._note(online, offline, "regression", "a user's vectors")
        check.num_compared += 1


@torch.inference_mode()
@plainly()
def _online_vectors(scorer: Scorer, asked: list[Pending]) -> np.ndarray:
    """[B, D]: the users' own tokens, made from the states that the serving path has of them at the times of the requests."""
    model = scorer.model
    try:
        scorer.states.resolve(asked)
        for request in asked:
            if request.error:
                raise request.error
        states = [request.state for request in asked if request.state]
        together = gather(model, scorer.cache.pool, states)
        partial = Histories.concatenate([state.partial for state in states])
        events = event_tensors(partial, model.norm_head.weight.device)
        row_B = torch.arange(len(states), device=events.user_key_B.device)
        groups = model.partial_groups(events, model.embedding.events(events), row_B, together.num_events_B)
        partial_BD = model.embedding.groups(*groups)
        tail = model.tail_of_groups(together.context, row_B, together.num_events_B, events.user_key_B, partial_BD)
    finally:
        scorer.cache.release()
    assert tail.x_RTD is not None
    return tail.x_RTD[:, -1].double().cpu().numpy()


def _pending(chunk: Chunk, r: int) -> Pending:
    user_id = chunk.user_id_R.slice(r, 1)
    return Pending(user_id, int(stable_keys(user_id)[0]), int(chunk.questions.request_ts_R[r]), None)


def _request(
    chunk: Chunk,
    r: int,
    ids: list[Any] | pa.Array,
    item_features: Mapping[str, list[Any]] = _NOTHING,
    request_features: Mapping[str, Any] = _NOTHING,
) -> ScoreRequest:
    user_id, request_ts = chunk.user_id_R[r].as_py(), int(chunk.questions.request_ts_R[r])
    return ScoreRequest(user_id, ids, item_features, request_ts, request_features=request_features)


def chosen_numbers(num: int, num_chosen: int, seed: Seed) -> Int64:
    """Numbers below `num`, ascending, drawn by the seed; the last is one of them, where more than one is drawn."""
    if num <= num_chosen:
        return np.arange(num)
    rng = np.random.default_rng(seed)
    if num_chosen < 2:
        return rng.choice(num, num_chosen)
    return np.append(np.sort(rng.choice(num - 1, num_chosen - 1, replace=False)), num - 1)


def num_left_out(num_requests: int, num_items: int, num_chosen: int) -> int:
    """Items of each chosen user's catalogue that are scored to see that none of them belongs among the best.

    Together a hundredth of the pairs of user and item that the bucket scores, or all items of each. Where m pairs that belong among
    the best are missing, alike for all users, a run meets about m / 100, however large the catalogue, and so misses all of them
    with a probability of e^(-m/100): a part f of the items lost for N users is m = f * top_k * N. That needs buckets of at most
    100 users for each that is chosen; and what is missing for a few users only is met only if one of them is chosen.
    """
    a_user = _PART_LEFT_OUT * num_requests * num_items / max(1, num_chosen)
    return min(num_items, max(_FEWEST_LEFT_OUT, round(a_user)))


def _flat(lists: pa.ChunkedArray) -> Float32:
    return flat_list(lists)[1].to_numpy()
