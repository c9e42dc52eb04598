"""Buckets that an actor compares together with the serving path are each compared, and none is done before it is."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from longer.config import Settings
from longer.serving.batch_answers import Answers
from longer.serving.batch_check import OnlineCheck
from longer.serving.batch_output import Run, done_buckets
from longer.serving.batch_plan import Plan, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from longer.serving.batch_waiting import Waiting, Written
from tests.serving.batch_runs import world_with_requests


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("waiting"))


@pytest.fixture(scope="module", params=["requests", "vectors"])
def plan(request: pytest.FixtureRequest, world: Settings) -> Plan:
    return plan_scores(world) if request.param == "requests" else plan_vectors(world)


def test_a_bucket_that_waits_to_be_compared_is_not_done_before_it_is(plan: Plan, tmp_path: Path) -> None:
    """A run killed meanwhile would else go on as if it had been compared."""
    scorer = BucketScorer(plan, Run(str(tmp_path)))
    with scorer._waiting.at_work():  # on another bucket
        assert scorer.write_bucket(0) == []
        assert scorer.write_bucket(1) == []
        assert done_buckets(str(tmp_path)) == {}
        assert scorer._run.begun.keys() == {0, 1}, "a bucket that kills its actor by being compared would not be blamed"
    records = scorer.write_bucket(2)
    assert [record["bucket"] for record in records] == [0, 1, 2]
    assert done_buckets(str(tmp_path)) == {record["bucket"]: record for record in records}
    assert not scorer._run.begun
    assert all(record["num_compared"] == min(plan.check_requests, record["num_requests"]) > 0 for record in records)
    assert all(0 < record["max_abs_diff"] < 1e-5 for record in records)
    assert all(
        sum(record["stages_ms"].values()) <= 1000 * (record["done_at"] - record["begun_at"]) for record in records
    )


def test_buckets_that_wait_are_one_batch_of_the_serving_path(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four users cost a GPU as many launches as these."""
    scorer = BucketScorer(plan_scores(world), Run(str(tmp_path)))
    assert scorer._scorer
    asked, score = [], scorer._scorer.score
    monkeypatch.setattr(scorer._scorer, "score", lambda requests: (asked.append(requests), score(requests))[1])
    with scorer._waiting.at_work():
        scorer.write_bucket(0)
        scorer.write_bucket(1)
    records = scorer.write_bucket(2)
    [together] = asked
    assert len(together) == sum(record["num_compared"] for record in records)


def test_a_difference_in_a_bucket_that_waited_fails_the_run_and_no_bucket_of_them_is_done(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = BucketScorer(plan, Run(str(tmp_path)))
    with scorer._waiting.at_work(), monkeypatch.context() as wrong:
        name = "vector" if plan.kind == "vectors" else "score_label"
        wrong.setattr(Answers, "rows", lambda answers, chunk: with_more(rows_of(answers, chunk), name))
        assert scorer.write_bucket(0) == []
    with pytest.raises(ArithmeticError, match="between the offline and the serving path"):
        scorer.write_bucket(1)
    assert done_buckets(str(tmp_path)) == {}


rows_of = Answers.rows


def with_more(rows: pa.Table, name: str) -> pa.Table:
    values = [[value + 1e-3 for value in row] for row in rows[name].to_pylist()]
    return rows.set_column(rows.column_names.index(name), name, pa.array(values, rows[name].type))


def test_a_bucket_waits_neither_for_long_nor_for_more_than_is_compared_at_once_nor_for_nothing(world: Settings) -> None:
    def due(num_users: int, waiting: Waiting, ago_s: float = 0.0) -> int:
        check = OnlineCheck(plan_scores(world), None, None, np.arange(num_users), 4096, (1,))
        return len(waiting.due(Written({}, check, time.perf_counter() - ago_s)))

    waiting = Waiting(most_users=32, most_candidates=4096)
    assert due(4, waiting) == 1, "nobody else is at work"
    with waiting.at_work():
        assert [due(4, waiting) for _ in range(16)] == 2 * [0, 0, 0, 0, 0, 0, 0, 8]
        assert [due(5, waiting) for _ in range(6)] == [0, 0, 0, 0, 0, 6]
        assert [due(n, waiting) for n in (4, 0)] == [0, 2]
        assert due(17, waiting) == 1
        assert [due(4, waiting, ago_s) for ago_s in (25.0, 0.0)] == [1, 0]
    assert due(4, waiting) == 2


def test_a_bucket_of_as_many_candidates_as_are_compared_at_once_waits_for_no_other(world: Settings) -> None:
    class Full(OnlineCheck):
        num_candidates = 4096

    waiting = Waiting(most_users=32, most_candidates=4096)
    with waiting.at_work():
        full = Full(plan_scores(world), None, None, np.arange(4), 4096, (1,))
        assert len(waiting.due(Written({}, full, time.perf_counter()))) == 1


def test_no_bucket_is_left_or_compared_twice_when_threads_end_in_any_order(world: Settings) -> None:
    """Records that nobody tells are buckets that the run would do again, without end."""
    waiting, check = Waiting(32, 4096), OnlineCheck(plan_scores(world), None, None, np.arange(4), 4096, (1,))
    rng = np.random.default_rng(0)

    def write(bucket: int) -> list[int]:
        with waiting.at_work():
            time.sleep(float(rng.random()) * 1e-3)
            written = Written({"bucket": bucket}, check, time.perf_counter())
        return [one.record["bucket"] for one in waiting.due(written)]

    for _ in range(20):
        with ThreadPoolExecutor(3) as threads:
            told = [bucket for due in threads.map(write, range(31)) for bucket in due]
        assert sorted(told) == list(range(31))


def test_a_scale_drawn_from_a_chunk_is_that_of_all_its_scores(world: Settings, tmp_path: Path) -> None:
    """Of a few scores of one kind, such as each request's first, it would let pass what is wrong, or fail what is right."""
    scorer = BucketScorer(plan_scores(world), Run(str(tmp_path)))
    check = OnlineCheck(scorer._plan, scorer._scorer, None, np.arange(4), 4096, (1, 2))
    scores_C = np.full(1 << 20, 1e-4, np.float32)
    scores_C[::64] = 0.99
    all_of_them = check._scale(scores_C[: 1 << 16], "label")
    assert check._scale(scores_C, "label") == pytest.approx(all_of_them, rel=0.1)
