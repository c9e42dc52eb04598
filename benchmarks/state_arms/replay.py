"""The same requests through the scorer with a cache of states and without one, from a published sequence table.

What a replica does but for HTTP: values as sent, the table's reads, states, scores as NumPy. Users ask as often as the generated
log's are active (Zipf, exponent 0.8), in batches of different users; each brings the events that she has done since.
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
from longer.training.checkpoints import save_model
from tests.data.tables import publish_sequences

Row = dict[str, Any]

SCHEMA = EventSchema()
NUM_CANDIDATES = 500
NUM_NEW = 8
NUM_USERS, BATCH = (128, 32) if ON_CUDA else (32, 8)
_NUM_WARM, _NUM_COUNTED = (8, 12) if ON_CUDA else (8, 4)
_NUM_ITEMS = 100_000
_NUM_BUCKETS = 4
_ZIPF_EXPONENT = GenerateSettings().user_zipf_exponent
_ARMS = ((0.0, NUM_NEW), (0.2, NUM_NEW), (0.5, NUM_NEW), (1.0, NUM_NEW), (1.0, 0))
"""Budget as a share of all users' states, and the events that a request brings."""


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
        save_model(f"{root}/model", model, settings, SCHEMA, TASKS)
        yield size | {"users": 1, "arm": "read"} | _read(sequences.table_path)
        layout = StateLayout.of(model, precision)
        all_bytes = NUM_USERS * layout.largest_rows * layout.row_bytes
        for share, num_new in _ARMS:
            budget_bytes = round(share * all_bytes)
            scorer = Scorer(
                f"{root}/model", sequences.table_path, budget_bytes, device=DEVICE.type, state_precision=precision
            )
            yield size | {"arm": "replay", "budget_share": share, "new_events": num_new} | _replay(scorer, num_new)


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


def _replay(scorer: Scorer, num_new: int) -> dict[str, Any]:
    for call in scorer.warm_ups(BATCH, NUM_CANDIDATES):  # as a replica before it is ready
        call()
    whole_ms, history_ms, before = [], [], dict[str, int]()
    for number, asked in enumerate(_batches()):
        if number == _NUM_WARM:
            before = scorer.cache.counters.as_dict()
        now = NOW + 1_000 * (number + 1)
        requests = [
            ScoreRequest(user, pa.array(items), request_ts=now, events=_events(new[:num_new], now))
            for user, items, new in zip(asked.users, asked.item_ids, asked.new_items, strict=True)
        ]
        started = time.perf_counter()
        with collected_ms() as stages_ms:
            outcomes = scorer.score(requests)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        if failed := [outcome for outcome in outcomes if isinstance(outcome, UserError)]:
            raise failed[0]
        if number >= _NUM_WARM:
            whole_ms.append(elapsed_ms)
            history_ms.append(stages_ms.get("history", 0.0))
    counts = {name: count - before[name] for name, count in scorer.cache.counters.as_dict().items()}
    num_requests = BATCH * _NUM_COUNTED
    computed_ms = sum(whole_ms) - sum(history_ms)
    return {
        **spread(whole_ms),
        **{name: counts[name] / num_requests for name in ("hit", "append", "load")},
        "requests_per_s": 1e3 * num_requests / sum(whole_ms),
        "requests_per_s_without_reads": 1e3 * num_requests / computed_ms,
    }


def _events(items: np.ndarray, now: int) -> dict[str, pa.Array]:
    """The user's newest events, just before `now`."""
    if not len(items):
        return {}
    times = pa.array(now - len(items) + np.arange(len(items)))
    return {"item_id": pa.array(items), "event_ts": times, "action": pa.array(["view"] * len(items))}
