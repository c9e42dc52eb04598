"""The pool of an offline run: it grows while buckets wait, and none of its actors outlives it, nor the run its roll."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from longer.batch_settings import BatchSettings
from longer.config import RaySettings
from longer.serving import batch, batch_totals
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan
from longer.serving.batch_roll import roll, sign
from tests.serving.batch_runs import world_with_requests

pytestmark = pytest.mark.ray


class Slow:
    """Does nothing with a bucket until another actor is there, but for a minute at most; tells by whom."""

    def __init__(self, _plan: Plan, run: Run, _actors: object) -> None:
        self._signed, self._most_until = Path(run.version_path) / "signed", time.time() + 60
        self._signed.mkdir(exist_ok=True)
        (self._signed / str(os.getpid())).touch()

    def __call__(self, rows: pa.Table) -> pa.Table:
        begun_at = time.time()
        while len(list(self._signed.iterdir())) < 2 and time.time() < self._most_until:
            time.sleep(0.1)
        time.sleep(0.2)
        return told_of(rows, begun_at)


def told_of(rows: pa.Table, begun_at: float) -> pa.Table:
    """The record of a bucket that is done now, as an actor hands it over."""
    [bucket], done_at = rows["bucket"].to_pylist(), time.time()
    counts = dict.fromkeys(("num_scores", "num_users", "num_requests", "num_compared"), 1)
    costs = dict.fromkeys(
        ("device_s", "cpu_s", "peak_bytes", "peak_gpu_bytes", "working_bytes", "check_requests", "max_abs_diff"), 0
    )
    actor = {"name": str(os.getpid()), "device_s": 0, "cpu_s": 0, "start_ms": {}}
    told = {**counts, **costs, "bucket": bucket, "device": "cpu", "actor": actor, "file": None, "stages_ms": {}}
    times = {"begun_at": begun_at, "done_at": done_at, "held_s": 0, "own_begun_at": begun_at, "own_done_at": done_at}
    return pa.table({"record": [json.dumps(told | times)]})


class Timed:
    """Takes its time for each bucket."""

    SECONDS = 1.5

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, rows: pa.Table) -> pa.Table:
        begun_at = time.time()
        time.sleep(self.SECONDS)
        return told_of(rows, begun_at)


@pytest.mark.usefixtures("local_ray")
def test_a_bucket_is_clocked_as_it_is_done_not_when_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else rates are those of a run that is shorter by a bucket. Its buckets take seconds, against which a busy machine's Ray is
    fast."""
    monkeypatch.setattr(batch, "BucketScorer", Timed)
    records, on_this_clock = list[dict](), batch_totals._on_this_clock

    def noted(record: dict) -> dict:
        records.append(on_this_clock(record))
        return records[-1]

    monkeypatch.setattr(batch_totals, "_on_this_clock", noted)
    plan = batch.plan_scores(world_with_requests(tmp_path / "world"))
    manifest, _ = batch._scored(
        plan, BatchSettings(concurrency=(1, 1)), RaySettings(), Run(str(tmp_path)), "batch_score", time.time()
    )
    assert len(records) > 2
    assert max(record["done_at"] - record["own_done_at"] for record in records) < Timed.SECONDS / 2
    span = max(record["own_done_at"] for record in records) - min(record["own_begun_at"] for record in records)
    assert manifest["seconds"] - manifest["start_s"] > span - Timed.SECONDS / 2
    assert manifest["rows_per_s"] < len(records) / (span - Timed.SECONDS / 2)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("at_once", [1, 2])
def test_more_actors_start_while_buckets_wait_however_many_one_has_at_once(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where an actor has two. Starting two actors takes seconds."""
    monkeypatch.setattr(batch, "_BUCKETS_AT_ONCE", {"cpu": at_once})
    monkeypatch.setattr(batch, "BucketScorer", Slow)
    plan = batch.plan_scores(world_with_requests(tmp_path / "world"))
    pool = BatchSettings(concurrency=(1, 3))
    records = batch._score_buckets(
        plan, pool, RaySettings(), Run(str(tmp_path)), dict.fromkeys(range(40), 1), "batch_score"
    )
    assert len(records) == 40
    assert len({record["actor"]["name"] for record in records}) > 1


class Signing:
    def __init__(self, opened: ray.actor.ActorHandle) -> None:
        sign(opened)

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.usefixtures("local_ray")
def test_a_run_whose_roll_is_lost_ends_as_if_it_were_there() -> None:
    signing = ray.remote(num_cpus=0)(Signing)
    with roll() as opened:
        first = signing.remote(opened)
        ray.get(first.pid.remote())
        ray.kill(opened)
        later = signing.remote(opened)
        assert ray.get(later.pid.remote()) > 0, "an actor that is started anew cannot sign, and does not have to"


def asked_until_it_ends(actor: ray.actor.ActorHandle) -> None:
    for _ in range(600):  # being killed takes a moment, in which an actor still answers
        ray.get(actor.pid.remote(), timeout=120)
        time.sleep(0.1)


@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_has_died_before_does_not_keep_the_others_alive() -> None:
    signing = ray.remote(num_cpus=0)(Signing)
    with roll() as opened:
        dead, alive = signing.remote(opened), signing.remote(opened)
        ray.get([dead.pid.remote(), alive.pid.remote()])
        ray.kill(dead)
    with pytest.raises(ray.exceptions.RayActorError):
        asked_until_it_ends(alive)
    with pytest.raises(ray.exceptions.RayActorError, match="is over"):
        ray.get(signing.remote(opened).pid.remote(), timeout=120)
