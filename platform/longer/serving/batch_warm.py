"""What an actor on a GPU does before its first bucket: kernels are compiled and sizes tried on users that nobody has.

Compiling takes the better part of a minute in each process, and would otherwise be counted, and felt, as scoring.
"""

import numpy as np
import torch

from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.model.ranker import Ranker
from longer.schema import EventSchema
from longer.serving.batch_answers import computing_in
from longer.serving.offline import Budget, Questions, score_lists
from longer.serving.scorer import Scorer

_NUM_USERS = 3
_NUM_CANDIDATES = 80
_NOW = 1_700_000_000_000


def warm_up(model: Ranker, budget: Budget, precision: str, scorer: Scorer | None) -> None:
    """Users of full windows, asked before and after their windows move; on a CPU, where nothing is compiled, nothing."""
    if not model.norm_head.weight.is_cuda:
        return
    windows, schema = model.windows, model.schema
    ends = windows.max_history_events + windows.stride_events * np.arange(1, 4) + 1
    num_events, num_asked = int(ends[-1]), _NUM_USERS * len(ends)
    keys, numeric = ["item_id", "action", *schema.of_kind("categorical")], schema.of_kind("numeric")
    histories = Histories(
        user_key_B=np.arange(1, _NUM_USERS + 1),
        offsets_B1=np.arange(_NUM_USERS + 1) * num_events,
        first_index_B=np.zeros(_NUM_USERS, np.int64),
        prev_event_ts_B=np.full(_NUM_USERS, NO_EVENT_TS, np.int64),
        event_ts_E=np.tile(_NOW + 1000 * np.arange(num_events), _NUM_USERS),
        features=_features(keys, numeric, num_events * _NUM_USERS),
    )
    row_R, request_ts_R = np.repeat(np.arange(_NUM_USERS), len(ends)), np.full(num_asked, 2 * _NOW)
    questions = Questions(histories, row_R, np.tile(ends, _NUM_USERS), request_ts_R)
    with computing_in(precision, "cuda"):
        score_lists(questions, _candidates(schema, num_asked), budget)
    if scorer:
        for call in scorer.warm_ups(1, _NUM_CANDIDATES):
            call()
    torch.cuda.synchronize()


def _candidates(schema: EventSchema, num_requests: int) -> Candidates:
    keys, numeric = ["item_id", *schema.features_of("item", "categorical")], schema.features_of("item", "numeric")
    features = _features(keys, numeric, num_requests * _NUM_CANDIDATES)
    return Candidates(np.arange(num_requests + 1) * _NUM_CANDIDATES, features)


def _features(keys: list[str], numeric: tuple[str, ...], size: int) -> dict[str, np.ndarray]:
    numbers = np.arange(size)
    return dict.fromkeys(keys, numbers) | {name: numbers.astype(np.float32) for name in numeric}
