"""The three logs of the study as splits in memory, without Ray: from a sequence table, a package's files, or the generator.

- journey: the requests that `jobs.build_requests` makes of the same table, by the same kernels and seed;
- movielens: every rating is a request about one film; its label is a like, four stars or more. No negative is drawn;
- generated: the log of `longer.datasets.generator`; some of the events are asked about, each beside drawn ones of its split.

U users, E events, R requests, C candidates.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from benchmarks.quality_study.movielens import read_ratings
from longer.arrays import NO_EVENT_TS, Candidates, Histories, Int64
from longer.data.batches import Requests
from longer.data.columns import histories_of, requests_of, single_array
from longer.data.requests import (
    SPLITS,
    draw_negatives,
    find_groups,
    merge_catalogues,
    partial_catalogue,
    request_rows,
    split_times,
)
from longer.data.tables import SequenceTable
from longer.datasets.generator import Chunk, chunks, generate
from longer.hashing import stable_keys
from longer.schema import EventSchema, Feature
from longer.table_settings import GenerateSettings, RequestSettings
from longer.training.loader import SplitData
from longer.windows import WindowRule

SCHEMAS = {
    "journey": EventSchema(
        group_id="basket_id",
        features=(
            Feature(name="category", kind="categorical", of="item"),
            Feature(name="department", kind="categorical", of="item"),
            Feature(name="quantity", kind="numeric", of="event"),
            Feature(name="sales_value", kind="numeric", of="event"),
        ),
    ),
    "movielens": EventSchema(
        features=(
            Feature(name="genres", kind="categorical", of="item"),
            Feature(name="rating", kind="numeric", of="event"),
        )
    ),
    "generated": EventSchema(features=(Feature(name="category", kind="categorical", of="item"),)),
}
_LIKE_FROM = 4.0
_MS_PER_DAY = 86_400_000
_GENERATED_VALID_DAYS, _GENERATED_TEST_DAYS = 2, 6
_REQUESTS_PER_ANCHOR = 8
_NEGATIVES = 4


@dataclass(frozen=True)
class Log:
    """All users' whole histories, and the requests of each split."""

    name: str
    schema: EventSchema
    histories: Histories
    requests: dict[str, Requests]
    row_R: dict[str, Int64]
    valid_from_ms: int
    """Where training ends."""

    def split(self, name: str, windows: WindowRule) -> SplitData:
        return SplitData(self.histories, self.requests[name], self.row_R[name], windows)


def read_log(name: str, root: str, seed: int = 0, sizes: GenerateSettings | None = None) -> Log:
    """A log by its name; `root` holds journey's tables/sequences or MovieLens' two files, and is not read for the generated one."""
    if name == "generated":
        return _generated(sizes or GenerateSettings(), seed)
    schema = SCHEMAS[name]
    if name == "movielens":
        rows = read_ratings(root)
        return _likes(rows, histories_of(rows, schema), schema)
    table = SequenceTable(f"{root}/tables/sequences", schema)
    rows = pa.concat_tables([table.rows(bucket) for bucket in table.buckets]).combine_chunks()
    return _purchases(rows, histories_of(rows, schema), schema)


def _purchases(rows: pa.Table, histories: Histories, schema: EventSchema) -> Log:
    asked = RequestSettings()
    times = split_times(
        int(histories.event_ts_E.min()),
        int(histories.event_ts_E.max()),
        asked.validation_days_share,
        asked.test_days_share,
    )
    assert times is not None
    catalogue = merge_catalogues([partial_catalogue(rows, schema, times)], schema)
    groups = find_groups(rows, histories, schema, catalogue)
    split_R = times.split_of(groups.request_ts_R)
    negatives = draw_negatives(groups, split_R, catalogue, asked.negatives_per_positive, seed=0)
    table = request_rows(groups, negatives, single_array(rows["user_id"]), schema, catalogue)
    requests = {name: requests_of(table.filter(pa.array(split_R == i)), schema) for i, name in enumerate(SPLITS)}
    row_R = {name: groups.user_row_R[split_R == i] for i, name in enumerate(SPLITS)}
    return Log("journey", schema, histories, requests, row_R, times.valid_from_ms)


def _likes(rows: pa.Table, histories: Histories, schema: EventSchema) -> Log:
    """Split by time into 80, 10 and 10 percent of the ratings."""
    row_E = np.repeat(np.arange(len(histories)), np.diff(histories.offsets_B1))
    number_E = np.arange(len(row_E)) - histories.offsets_B1[row_E]
    new_time_E = np.ones(len(row_E), bool)
    new_time_E[1:] = (row_E[1:] != row_E[:-1]) | (histories.event_ts_E[1:] != histories.event_ts_E[:-1])
    end_E = number_E[np.maximum.accumulate(np.where(new_time_E, np.arange(len(row_E)), 0))]  # strictly earlier only
    valid_from, test_from = np.quantile(histories.event_ts_E, [0.8, 0.9]).astype(np.int64)
    bounds = {
        "train": (0, valid_from),
        "valid": (valid_from, test_from),
        "test": (test_from, np.iinfo(np.int64).max),
    }
    item_id_E, user_id_U = single_array(rows["item_id"]).flatten(), single_array(rows["user_id"])
    label_E = (histories.features["rating"] >= _LIKE_FROM).astype(np.float32)
    requests, row_R = {}, {}
    for name, (begin, end) in bounds.items():
        chosen = np.flatnonzero((histories.event_ts_E >= begin) & (histories.event_ts_E < end))
        row_R[name] = row_E[chosen]
        features = {key: histories.features[key][chosen] for key in ("item_id", "genres")}
        requests[name] = Requests(
            request_id_R=chosen,
            user_id_R=user_id_U.take(pa.array(row_E[chosen])),
            user_key_R=histories.user_key_B[row_E[chosen]],
            request_ts_R=histories.event_ts_E[chosen],
            history_end_R=end_E[chosen],
            candidates=Candidates(np.arange(len(chosen) + 1), features),
            item_id_C=item_id_E.take(pa.array(chosen)),
            labels={"label": label_E[chosen]},
        )
    return Log("movielens", schema, histories, requests, row_R, int(valid_from))


def _generated(sizes: GenerateSettings, seed: int) -> Log:
    schema = SCHEMAS["generated"]
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        parts = list(pool.map(partial(_chunk, sizes, seed, schema), chunks(sizes)))
    user_E, ts_E, item_E, action_E, category_E = (np.concatenate(each) for each in zip(*parts, strict=True))
    del parts
    by_time = np.argsort(ts_E, kind="stable")  # of parts that are sorted: they are merged
    order = by_time[np.argsort(user_E[by_time], kind="stable")]
    user_E, ts_E, item_E, action_E, category_E = (x[order] for x in (user_E, ts_E, item_E, action_E, category_E))
    user_U, start_U = np.unique(user_E, return_index=True)
    offsets_U1 = np.append(start_U, len(user_E)).astype(np.int64)
    key_of_item = stable_keys(pa.array(np.arange(sizes.num_items + 1)))
    histories = Histories(
        user_key_B=stable_keys(pa.array(user_U.astype(np.int64))),
        offsets_B1=offsets_U1,
        first_index_B=np.zeros(len(user_U), np.int64),
        prev_event_ts_B=np.full(len(user_U), NO_EVENT_TS),
        event_ts_E=ts_E,
        features={"item_id": key_of_item[item_E], "action": action_E, "category": category_E},
    )
    end_ms = int(ts_E.max()) // _MS_PER_DAY * _MS_PER_DAY + _MS_PER_DAY
    test_from = end_ms - _GENERATED_TEST_DAYS * _MS_PER_DAY
    valid_from = test_from - _GENERATED_VALID_DAYS * _MS_PER_DAY
    warm_from = (
        int(ts_E.min()) + (sizes.period_days + sizes.episode_days) * _MS_PER_DAY
    )  # an interest can have returned
    bounds = {"train": (warm_from, valid_from), "valid": (valid_from, test_from), "test": (test_from, end_ms)}
    rng = np.random.default_rng(seed)
    requests, row_R = {}, {}
    for number, (name, (begin, end)) in enumerate(bounds.items()):
        pool_E = np.flatnonzero((ts_E >= begin) & (ts_E < end))
        most = (160_000, 4_000, 16_000)[number]
        chosen = _anchored(rng, pool_E, user_E, most)
        requests[name], row_R[name] = _beside_drawn(rng, histories, item_E, user_U, user_E, chosen, pool_E)
    return Log("generated", schema, histories, requests, row_R, valid_from)


def _chunk(sizes: GenerateSettings, seed: int, schema: EventSchema, chunk: Chunk) -> tuple[np.ndarray, ...]:
    """User, time, item, and keys of action and category of the chunk's events, by time."""
    table = generate(sizes, seed, schema, chunk.day, chunk.first, chunk.end)
    ts_E = table["event_ts"].cast(pa.int64()).to_numpy()
    order = np.argsort(ts_E, kind="stable")
    user_E, item_E = (table[name].to_numpy().astype(np.int32) for name in ("user_id", "item_id"))
    keys = [_keys_of_labels(table[name]) for name in ("action", "category")]
    return tuple(x[order] for x in (user_E, ts_E, item_E, *keys))


def _keys_of_labels(column: pa.ChunkedArray) -> np.ndarray:
    """Hashes the labels, not the rows."""
    labels = column.combine_chunks()
    return stable_keys(labels.dictionary)[labels.indices.to_numpy()]


def _anchored(rng: np.random.Generator, pool_E: Int64, user_E: Int64, most: int) -> Int64:
    """Events of the pool in short runs of one user, so that a run's requests share a history: fewer histories to encode."""
    starts = rng.choice(len(pool_E), min(len(pool_E), most // _REQUESTS_PER_ANCHOR), replace=False)
    runs = pool_E[np.minimum(starts[:, None] + np.arange(_REQUESTS_PER_ANCHOR), len(pool_E) - 1)]
    same_user = user_E[runs] == user_E[runs[:, :1]]
    return np.unique(runs[same_user])


def _beside_drawn(
    rng: np.random.Generator,
    histories: Histories,
    item_E: Int64,
    user_U: Int64,
    user_E: Int64,
    chosen: Int64,
    pool_E: Int64,
) -> tuple[Requests, Int64]:
    """Each chosen event as a request, its item beside those of `_NEGATIVES` events drawn from the same days."""
    row_R = np.searchsorted(user_U, user_E[chosen])
    ts_R = histories.event_ts_E[chosen]
    first_R = chosen.copy()  # of the events of that user and time, which no request sees
    while len(
        tied := np.flatnonzero((first_R > histories.offsets_B1[row_R]) & (histories.event_ts_E[first_R - 1] == ts_R))
    ):
        first_R[tied] -= 1
    end_R = first_R - histories.offsets_B1[row_R]
    drawn_RN = rng.choice(pool_E, (len(chosen), _NEGATIVES))
    event_C = np.concatenate([chosen[:, None], drawn_RN], axis=1)
    label_C = np.zeros(event_C.shape, np.float32)
    label_C[:, 0] = 1
    keep_C = np.ones(event_C.shape, bool)
    keep_C[:, 1:] = item_E[drawn_RN] != item_E[chosen][:, None]
    offsets = np.append(np.int64(0), np.cumsum(keep_C.sum(1)))
    event_C, label_C = event_C[keep_C], label_C[keep_C]
    features = {name: histories.features[name][event_C] for name in ("item_id", "category")}
    requests = Requests(
        request_id_R=chosen,
        user_id_R=pa.array(user_E[chosen]),
        user_key_R=histories.user_key_B[row_R],
        request_ts_R=ts_R,
        history_end_R=end_R,
        candidates=Candidates(offsets, features),
        item_id_C=pa.array(item_E[event_C]),
        labels={"label": label_C},
    )
    return requests, row_R
