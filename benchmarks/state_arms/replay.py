"""The same requests through the scorer with a cache of states and without one, from a published sequence table.

What a replica does but for HTTP: values as sent, the table's reads, states, scores as NumPy. Users ask as often as the generated
log's are active (Zipf, exponent 0.8), in batches of different users; each brings the events that she has done since.

On a CPU, whose speed drifts with other work, all budgets take turns at every batch; on a card each has it to itself.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.model_arms.sizes import DEVICE, NOW, ON_CUDA, TASKS
from benchmarks.state_arms.users import spread
from longer.data.sequences import KeepRule
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.model.longer import Longer
from longer.model.state_layout import Precision, StateLayout
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.serving.scorer import Scorer, ScoreRequest
from longer.serving.stages import collected_ms
from longer.storage import Version
from longer.table_settings import GenerateSettings, SequenceSettings
from longer.training.checkpoints import save_weights, weights_of
from tests.data.tables import publish_sequences

Row = dict[str, Any]

SCHEMA = EventSchema()
NUM_CANDIDATES = 500
NUM_NEW = 8
NUM_USERS, BATCH = (512, 32) if ON_CUDA else (128, 8)
"""The smallest budget holds some batches: with fewer states than a batch has users, every hit would be evicted by its own batch."""
_NUM_WARM, _NUM_COUNTED = (32, 16) if ON_CUDA else (32, 40)
_STAGES = ("history", "encode", "append")
_NUM_PARTS = 4
"""Of the counted batches, so that a ratio of two arms has a spread."""
_NUM_ITEMS = 100_000
_NUM_BUCKETS = 4
_ZIPF_EXPONENT = GenerateSettings().user_zipf_exponent
_ARMS = ((0.0, NUM_NEW), (0.2, NUM_NEW), (0.5, NUM_NEW), (1.0, NUM_NEW), (1.0, 0))
"""Budget as a share of all users' states, and the events that a request brings."""
_TOGETHER = 1 if ON_CUDA else len(_ARMS)


@dataclass(frozen=True)
class _Asked:
    """A batch of requests, told by numbers."""

    users: Sequence[int]
    item_ids: np.ndarray
    new_items: np.ndarray


def rows_of(settings: ModelSettings, precision: Precision) -> Iterator[Row]:
    """Reads of one history, then the replay at every budget."""
    settings = settings.model_copy(update={"item_rows": _NUM_ITEMS})
    size = {"width": settings.width, "L": settings.history_events, "users": BATCH, "candidates": NUM_CANDIDATES}
    with tempfile.TemporaryDirectory() as root:
        sequences = _publish(f"{root}/sequences", settings)
        model = Longer(settings, SCHEMA, TASKS)
        save_weights(f"{root}/model", weights_of(model), settings, SCHEMA, TASKS)
        yield size | {"users": 1, "arm": "read"} | _read(sequences.table_path)
        layout = StateLayout.of(model, precision)
        all_bytes = NUM_USERS * layout.largest_rows * layout.row_bytes

        def replay_of(share: float, num_new: int) -> _Replay:
            budget_bytes = round(share * all_bytes)
            scorer = Scorer(
                f"{root}/model", sequences.table_path, budget_bytes, device=DEVICE.type, state_precision=precision
            )
            return _Replay(share, num_new, scorer)

        for first in range(0, len(_ARMS), _TOGETHER):
            replays = [replay_of(*arm) for arm in _ARMS[first : first + _TOGETHER]]
            for number, asked in enumerate(_batches()):
                turn = number % len(replays)
                for one in replays[turn:] + replays[:turn]:
                    one.answer(number, asked)
            yield from (size | one.row() for one in replays)


def _publish(path: str, settings: ModelSettings) -> Version:
    """Every user's history is as long as the table keeps them; the newest event is half an hour old."""
    windows, rng = settings.windows, np.random.default_rng(0)
    length = windows.max_history_events
    total = NUM_USERS * length
    event_ts = NOW + np.sort(rng.integers(-(10**9), 0, (NUM_USERS, length)), axis=1)
    columns = {
        "user_id": np.repeat(np.arange(1, NUM_USERS + 1), length),
        "item_id": rng.zipf(1.2, total) % _NUM_ITEMS + 1,
        "event_ts": event_ts.ravel(),
        "action": pa.DictionaryArray.from_arrays(pa.array(rng.integers(0, 2, total)), ["view", "click"]).cast(
            pa.string()
        ),
    }
    events = pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in SCHEMA.events_arrow()})
    rule = KeepRule(length, windows.stride_events)
    return publish_sequences(path, events, SCHEMA, rule, _NUM_BUCKETS, SequenceSettings().row_group_events)


def _read(path: str) -> dict[str, float]:
    """One user after the other through `SequenceTable.get`, which serving reads by; footers were read before."""
    table, values_ms = SequenceTable(path, SCHEMA), []
    table.get(range(1, NUM_USERS + 1))
    for user in range(1, NUM_USERS + 1):
        started = time.perf_counter()
        histories = table.get([user])
        values_ms.append(1e3 * (time.perf_counter() - started))
        if not histories.offsets_B1[-1]:
            raise AssertionError(f"user {user} came back without a history")
    return spread(values_ms)


def _batches() -> Iterator[_Asked]:
    rng = np.random.default_rng(1)
    share_U = np.arange(1.0, NUM_USERS + 1) ** -_ZIPF_EXPONENT
    for _ in range(_NUM_WARM + _NUM_COUNTED):
        users = 1 + rng.choice(NUM_USERS, BATCH, replace=False, p=share_U / share_U.sum())
        items = rng.integers(1, _NUM_ITEMS + 1, (BATCH, NUM_CANDIDATES))
        yield _Asked(users.tolist(), items, rng.integers(1, _NUM_ITEMS + 1, (BATCH, NUM_NEW)))


class _Replay:
    """One arm, and the milliseconds that its counted batches took, in all and by stage."""

    def __init__(self, budget_share: float, num_new: int, scorer: Scorer) -> None:
        self._arm = {"arm": "replay", "budget_share": budget_share, "new_events": num_new}
        self._num_new, self._scorer = num_new, scorer
        self._whole_ms, self._stages_ms, self._before = list[float](), list[dict[str, float]](), dict[str, int]()
        for call in scorer.warm_ups(BATCH, NUM_CANDIDATES):  # as a replica before it is ready
            call()

    def answer(self, number: int, asked: _Asked) -> None:
        if number == _NUM_WARM:
            self._before = self._scorer.cache.counters.as_dict()
        now = NOW + 1_000 * (number + 1)
        requests = [
            ScoreRequest(user, pa.array(items), request_ts=now, events=_events(new[: self._num_new], now))
            for user, items, new in zip(asked.users, asked.item_ids, asked.new_items, strict=True)
        ]
        started = time.perf_counter()
        with collected_ms() as stages_ms:
            outcomes = self._scorer.score(requests)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        if failed := [outcome for outcome in outcomes if isinstance(outcome, UserError)]:
            raise failed[0]
        if number >= _NUM_WARM:
            self._whole_ms.append(elapsed_ms)
            self._stages_ms.append(stages_ms)

    def row(self) -> Row:
        counts = self._scorer.cache.counters.as_dict()
        num_requests = BATCH * _NUM_COUNTED
        whole_ms = np.array(self._whole_ms)
        by_stage_ms = {name: np.array([stages_ms.get(name, 0.0) for stages_ms in self._stages_ms]) for name in _STAGES}
        by_stage_ms["rest"] = whole_ms - sum(by_stage_ms.values())
        parts = {
            "requests_per_s": whole_ms.reshape(_NUM_PARTS, -1).sum(1),
            "requests_per_s_without_reads": (whole_ms - by_stage_ms["history"]).reshape(_NUM_PARTS, -1).sum(1),
        }
        return {
            **self._arm,
            **spread(self._whole_ms),
            **{name: (counts[name] - self._before[name]) / num_requests for name in ("hit", "append", "load")},
            **{name: 1e3 * num_requests / float(part_ms.sum()) for name, part_ms in parts.items()},
            "stages_ms": {name: float(each_ms.mean()) for name, each_ms in by_stage_ms.items()},
            "parts": {name: (1e3 * num_requests / _NUM_PARTS / part_ms).tolist() for name, part_ms in parts.items()},
        }


def _events(items: np.ndarray, now: int) -> dict[str, pa.Array]:
    """The user's newest events, just before `now`."""
    if not len(items):
        return {}
    times = pa.array(now - len(items) + np.arange(len(items)))
    return {"item_id": pa.array(items), "event_ts": times, "action": pa.array(["view"] * len(items))}
