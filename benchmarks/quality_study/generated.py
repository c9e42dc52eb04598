"""The generated log with requests that only old events answer.

Each user returns to an item cluster after a period (`longer.datasets.generator`). When an episode begins, a request shows one item
of the cluster that its user now returns to, beside items of clusters that others return to. Nothing since the last such episode
tells them apart, nor does popularity: all are drawn by one law. What tells is what the user did one period before.

U users, E events, R requests, C candidates, A pairs of a user and an episode that are asked about.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from benchmarks.quality_study.log import Log
from longer.arrays import NO_EVENT_TS, Candidates, Histories, Int64
from longer.data.batches import Requests
from longer.datasets.generator import Chunk, chunks, generate, midnight_ms, planted_cluster
from longer.hashing import stable_keys
from longer.schema import EventSchema
from longer.table_settings import GenerateSettings

_VALID_DAYS, _TEST_DAYS = 2, 6
_REQUESTS_OF_A_PAIR = 8
"""That share a history: fewer histories to encode."""
_MOST_REQUESTS = {"train": 160_000, "valid": 4_000, "test": 16_000}
_NEGATIVES = 4


def read_generated(schema: EventSchema, sizes: GenerateSettings, seed: int) -> Log:
    """The whole log of these sizes; its days are made side by side."""
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        parts = list(pool.map(partial(_chunk, sizes, seed, schema), chunks(sizes)))
    user_E, ts_E, item_E, action_E, category_E = (np.concatenate(each) for each in zip(*parts, strict=True))
    del parts
    by_time = np.argsort(ts_E, kind="stable")  # of parts that are sorted: they are merged
    order = by_time[np.argsort(user_E[by_time], kind="stable")]
    user_E, ts_E, item_E, action_E, category_E = (x[order] for x in (user_E, ts_E, item_E, action_E, category_E))
    user_U, start_U = np.unique(user_E, return_index=True)
    histories = Histories(
        user_key_B=stable_keys(pa.array(user_U.astype(np.int64))),
        offsets_B1=np.append(start_U, len(user_E)).astype(np.int64),
        first_index_B=np.zeros(len(user_U), np.int64),
        prev_event_ts_B=np.full(len(user_U), NO_EVENT_TS),
        event_ts_E=ts_E,
        features={
            "item_id": stable_keys(pa.array(np.arange(sizes.num_items + 1)))[item_E],
            "action": action_E,
            "category": category_E,
        },
    )
    bounds, rng = _bounds(sizes), np.random.default_rng(seed)
    log = Log("generated", schema, histories, {}, {}, midnight_ms(sizes, bounds["valid"][0]))
    for name, days in bounds.items():
        asked = [_returned(sizes, seed, day, user_E, ts_E, item_E) for day in range(*days, sizes.episode_days)]
        log.requests[name], log.row_R[name] = _requests(rng, histories, asked, user_E, item_E, _MOST_REQUESTS[name])
    return log


def _bounds(sizes: GenerateSettings) -> dict[str, tuple[int, int]]:
    """Days of each split: whole episodes. Training begins within a period of the last day, so that no label tells of a test's."""
    test_from = sizes.num_days - _TEST_DAYS
    valid_from = test_from - _VALID_DAYS
    return {
        "train": (sizes.num_days - sizes.period_days, valid_from),
        "valid": (valid_from, test_from),
        "test": (test_from, sizes.num_days),
    }


def _returned(
    sizes: GenerateSettings, seed: int, first_day: int, user_E: Int64, ts_E: Int64, item_E: Int64
) -> tuple[int, Int64]:
    """When an episode begins, before any event of it, and the events in it that are of their user's cluster."""
    delay_ms = sizes.max_delay_s * 1000  # an event of a day may have happened so much before it
    begin, end = (midnight_ms(sizes, day) - delay_ms for day in (first_day, first_day + sizes.episode_days))
    inside_E = np.flatnonzero((ts_E >= begin + delay_ms) & (ts_E < end))
    cluster_E = planted_cluster(sizes, seed, first_day, user_E[inside_E].astype(np.int64) - 1)
    return begin, inside_E[(item_E[inside_E] - 1) % sizes.num_clusters == cluster_E]


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


def _requests(
    rng: np.random.Generator,
    histories: Histories,
    asked: list[tuple[int, Int64]],
    user_E: Int64,
    item_E: Int64,
    most: int,
) -> tuple[Requests, Int64]:
    """Requests of one split, and their users' rows: `asked` are its episodes' beginnings and returned events, in order of users."""
    chosen, row_R, ts_R, end_R, drawn_RN = (
        np.concatenate(each) for each in zip(*_asked(rng, histories, asked, user_E, most), strict=True)
    )
    event_C = np.concatenate([chosen[:, None], drawn_RN], axis=1)
    label_C = np.zeros(event_C.shape, np.float32)
    label_C[:, 0] = 1
    cluster_E = histories.features["category"]
    keep_C = cluster_E[event_C] != cluster_E[chosen][:, None]
    keep_C[:, 0] = True
    offsets = np.append(np.int64(0), np.cumsum(keep_C.sum(1)))
    event_C, label_C = event_C[keep_C], label_C[keep_C]
    requests = Requests(
        request_id_R=chosen,
        user_id_R=pa.array(user_E[chosen]),
        user_key_R=histories.user_key_B[row_R],
        request_ts_R=ts_R,
        history_end_R=end_R,
        candidates=Candidates(offsets, {name: histories.features[name][event_C] for name in ("item_id", "category")}),
        item_id_C=pa.array(item_E[event_C]),
        labels={"label": label_C},
    )
    return requests, row_R


def _asked(
    rng: np.random.Generator, histories: Histories, asked: list[tuple[int, Int64]], user_E: Int64, most: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Of each episode: events asked about, their users' rows, the moment, where the history ends, and events of others.

    Pairs of a user and the episode are drawn by her events in it, so that long histories are there.
    """
    for begin, returned_E in asked:
        drawn = rng.choice(
            len(returned_E), min(len(returned_E), most // _REQUESTS_OF_A_PAIR // len(asked)), replace=False
        )
        user_A = np.unique(user_E[returned_E[drawn]])
        first_A, last_A = (np.searchsorted(user_E[returned_E], user_A, side) for side in ("left", "right"))
        number = first_A[:, None] + np.arange(_REQUESTS_OF_A_PAIR)
        chosen = returned_E[number[number < last_A[:, None]]]
        row_R = np.searchsorted(histories.offsets_B1, chosen, "right") - 1
        row_A, pair_R = np.unique(row_R, return_inverse=True)
        starts, ends = histories.offsets_B1[row_A], histories.offsets_B1[row_A + 1]
        end_A = np.array([np.searchsorted(histories.event_ts_E[a:b], begin) for a, b in zip(starts, ends, strict=True)])
        drawn_RN = returned_E[rng.integers(len(returned_E), size=(len(chosen), _NEGATIVES))]
        yield chosen, row_R, np.full(len(chosen), begin), end_A[pair_R], drawn_RN
