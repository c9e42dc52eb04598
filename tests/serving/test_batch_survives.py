"""An offline run that loses its driver or an actor ends with the same table, and does no bucket twice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import batch_score, build_sequences
from longer.batch_settings import BatchSettings
from longer.config import Settings
from longer.data.records import Record
from longer.errors import UserError
from longer.runner import user_error_in
from longer.serving import batch
from longer.serving.batch_check import OnlineCheck
from longer.serving.batch_input import Chunk
from longer.serving.batch_output import Run
from longer.serving.batch_scorer import BucketScorer
from longer.storage import Version
from tests.data.test_build_survives import settings_with_events
from tests.serving.tables import MODEL, publish_random_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
NUM_CANDIDATES = 500


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """300 users in more than a hundred buckets, each asked about 500 items."""
    folder = tmp_path_factory.mktemp("survives")
    settings = settings_with_events(folder)
    settings = Settings(**{**settings.model_dump(), "model": MODEL})
    build_sequences.run(settings)
    publish_random_model(settings)
    pq.write_table(pa.table({"item_id": list(range(NUM_CANDIDATES))}), folder / "candidates.parquet")
    return settings


def asking(world: Settings, root: Path) -> Settings:
    """The same question each time, under a root of the test's own."""
    for name in ("tables", "checkpoints"):
        (root / name).symlink_to(Path(world.root, name))
    asked = BatchSettings(candidates=f"{world.root}/candidates.parquet", request_ts="2030-01-01T00:00:00Z")
    return world.model_copy(update={"root": str(root), "batch_score": asked})


def records(root: str) -> dict[Path, int]:
    """What an unfinished run has done, with the time it was written."""
    return {path: path.stat().st_mtime_ns for path in Path(root).glob("candidate_scores/*/_scratch/bucket-*.json")}


def checksums(version: Version) -> dict[str, str]:
    return {file.path.partition("/")[0]: file.sha256 for file in version.data_files()}


@pytest.fixture(scope="module")
def undisturbed(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of a run to which nothing happens."""
    return checksums(batch_score.run(asking(world, tmp_path_factory.mktemp("undisturbed"))))


def test_a_run_killed_half_way_does_the_missing_buckets_only(
    world: Settings, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Starts a job of its own, on a Ray of its own, and kills both: some twenty seconds."""
    asked = asking(world, tmp_path)
    config = tmp_path / "settings.yaml"
    config.write_text(asked.model_dump_json(exclude={"ray"}))
    command = [sys.executable, "-m", "jobs.batch_score", "--config", str(config), "--ray.num_cpus", "2"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(records(asked.root)) < 20:
        assert time.monotonic() < deadline, "the run never got that far"
        assert job.poll() is None, "the job has ended"
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(0.5)  # its actors go after it
    before = records(asked.root)
    files = {path: path.stat().st_mtime_ns for path in Path(asked.root).rglob("candidate_scores/*/bucket=*/*.parquet")}
    version = batch_score.run(asked)
    assert 20 <= len(before) < len(version.data_files()), "the run was not interrupted in its midst"
    kept = {
        path: path.stat().st_mtime_ns for path in files if f"bucket-{path.parent.name[-4:]}" in {p.stem for p in before}
    }
    assert len(kept) >= 20
    assert kept == {path: files[path] for path in kept}, "a bucket that was done was scored again"
    assert checksums(version) == undisturbed


class Dying(BucketScorer):
    """The first time that it has rows of a bucket's second half, it kills its worker."""

    def write_bucket(self, bucket: int) -> list[Record]:
        with Path(f"{self._run.version_path}.attempts").open("a") as attempts:
            attempts.write(f"{bucket}\n")
        return super().write_bucket(bucket)

    def _parts(self, chunks: Iterator[Chunk], check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        for rows in super()._parts(chunks, check, record):
            yield rows
            mark = Path(f"{self._run.version_path}.died")
            if record["bucket"] % 10 == 7 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_actor_costs_its_bucket_only(
    world: Settings, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(world, tmp_path)
    monkeypatch.setattr(batch, "BucketScorer", Dying)
    version = batch_score.run(asked)
    monkeypatch.undo()
    assert Path(f"{version.path}.died").exists(), "no actor was killed"
    attempts = Path(f"{version.path}.attempts").read_text().split()
    assert len(attempts) == len(version.data_files()) + 1, "buckets of other actors were done twice"
    assert version.manifest["lost_attempts"] == 1
    assert version.manifest["held_device_s"] > version.manifest["device_s"] / 2
    assert checksums(version) == undisturbed


def test_buckets_side_by_side_in_an_actor_are_the_same_and_no_second_is_charged_twice(
    world: Settings, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(world, tmp_path)
    monkeypatch.setattr(batch, "_BUCKETS_AT_ONCE", {"cpu": 2})
    version = batch_score.run(asked)
    monkeypatch.undo()
    assert version.manifest["device_s"] <= 2 * version.manifest["seconds"]  # by two actors
    assert checksums(version) == undisturbed


class DyingWhileOthersWait(BucketScorer):
    """The first time that it has rows of a bucket while another waits to be compared, it kills its worker."""

    def _parts(self, chunks: Iterator[Chunk], check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        for rows in super()._parts(chunks, check, record):
            yield rows
            mark = Path(f"{self._run.version_path}.waited")
            if self._waiting._waiting and not mark.exists():
                mark.write_text("\n".join(str(one.record["bucket"]) for one in self._waiting._waiting))
                os.kill(os.getpid(), signal.SIGKILL)


def test_buckets_that_die_with_an_actor_while_they_wait_to_be_compared_are_done_again(
    world: Settings, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray, told that their calls are over, would end the run without them. Starts actors three times: half a minute."""
    asked = asking(world, tmp_path)
    monkeypatch.setattr(batch, "_BUCKETS_AT_ONCE", {"cpu": 2})
    monkeypatch.setattr(batch, "BucketScorer", DyingWhileOthersWait)
    version = batch_score.run(asked)
    monkeypatch.undo()
    waited = Path(f"{version.path}.waited").read_text().split()
    assert version.manifest["lost_attempts"] >= 1 + len(waited)
    num_rows = [pq.read_metadata(file).num_rows for file in version.files()]
    compared = sum(min(rows, asked.batch_score.check_requests) for rows in num_rows)
    assert version.manifest["online_check"]["requests"] == compared
    assert checksums(version) == undisturbed


class Poisoned(BucketScorer):
    """Dies of some bucket every time, as when memory runs out."""

    def _parts(self, chunks: Iterator[Chunk], check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        if record["bucket"] % 10 == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._parts(chunks, check, record)


def test_a_bucket_that_kills_every_actor_ends_the_run_in_one_line(
    world: Settings, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some twenty seconds: an actor is started anew each time."""
    asked = asking(world, tmp_path)
    monkeypatch.setattr(batch, "BucketScorer", Poisoned)
    with pytest.raises(Exception) as raised:  # noqa: PT011  (Ray wraps it)
        batch_score.run(asked)
    assert re.match(
        r"bucket \d*7: 4 actors died while they had it, .*: lower batch_score.batch_bytes or the concurrency",
        str(user_error_in(raised.value)),
    )
    monkeypatch.undo()
    assert checksums(batch_score.run(asked)) == undisturbed


def test_a_bucket_that_dies_beside_another_each_time_is_not_blamed_alone(tmp_path: Path) -> None:
    """On a GPU an actor has two at once; which one it died of nobody knows. One that is done has no strike."""
    run = Run(str(tmp_path))
    for n, beside in enumerate((8, 8, 8, 9)):
        for bucket in (7, beside, 5):
            run.begin(bucket, f"actor {n}", "batch_bytes")
            if bucket == 5:
                run.end(bucket, f"actor {n}")
    with pytest.raises(UserError, match=r"^bucket 7: 4 actors died"):
        run.begin(7, "actor 4", "batch_bytes")
    assert sum(map(len, run.begun.values())) == 8
    run.begin(8, "actor 3", "batch_bytes")
    with pytest.raises(UserError, match=r"^bucket 7 \(and 8, beside it each time\): 4 actors"):
        run.begin(7, "actor 4", "batch_bytes")
    run.begin(9, "actor 4", "batch_bytes")


class Stillborn(BucketScorer):
    """Dies before it is up, as when there is no memory for its model."""

    def _start(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_actors_that_all_die_while_they_start_end_the_run_in_one_line(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ten seconds: an actor is started anew four times. Ray alone would go on for ever."""
    asked = asking(world, tmp_path)
    one = asked.batch_score.model_copy(update={"concurrency": (1, 1)})
    asked = asked.model_copy(update={"batch_score": one})
    monkeypatch.setattr(batch, "BucketScorer", Stillborn)
    with pytest.raises(Exception) as raised:  # noqa: PT011  (Ray wraps it)
        batch_score.run(asked)
    told = str(user_error_in(raised.value))
    assert re.match(r"4 actors died before they were up, .*: lower batch_score.concurrency", told), told


class Misled(BucketScorer):
    """Finds while it starts that something is wrong: what the user has to mend, or what we have."""

    error: Exception = UserError("tables/items: gone")

    def _start(self) -> None:
        raise self.error


class Broken(Misled):
    error = KeyError("ours")


def test_an_error_while_actors_start_ends_the_run_and_says_whose_it_is(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(world, tmp_path)
    for scorer, told in ((Misled, "tables/items: gone"), (Broken, "None")):
        monkeypatch.setattr(batch, "BucketScorer", scorer)
        with pytest.raises(Exception, match=str(scorer.error.args[0])) as raised:
            batch_score.run(asked)
        assert str(user_error_in(raised.value)) == told


def test_gpus_that_this_machine_does_not_have_are_refused_not_waited_for(world: Settings, tmp_path: Path) -> None:
    asked = asking(world, tmp_path)
    on_gpus = asked.batch_score.model_copy(update={"num_gpus_per_scorer": 64.0})
    with pytest.raises(UserError, match=r"batch_score.num_gpus_per_scorer=64.0: this machine has no such GPUs"):
        batch_score.run(asked.model_copy(update={"batch_score": on_gpus}))


class Failing(BucketScorer):
    """Finds, in some bucket, that the serving path says something else."""

    def _parts(self, chunks: Iterator[Chunk], check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        original = check.see

        def see(chunk: Chunk, rows: pa.Table) -> None:
            original(chunk, rows)
            if record["bucket"] % 10 == 7:
                raise ArithmeticError("scores of one request differ")

        check.see = see  # type: ignore[method-assign]
        return super()._parts(chunks, check, record)


def test_a_difference_from_the_serving_path_publishes_nothing(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(world, tmp_path)
    monkeypatch.setattr(batch, "BucketScorer", Failing)
    with pytest.raises(Exception, match="scores of one request differ") as raised:
        batch_score.run(asked)
    assert batch._is_failed_check(raised.value), "had another run published, this one would have passed for a success"
    assert not list(Path(asked.root, "candidate_scores").glob(f"{batch.plan_scores(asked).version_id}/_MANIFEST.json"))
