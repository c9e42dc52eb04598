"""What the loader hands on: evenly spread validation requests, whole batches, and the errors of its thread."""

import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer.arrays import Candidates
from longer.data.batches import Requests
from longer.model.layout import Sizes
from longer.training.loader import SplitData, prefetch, score_packs
from longer.windows import WindowRule
from tests.training.test_baselines import histories_of


def split_of(ends_of_users: list[list[int]], num_candidates: int = 3) -> SplitData:
    """Requests of users whose histories have just enough events; request i has id i and time i."""
    row = np.repeat(np.arange(len(ends_of_users)), [len(ends) for ends in ends_of_users])
    size = len(row)
    items = np.arange(size * num_candidates)
    return SplitData(
        histories_of([[1] * max(ends) for ends in ends_of_users], [0] * len(ends_of_users)),
        Requests(
            request_id_R=np.arange(size),
            user_id_R=pa.array(row),
            user_key_R=row + 1,
            request_ts_R=np.arange(size),
            history_end_R=np.array([end for ends in ends_of_users for end in ends], np.int64),
            candidates=Candidates(np.arange(size + 1) * num_candidates, {"item_id": items}),
            item_id_C=pa.array(items),
            labels={"label": np.zeros(len(items), np.float32)},
        ),
        row,
        WindowRule(merge_size=2, history_groups=4, query_groups=2, stride_groups=2),
    )


def test_validation_sample_takes_every_user_in_proportion() -> None:
    data = split_of([list(range(1, 41)), list(range(1, 21)), list(range(1, 21))])
    sample = data.spread(8)
    assert sample is not None
    assert np.bincount(data.row_R[sample]).tolist() == [4, 2, 2]
    assert data.requests.request_id_R[sample].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert data.spread(80) is None


def test_newest_requests_are_kept_in_their_order() -> None:
    data = split_of([[1, 2, 3], [1, 2]])
    newest = data.newest(2)
    assert newest is not None
    assert data.requests.request_id_R[newest].tolist() == [3, 4]
    assert data.row_R[newest].tolist() == [1, 1]
    assert data.newest(5) is None


@given(data=st.data())
def test_packs_of_some_requests_are_those_of_a_copy_of_them(data: st.DataObject) -> None:
    """The order of training is that of runs whose requests were copied first."""
    split = split_of(data.draw(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=5)))
    some = np.array(data.draw(st.permutations(range(len(split.requests)))))[: data.draw(st.integers(1, 20))]
    packs, of_copy = split.packs(3, some), split.take(some).packs(3)
    assert packs.order_R.tolist() == some[of_copy.order_R].tolist()
    assert packs.offsets_P1.tolist() == of_copy.offsets_P1.tolist()


def test_every_candidate_is_scored_once_and_lands_in_its_row() -> None:
    data = split_of([[3, 5, 20, 21], [0], [7, 7, 8]])
    found = np.full(len(data.requests.item_id_C), -1)
    for rows, scores in score_packs(data, data.packs(2), lambda batch: batch.candidates.features["item_id"]):
        assert (found[rows] == -1).all()
        found[rows] = scores
    assert found.tolist() == data.requests.candidates.features["item_id"].tolist()


def test_cost_counts_the_events_of_the_window_once_a_pack_and_all_candidates() -> None:
    data = split_of([[3, 5], [20]])
    assert data.cost(data.packs(8)).tolist() == [5 + 6, 20 - 12 + 3]


def test_the_room_of_a_batch_is_known_from_its_packs_before_it_is_made() -> None:
    data = split_of([[3, 5, 20, 21], [0], [7, 7, 8], [1, 13]])
    packs = data.packs(2)
    for chosen in ([0], [1, 3], [0, 2, 4, 5], range(len(packs))):
        batch = data.batch(packs.take(np.array(chosen)))
        assert Sizes.of(batch, data.windows) == tuple(size_P[list(chosen)].sum() for size_P in data.sizes(packs))


def test_the_loaders_error_reaches_the_consumer_after_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("bucket 3 is broken")

    received = prefetch(items(), 2)
    assert next(received) == 1
    with pytest.raises(ValueError, match="bucket 3 is broken"):
        next(received)


def test_a_consumer_that_stops_early_leaves_no_thread_behind() -> None:
    received = prefetch(iter(range(10**9)), 2)
    assert [next(received) for _ in range(3)] == [0, 1, 2]
    received.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
