"""Packs share a history exactly when the window rule says that they may."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from longer.arrays import NO_EVENT_TS
from longer.data.batches import assemble, plan_packs, rows_of_requests
from longer.data.columns import histories_of, requests_of
from longer.data.requests import draw_negatives, find_groups, merge_catalogues, partial_catalogue, request_rows
from longer.windows import WindowRule
from tests.data.logs import BASKETS, logs
from tests.data.tables import sequences_of
from tests.data.test_requests import SPLIT

WINDOWS = WindowRule(merge_size=2, history_groups=2, query_groups=1, stride_groups=1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_packs_hold_each_request_once_and_agree_on_user_and_windows(
    asked: list[tuple[int, int]], max_requests: int, stride: int
) -> None:
    windows = WindowRule(merge_size=2, history_groups=4 * stride, query_groups=stride, stride_groups=stride)
    row, end = (np.array([pair[i] for pair in asked], np.int64) for i in (0, 1))
    packs = plan_packs(row, end, windows, max_requests)
    assert sorted(packs.order_R.tolist()) == list(range(len(asked)))
    keys = []
    for p in range(len(packs)):
        members = packs.order_R[packs.offsets_P1[p] : packs.offsets_P1[p + 1]]
        assert 1 <= len(members) <= max_requests
        assert (np.diff(end[members]) >= 0).all()
        pack_keys = {(row[m], windows.history_start(end[m]), windows.query_start(end[m])) for m in members}
        assert len(pack_keys) == 1
        keys.append((pack_keys.pop(), len(members)))
    for (key, size), (next_key, _) in pairwise(keys):
        assert key != next_key or size == max_requests, "a pack was split without need"


@given(logs(), st.integers(1, 4), st.randoms())
def test_each_request_reads_its_own_window_in_whatever_batch_it_is(
    events: pa.Table, max_requests: int, random: object
) -> None:
    bucket = sequences_of(events)
    histories = histories_of(bucket, BASKETS)
    catalogue = merge_catalogues([partial_catalogue(bucket, BASKETS, SPLIT)], BASKETS)
    groups = find_groups(bucket, histories, BASKETS, catalogue)
    negatives = draw_negatives(groups, SPLIT.split_of(groups.request_ts_R), catalogue, 1, seed=0)
    rows = request_rows(groups, negatives, bucket["user_id"].combine_chunks(), BASKETS, catalogue)
    requests = requests_of(rows, BASKETS)
    row_R = rows_of_requests(histories, requests)
    packs = plan_packs(row_R, requests.history_end_R, WINDOWS, max_requests)
    some = np.array(random.sample(range(len(packs)), k=(len(packs) + 1) // 2), np.int64)  # type: ignore[attr-defined]
    batch = assemble(histories, row_R, requests, packs.take(some), WINDOWS)

    by_id = {row["request_id"]: row for row in rows.to_pylist()}
    by_user = {row["user_id"]: row for row in bucket.to_pylist()}
    assert (np.diff(batch.row_R) >= 0).all()
    for r in range(batch.num_requests):
        row = by_id[batch.request_id_R[r]]
        user, b = by_user[row["user_id"]], batch.row_R[r]
        start, end = WINDOWS.history_start(row["history_end"]) * WINDOWS.merge_size, row["history_end"]
        offset = batch.histories.offsets_B1[b]
        assert batch.histories.first_index_B[b] == start
        assert batch.history_end_R[r] == end <= batch.histories.end_index_B[b]
        times = batch.histories.event_ts_E[offset : offset + end - start].tolist()
        assert times == [ms(time) for time in user["event_ts"][start:end]]
        before = ms(user["event_ts"][start - 1]) if start else NO_EVENT_TS
        assert batch.histories.prev_event_ts_B[b] == before
        quantity = batch.histories.features["quantity"][offset : offset + end - start].tolist()
        assert quantity == user["quantity"][start:end]
        span = slice(batch.candidates.offsets_R1[r], batch.candidates.offsets_R1[r + 1])
        assert batch.labels["label"][span].tolist() == row["label"]


def ms(time: object) -> int:
    return round(time.timestamp() * 1000)  # type: ignore[attr-defined]
