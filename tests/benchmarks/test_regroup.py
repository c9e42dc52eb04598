"""The benchmark's own honesty: a wrong result has no time, and a contender over the limit or the clock is ended and said to be."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.regroup import measure
from benchmarks.regroup.digest import Digest, digest_log, problem_of, rows_of_files
from benchmarks.regroup.job import Job
from benchmarks.regroup.libraries import FORMS
from longer.datasets.generator import chunks
from longer.datasets.ray_generator import ChunkWriter
from longer.schema import EventSchema
from longer.table_settings import GenerateSettings
from tests.data.logs import naive_sequences

SIZES = GenerateSettings(
    num_users=30, num_events=6_000, num_items=500, num_clusters=50, num_days=4, period_days=2, episode_days=1
)
SCHEMA = EventSchema()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    writer = ChunkWriter(SIZES, 3, SCHEMA, str(tmp_path / "log"))
    for chunk in chunks(SIZES):
        writer(vars(chunk))
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return Job(str(tmp_path / "log"), str(tmp_path / "out"), str(tmp_path / "scratch"), 6_000, 2, None)


def digest_of(job: Job) -> Digest:
    return digest_log(map(str, Path(job.log).glob("dt=*/*.parquet")), SIZES.num_users)


def rows_of(job: Job) -> list[dict]:
    events = pa.concat_tables(pq.read_table(file, partitioning=None) for file in Path(job.log).glob("dt=*/*"))
    return naive_sequences(events.select(SCHEMA.events_arrow().names), SCHEMA, 10_000, 1)


def problem(job: Job, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.sequences_arrow()), f"{job.out}/rows.parquet")
    return problem_of(rows_of_files([f"{job.out}/rows.parquet"]), digest_of(job))


def test_every_way_to_be_wrong_is_seen(job: Job) -> None:
    rows = rows_of(job)
    first, *rest = rows
    assert problem(job, rows[::-1]) == ""
    swapped = [first["event_ts"][1], first["event_ts"][0], *first["event_ts"][2:]]
    later = [first["event_ts"][0] - timedelta(hours=1), *first["event_ts"][1:]]
    halves = [
        {**first, **{n: first[n][part] for n in ("event_ts", "item_id", "action")}}
        for part in (slice(9), slice(9, None))
    ]
    for wrong, said in (
        ([{**first, "event_ts": swapped}, *rest], "not in the order of time"),
        ([{**first, "event_ts": later}, *rest], "not those of the log"),
        ([{**first, "item_id": [7, *first["item_id"][1:]]}, *rest], "not those of the log"),
        ([{**first, "action": first["action"][::-1]}, *rest], "not those of the log"),
        ([{**first, "action": first["action"][:-1]}, *rest], "differ in length"),
        ([{**first, "user_id": rest[0]["user_id"]}, *rest], "more than one row"),
        ([*halves, *rest], "more than one row"),
        (rest, "not those of the log"),
    ):
        assert said in problem(job, wrong)


@pytest.mark.parametrize(
    "form", [name for name in FORMS if ": " in name and not name.startswith(("copy", "duckdb: sort"))]
)
def test_every_form_that_counts_gives_the_right_result(job: Job, form: str) -> None:
    pytest.importorskip(form.partition(":")[0], reason="the extra `bench` is not installed")
    limited = replace(job, memory_bytes=1 << 30)
    run = measure.measure(form, limited, timeout_s=60)
    assert run.problem == ""
    assert problem_of(rows_of_files(run.files), digest_of(job)) == ""


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_contender_over_the_limit_or_the_clock_is_ended_and_named(
    job: Job, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(measure, "_own_group", lambda: None)
    elif measure._own_group() is None:
        pytest.skip("no memory cgroup (v1) that groups may be made under")
    within = measure.measure("copy floor: one file at a time", replace(job, memory_bytes=1 << 30), timeout_s=60)
    assert within.problem == ""
    assert 20 << 20 < within.peak_bytes < 1 << 30
    over = measure.measure("copy floor: one file at a time", replace(job, memory_bytes=30 << 20), timeout_s=60)
    assert over.problem == "out of memory: ended at the limit"
    late = measure.measure("copy floor: one file at a time", job, timeout_s=0.1)
    assert late.problem == "not done in 0 s"
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_contender(pid, job)]


def _is_contender(pid: str, job: Job) -> bool:
    try:
        return job.log.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
