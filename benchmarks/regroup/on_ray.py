"""The contenders on Ray: this platform's job, its increment, `map_groups`, and the shuffles that it could have used instead."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.regroup.job import COLUMNS, LISTS, Contender, Job
from longer.config import RaySettings, Settings, load_settings
from longer.data.events import iso_time
from longer.hashing import bucket_of, stable_keys
from longer.runner import start_ray
from longer.storage import Table, Version

_OBJECT_STORE_BYTES = 1 << 30
_BUCKET_EVENTS = 1_000_000
_SETTLE_S = 3.0


def longer(job: Job) -> Callable[[], list[str]]:
    """This platform: `jobs.build_sequences` without its catalogue, all events kept, as the other contenders keep them."""
    from jobs import build_sequences

    settings, _ = _own_run(job)
    _start(job)
    return lambda: build_sequences.build(settings, Table(settings.path("tables", "sequences")), None).files()


def longer_increment(job: Job) -> Callable[[], list[str]]:
    """This platform's increment: the last day merged into a build of the days before, which is made first, untimed."""
    from jobs import build_sequences

    settings, log = _own_run(job)
    events = Table(settings.path("tables", "events"))
    _publish_all_but_last_day(events, log)
    _start(job)
    table = Table(settings.path("tables", "sequences"))
    base = build_sequences.build(settings, table, None)
    events.reuse(log.id)
    return lambda: build_sequences.build(settings, table, base).files()


def map_groups(job: Job) -> Callable[[], list[str]]:
    """Ray Data as its documentation teaches grouping: a function a group."""
    _start(job)
    import ray.data

    def sequence(group: pa.Table) -> pa.Table:
        ordered = group.sort_by("event_ts")
        ends = pa.array([0, len(ordered)], pa.int32())
        lists = [pa.ListArray.from_arrays(ends, ordered[name].combine_chunks()) for name in LISTS]
        return pa.table([ordered["user_id"][:1], *lists], COLUMNS)

    def work() -> list[str]:
        events = ray.data.read_parquet(job.log, columns=list(COLUMNS), partitioning=None)
        users = events.groupby("user_id").map_groups(sequence, batch_format="pyarrow")
        users.write_parquet(job.out, compression="zstd")
        return job.written()

    return work


def _repartition(on_disk: bool) -> Contender:
    """One pass over Ray's shuffle: read, `repartition(keys=...)`, one sort and one list array a bucket."""

    def prepare(job: Job) -> Callable[[], list[str]]:
        _start(job)
        import ray.data

        ray.data.DataContext.get_current().use_disk_based_hash_shuffle = on_disk
        num_buckets = max(8, job.num_events // _BUCKET_EVENTS)

        def with_bucket(events: pa.Table) -> pa.Table:
            return events.append_column("bucket", pa.array(bucket_of(stable_keys(events["user_id"]), num_buckets)))

        def work() -> list[str]:
            events = ray.data.read_parquet(job.log, columns=list(COLUMNS), partitioning=None)
            bucketed = events.map_batches(with_bucket, batch_format="pyarrow", batch_size=None)
            shuffled = bucketed.repartition(num_buckets, keys=["bucket"])
            written = shuffled.map_batches(_BucketWriter(job.out), batch_format="pyarrow", batch_size=None)
            return [row["file"] for row in written.iter_rows()]

        return work

    return prepare


class _BucketWriter:
    def __init__(self, out: str) -> None:
        self.out = out

    def __call__(self, events: pa.Table) -> Iterator[pa.Table]:
        for bucket in np.unique(events["bucket"].to_numpy()):
            rows = events.filter(pc.equal(events["bucket"], bucket)).combine_chunks()
            ordered = rows.sort_by([("user_id", "ascending"), ("event_ts", "ascending")])
            users = ordered["user_id"].to_numpy()
            starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
            ends = pa.array(np.append(starts, len(users)).astype(np.int32))
            lists = [pa.ListArray.from_arrays(ends, ordered[name].combine_chunks()) for name in LISTS]
            file = f"{self.out}/{bucket:04d}.parquet"
            pq.write_table(pa.table([users[starts], *lists], COLUMNS), file, compression="zstd")
            yield pa.table({"file": [file]})


FORMS: dict[str, Contender] = {
    "longer": longer,
    "longer: one more day": longer_increment,
    "ray: groupby.map_groups": map_groups,
    "ray: repartition(keys)": _repartition(on_disk=False),
    "ray: repartition(keys), disk shuffle": _repartition(on_disk=True),
}


def _start(job: Job) -> None:
    """Starts Ray, and its workers with a first small run that imports what they need, so that neither is part of a time.

    Ray's own processes go on starting for some seconds after it says that it is up: that is its start too.
    """
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    start_ray(RaySettings(num_cpus=job.num_cores, object_store_bytes=_OBJECT_STORE_BYTES))
    import ray.data

    tasks = 4 * job.num_cores
    ray.data.range(tasks, override_num_blocks=tasks).map_batches(_first_small_run, batch_format="pyarrow").materialize()
    time.sleep(_SETTLE_S)


def _first_small_run(block: pa.Table) -> pa.Table:
    from longer.data import ray_sequences  # noqa: F401

    return block.append_column("key", pa.array(stable_keys(block["id"])))


def _own_run(job: Job) -> tuple[Settings, Version]:
    """Settings of a run under the job's folder, whose events table serves the log without a copy of it."""
    shared = Path(job.log)
    events = Path(job.out) / "tables" / "events"
    events.mkdir(parents=True)
    (events / shared.name).symlink_to(shared)
    log = Table(str(events)).reuse(shared.name)
    assert log is not None, f"{job.log} is not a whole version of an events table"
    sequences = {"keep_events": max(job.num_events, 10_000)}
    ray = {"num_cpus": job.num_cores, "object_store_bytes": _OBJECT_STORE_BYTES}
    return load_settings(overrides={"root": job.out, "sequences": sequences, "ray": ray}), log


def _publish_all_but_last_day(events: Table, log: Version) -> None:
    """Serves a version that shares the log's files but for those of its last day."""
    last_day = max(file.path.partition("/")[0] for file in log.data_files())
    files = [file for file in log.data_files() if not file.path.startswith(last_day)]
    paths = [path for path in log.files() if f"/{last_day}/" not in path]
    newest = [pc.max(pq.read_table(path, columns=["event_ts"], partitioning=None)["event_ts"]) for path in paths[-2:]]
    manifest = {name: value for name, value in log.manifest.items() if name in ("schema_hash", "settings", "inputs")}
    manifest |= {
        "num_rows": sum(pq.read_metadata(path).num_rows for path in paths),
        "first_event_ts": log.manifest["first_event_ts"],
        "watermark": iso_time(max(time.cast(pa.int64()).as_py() for time in newest)),
    }
    version_id = f"{log.id}-before"
    events.begin(version_id)
    events.publish(version_id, manifest, files)
