"""Random histories, requests and small models for the model's tests."""

import numpy as np
import pyarrow as pa
import torch

from longer.arrays import NO_EVENT_TS, Candidates, Histories, RequestBatch
from longer.hashing import stable_keys
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.ranker import Ranker
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import UserState, encode, rows_for
from longer.model_settings import ModelSettings
from longer.schema import EventSchema, Feature
from longer.slots import Slot
from longer.training_settings import TaskSettings

SCHEMA = EventSchema(
    features=(
        Feature(name="category", kind="categorical", of="item"),
        Feature(name="weight", kind="numeric", of="item"),
        Feature(name="shop", kind="categorical", of="event"),
        Feature(name="price", kind="numeric", of="event"),
    ),
    tasks=("click", "minutes"),
)
TASKS = (TaskSettings(name="click"), TaskSettings(name="minutes", kind="regression"))
SIZES: dict = {
    "history_events": 24,
    "merge_size": 3,
    "event_width": 4,
    "query_groups": 4,
    "stride_groups": 2,
    "num_heads": 2,
    "num_self_layers": 2,
    "num_cls_tokens": 2,
    "item_rows": 31,
    "user_rows": 13,
    "categorical_rows": 11,
    "count_events": (2, 5),
}


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: object) -> Longer:
    """Small, but with every part switched on and with weights large enough that every part shows in the output."""
    torch.manual_seed(seed)
    model = Longer(ModelSettings(**{**SIZES, **sizes}), SCHEMA, TASKS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def random_histories(rng: np.random.Generator, lengths: list[int], num_items: int = 20) -> Histories:
    """Users with all their events from event 0, ties in time included."""
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gaps = rng.choice([0, 1, 900, 60_000, 86_400_000], size=total)
    times = np.concatenate([[0], np.cumsum(gaps)])[1:] + 1_500_000_000_000
    return Histories(
        user_key_B=rng.integers(1, 2**62, len(lengths)),
        offsets_B1=offsets,
        first_index_B=np.zeros(len(lengths), np.int64),
        prev_event_ts_B=np.full(len(lengths), NO_EVENT_TS),
        event_ts_E=times.astype(np.int64),
        features=random_features(rng, total, num_items, ("item_id", "category", "action", "shop"), ("weight", "price")),
    )


def random_features(rng: np.random.Generator, n: int, num_items: int, keys: tuple, numbers: tuple) -> dict:
    """Keys as hashing gives them (0 stands for a missing value), from few items, so that they recur."""
    keys_of_items = np.append(0, stable_keys(pa.array(range(1, num_items))))
    return {name: keys_of_items[rng.integers(0, num_items, n)] for name in keys} | {
        name: rng.normal(size=n).astype(np.float32) for name in numbers
    }


def random_candidates(rng: np.random.Generator, counts: list[int], num_items: int = 20) -> Candidates:
    return Candidates(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        random_features(rng, sum(counts), num_items, ("item_id", "category"), ("weight",)),
    )


def one_request_a_row(
    model: Ranker, histories: Histories, request_ts: np.ndarray, candidates: Candidates
) -> RequestBatch:
    """A batch in which each user is asked about at the end of the history, with the window cut as the data room cuts it."""
    end = histories.end_index_B
    rows = np.arange(len(histories))
    start = model.windows.history_start(end) * model.windows.merge_size
    return RequestBatch(
        histories.slice_events(rows, np.maximum(start, histories.first_index_B), end),
        rows,
        end,
        request_ts,
        candidates,
        rows,
    )


def request_batch(model: Longer, seed: int, lengths: list[int]) -> RequestBatch:
    """Users of these lengths, the last one asked three times at ends whose windows start alike."""
    rng = np.random.default_rng(seed)
    histories = random_histories(rng, [*lengths, 1])
    ends = histories.end_index_B
    batch = one_request_a_row(model, histories, ends * 0 + 2_000_000_000_000, random_candidates(rng, [0] * len(ends)))
    windows, last = model.windows, int(ends[-2])
    alike = [
        e
        for e in range(last + 1)
        if (windows.query_start(e), windows.history_start(e))
        == (windows.query_start(last), windows.history_start(last))
    ]
    asked = np.sort(rng.choice(alike, size=2))
    rows = np.arange(len(ends))
    row_R = np.concatenate([rows[:-1], rows[[-2, -2]], rows[-1:]])
    end_R = np.concatenate([ends[:-2], asked, ends[-2:]])
    candidates = random_candidates(rng, rng.integers(0, 40, len(row_R)).tolist())
    labels = {"click": rng.integers(0, 2, len(candidates.features["item_id"])).astype(np.float32)}
    return RequestBatch(
        batch.histories, row_R, end_R, np.full(len(row_R), 2_000_000_000_000), candidates, row_R, labels
    )


def pool_for(model: Longer, num_users: int, precision: Precision | None = None) -> StatePool:
    """Room for so many users' longest states, and as much again; kept in the model's own type if none is told."""
    own: Precision = "float64" if model.norm_head.weight.dtype == torch.float64 else "float32"
    layout = StateLayout.of(model, precision or own)
    num_bytes = 2 * num_users * layout.largest_rows * layout.row_bytes
    return StatePool(layout, num_bytes + 12 * 2 * layout.largest_rows * layout.row_bytes, model.norm_head.weight.device)


def slots_for(pool: StatePool, end_index_B: np.ndarray) -> list[Slot]:
    """Slots that hold states of users with so many events, full of what an earlier state might have left there."""
    slots = []
    for num_rows in rows_for(pool.layout, end_index_B):
        slot = pool.slots.allocate(int(num_rows))
        assert slot
        pool.words_NI[slot.start : slot.start + slot.size] = -1
        slots.append(slot)
    return slots


def encoded(model: Longer, pool: StatePool, histories: Histories) -> list[UserState]:
    return encode(model, pool, histories, slots_for(pool, histories.end_index_B))
