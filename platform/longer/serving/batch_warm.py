"""What an actor on a GPU does before its first bucket: kernels are compiled and sizes tried on users that nobody has.

Compiling takes many seconds, and would otherwise be counted, and felt, as scoring. One actor of a machine compiles; the others wait
and read what it has. Kernels of packs serve any sizes; those of a sweep any but one user, which has kernels of its own. Few runs
sweep lists of requests; those compile when the first bucket needs it, in turn as well: the stage `compile` of that bucket.

B users, E events of all of them, R requests, C candidates in all requests, I items, T tasks.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.model.ranker import Ranker
from longer.schema import EventSchema
from longer.serving.batch_answers import Answers, computing_in
from longer.serving.batch_input import Chunk, Items
from longer.serving.batch_output import Run
from longer.serving.batch_turns import first_alone
from longer.serving.offline import score_lists, score_swept
from longer.serving.questions import Questions
from longer.serving.scorer import Scorer
from longer.serving.stages import collected_ms, stage

_NUM_USERS, _NUM_REQUESTS = 3, 40
"""Users, and requests of each in a window: enough for attention's tallest tiles."""
_NUM_CANDIDATES = 80
_MOST_ITEMS = 4096
_NOW = 1_700_000_000_000


def warm_up(answers: Answers, scorer: Scorer | None, run: Run) -> None:
    """Users of full windows, asked what the plan asks; on a CPU, where nothing is compiled, nothing."""
    if not answers.budget.model.norm_head.weight.is_cuda:
        return
    with first_alone("warm-up", run.id):
        rehearse(answers)
        if scorer:
            for call in scorer.warm_ups(1, _NUM_CANDIDATES):
                call()
        torch.cuda.synchronize()


class FirstSweep:
    """To be called before lists of requests are swept: the first time, on a GPU, kernels for that are compiled."""

    def __init__(self, answers: Answers, run: Run) -> None:
        self._answers, self._run = answers, run
        self._is_over = not answers.budget.model.norm_head.weight.is_cuda

    def __call__(self) -> None:
        if self._is_over:
            return
        model = self._answers.budget.model
        with stage("compile"), collected_ms(), first_alone("sweep", self._run.id):
            for num_users in (_NUM_USERS, 1):
                questions = _questions(model, num_users, _NUM_REQUESTS, num_windows=2)
                candidates = _candidates(model.schema, len(questions))
                outputs_CT = np.empty((len(questions) * _NUM_CANDIDATES, len(model.tasks)), np.float32)
                score_swept(questions, candidates, self._answers.budget, outputs_CT)
        self._is_over = True


def rehearse(answers: Answers) -> None:
    """Lists of their own, before and after windows move; or, once a user, the first of the plan's items, or vectors."""
    if answers.plan.kind == "requests":
        _score_lists(answers)
        return
    some = _with_some_items(answers)
    for num_users in (_NUM_USERS, 1):
        questions = _questions(answers.budget.model, num_users, 1, num_windows=1)
        nobody = pa.nulls(len(questions), answers.plan.schema.id_types[0])
        some.rows(Chunk(0, questions, nobody))


@torch.inference_mode()
def _score_lists(answers: Answers) -> None:
    model = answers.budget.model
    with computing_in(answers.plan.precision, answers.plan.device):
        questions = _questions(model, _NUM_USERS, _NUM_REQUESTS, num_windows=2)
        score_lists(questions, _candidates(model.schema, len(questions)), answers.budget)


def _with_some_items(answers: Answers) -> Answers:
    """Of a large catalogue, a block that takes no time."""
    if answers.items is None:
        return answers
    of_some = {name: values[:_MOST_ITEMS] for name, values in answers.items.features.items()}
    items = Items(answers.items.item_id_I[:_MOST_ITEMS], of_some)
    on_device = {name: values[:_MOST_ITEMS] for name, values in answers.item_features.items()}
    return replace(answers, items=items, item_features=on_device)


def _questions(model: Ranker, num_users: int, num_requests: int, num_windows: int) -> Questions:
    """So many requests of each user in each window, inside of groups."""
    windows, schema = model.windows, model.schema
    begins = windows.max_history_events + windows.stride_events * np.arange(1, num_windows + 1)
    ends = (begins[:, None] + np.arange(1, num_requests + 1)).ravel()
    num_events = int(ends[-1])
    keys, numeric = ["item_id", "action", *schema.of_history("categorical")], schema.of_history("numeric")
    histories = Histories(
        user_key_B=np.arange(1, num_users + 1),
        offsets_B1=np.arange(num_users + 1) * num_events,
        first_index_B=np.zeros(num_users, np.int64),
        prev_event_ts_B=np.full(num_users, NO_EVENT_TS, np.int64),
        event_ts_E=np.tile(_NOW + 1000 * np.arange(num_events), num_users),
        features=_features(keys, numeric, num_events * num_users),
    )
    row_R = np.repeat(np.arange(num_users), len(ends))
    return Questions(histories, row_R, np.tile(ends, num_users), np.full(len(row_R), 2 * _NOW))


def _candidates(schema: EventSchema, num_requests: int) -> Candidates:
    keys, numeric = ["item_id", *schema.of_candidates("categorical")], schema.of_candidates("numeric")
    features = _features(keys, numeric, num_requests * _NUM_CANDIDATES)
    return Candidates(np.arange(num_requests + 1) * _NUM_CANDIDATES, features)


def _features(keys: list[str], numeric: tuple[str, ...], size: int) -> dict[str, np.ndarray]:
    numbers = np.arange(size)
    return dict.fromkeys(keys, numbers) | {name: numbers.astype(np.float32) for name in numeric}
