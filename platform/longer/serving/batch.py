"""Offline runs on Ray Data: one row a bucket of users, a pool of actors that each hold the model.

Each bucket becomes one file, whole or not at all, under a version whose id is decided by everything that goes into it. So an
interrupted run keeps its finished buckets, a dead actor or node costs its bucket only, and a finished run is found.
"""

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.actor import ActorHandle

from longer.batch_settings import ScorerPool
from longer.config import RaySettings, Settings
from longer.data.id_lists import spool, spread
from longer.data.records import Record, scratch
from longer.data.scores import check_difference, read_scores
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.progress import say, track
from longer.serving.batch_answers import Answers
from longer.serving.batch_check import OnlineCheck, chosen_numbers, num_left_out
from longer.serving.batch_input import Reader
from longer.serving.batch_output import Run, done_buckets, remember_bucket, remove_unnamed, write_rows
from longer.serving.batch_plan import Plan, check_model, plan_scores, plan_vectors
from longer.serving.batch_roll import roll, sign
from longer.serving.batch_totals import actors_of, cost_in_words, in_words, rates_of, totals_of
from longer.serving.batch_warm import warm_up
from longer.serving.offline import Budget
from longer.serving.scorer import Scorer
from longer.serving.stages import collected_ms, stage
from longer.storage import TABLE_FORMAT, DataFile, Table, Version, fingerprint, remove_tree
from longer.training.checkpoints import load_model
from longer.training.loader import prefetch

_CACHE_BYTES = 64 << 20

_BUCKETS_AT_ONCE = {"cpu": 1, "cuda": 2}
"""In an actor: on a GPU one is read and written while another is scored. A CPU has nothing to wait for."""


class BucketScorer:
    """Writes the answers of the buckets it is given; one instance an actor, which loads the model once."""

    def __init__(self, plan: Plan, run: Run, actors: ActorHandle | None = None) -> None:
        if actors:
            sign(actors)
        self._plan, self._run = plan, run
        self._device, self._charging, self._charged = threading.Lock(), threading.Lock(), (0.0, 0.0)
        with run.starting(plan.most_actors, plan.section), _memory_told(plan), collected_ms() as stages:
            self._start()
        self._actor = {"name": f"{socket.gethostname()}:{os.getpid()}", "start_ms": stages}

    def _start(self) -> None:
        plan, run = self._plan, self._run
        sequences = f"{plan.root}/tables/sequences"
        with stage("load"):
            model, info = load_model(plan.checkpoint.path, plan.device)
        self._scorer: Scorer | None = None  # without user states, there is no serving path to compare with
        if info.model.is_appendable:
            self._scorer = Scorer(
                plan.checkpoint.path,
                sequences,
                _CACHE_BYTES,
                plan.items_path,
                plan.sequences.id,
                plan.device,
                state_precision=plan.precision,
                is_plain=True,  # compiled, a few requests of each bucket would cost more than all others
            )
            model = self._scorer.model
        budget = Budget(model, plan.batch_bytes)
        self._answers = Answers.of(plan, budget, run)
        requests = plan.inputs.get("requests")
        self._reader = Reader(
            plan=plan,
            sequences=SequenceTable(sequences, plan.schema, plan.sequences.id),
            requests=RequestTable(f"{plan.root}/tables/requests", plan.schema, requests) if requests else None,
            run=run,
            windows=model.windows,
            outputs_a_request=self._answers.values_a_user,
        )
        with stage("warm up"):
            warm_up(model, budget, plan.precision, self._scorer)

    def __call__(self, rows: pa.Table) -> pa.Table:
        with _memory_told(self._plan):
            records = [self.write_bucket(bucket) for bucket in rows["bucket"].to_pylist()]
        return pa.table({"record": [json.dumps(record) for record in records]})

    def write_bucket(self, bucket: int) -> Record:
        """Writes one bucket's file; its record, of no file if nobody is asked about in it."""
        started = _clocks()
        self._run.begin(bucket, f"{self._plan.section}.batch_bytes")
        record: Record = {"bucket": bucket, "begun_at": time.time(), "num_requests": 0, "num_users": 0, "num_scores": 0}
        num_checked = self._plan.check_requests if self._scorer else 0
        num_requests, items = self._reader.num_requests(bucket), self._answers.items
        numbers = chosen_numbers(num_requests, num_checked)
        others = num_left_out(num_requests, len(items.item_id_I), len(numbers)) if items else 0
        check = OnlineCheck(self._plan, self._scorer, items, numbers, others)
        with collected_ms() as stages:
            written = write_rows(self._run.version_path, self._run.file_of(bucket), self._parts(bucket, check, record))
        record |= {
            "done_at": time.time(),
            "stages_ms": stages,
            "actor": self._actor,
            "file": asdict(written) if written else None,
            "device": self._plan.device,
            **self._charge(started),
            "check_requests": self._plan.check_requests,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if self._plan.device == "cuda" else 0,
            "max_abs_diff": check.max_abs_diff,
            "num_compared": check.num_compared,
        }
        return remember_bucket(self._run.version_path, record)

    def _charge(self, started: tuple[float, float]) -> dict[str, float]:
        """Seconds since then, of the device and of CPUs, that no other bucket of this actor has been charged for."""
        with self._charging:
            now = _clocks()
            device_s, cpu_s = (
                end - max(begin, last) for end, begin, last in zip(now, started, self._charged, strict=True)
            )
            self._charged = now
        return {"device_s": device_s * self._plan.device_share, "cpu_s": cpu_s}

    def _parts(self, bucket: int, check: OnlineCheck, record: Record) -> Iterator[pa.Table]:
        """The rows of each chunk, which is read while the one before it is scored; counts them, and compares some.

        Scored in the thread that asked for the bucket: others get memory for large tensors anew each time, which costs a tenth.
        """
        last_user, chunks = None, prefetch(self._reader.chunks(bucket), 1)
        while True:
            with stage("read"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            with stage("queue"):
                self._device.acquire()
            try:
                rows = self._answers.rows(chunk)
                check.see(chunk, rows)
            finally:
                self._device.release()
            record["num_requests"] += len(rows)
            begun_before = (
                chunk.user_id_R[0] == last_user
            )  # the chunk goes on with the user that the last one ended with
            record["num_users"] += len(np.unique(chunk.questions.row_R)) - begun_before
            last_user = chunk.user_id_R[-1]
            record["num_scores"] += self._answers.num_scores(chunk)
            yield rows


def _clocks() -> tuple[float, float]:
    """Now, and the seconds that this process has had of CPUs."""
    return time.perf_counter(), time.process_time()


@contextmanager
def _memory_told(plan: Plan) -> Iterator[None]:
    """A GPU without room for what is computed is the settings' mistake."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{plan.section}: an actor's GPU has no memory left: lower {plan.section}.batch_bytes ({plan.batch_bytes}), or raise "
            f"num_gpus_per_scorer ({plan.device_share}) so that fewer actors share it: {error}".splitlines()[0]
        ) from error


def batch_score(settings: Settings) -> Version:
    """The published scores of what the settings ask, by the served checkpoint; a finished run is found and nothing changes."""
    return _run(plan_scores(settings), settings.batch_score, settings.ray, "batch_score")


def export_vectors(settings: Settings) -> Version:
    """The published vectors of the users, by the served checkpoint; a finished run is found and nothing changes."""
    return _run(plan_vectors(settings), settings.export_embeddings, settings.ray, "export_embeddings")


def _run(plan: Plan, pool: ScorerPool, where: RaySettings, job: str) -> Version:
    table = Table(plan.table_path)
    if published := table.reuse(plan.version_id):
        remove_tree(scratch(published.path))  # if a run was killed before it could
        say(job, f"version {plan.version_id} is already there, nothing changed{_less_checked(published, plan)}")
        return published
    run = Run(table.resume(plan.version_id))
    check_model(plan)
    try:
        manifest, files = _scored(plan, pool, where, run, job)
    except Exception:  # of any kind: the faster run has removed what this one reads
        if not (published := table.find(plan.version_id)):
            raise
    else:
        published = table.find(plan.version_id)
    told = "another run has published it meanwhile, which is used" if published else in_words(manifest)
    version = published or table.publish(plan.version_id, manifest, files)
    remove_unnamed(version, run)
    remove_tree(scratch(version.path))
    say(job, f"version {version.id}: {told}")
    return version


def _less_checked(published: Version, plan: Plan) -> str:
    """If fewer requests of its buckets were compared than are asked for now: the rows would be the same."""
    was = published.manifest["online_check"].get("check_requests", plan.check_requests)
    if was >= plan.check_requests:
        return ""
    return f", {was} requests of each bucket compared: for {plan.check_requests}, remove {published.path} and run again"


def _scored(
    plan: Plan, pool: ScorerPool, where: RaySettings, run: Run, job: str
) -> tuple[dict[str, Any], list[DataFile]]:
    """The manifest and the files of all buckets, once those that are missing are done."""
    buckets, done = spooled_buckets(plan, run), done_buckets(run.version_path)
    missing = [bucket for bucket in buckets if bucket not in done]
    if done:
        say(job, f"{len(buckets) - len(missing)} of {len(buckets)} buckets are there from an interrupted run")
    started, started_at = time.perf_counter(), time.time()
    fresh = _score_buckets(plan, pool, where, run, missing, job) if missing else []
    seconds = time.perf_counter() - started
    start_s = min((record["begun_at"] for record in fresh), default=started_at) - started_at
    records = [done[bucket] for bucket in buckets if bucket in done] + fresh
    manifest = {
        **plan.manifest,
        **totals_of(records),
        "seconds": seconds,
        "start_s": start_s,  # of them, until the first actor was there with its model
        **rates_of(fresh, seconds - start_s),
        "actors": actors_of(fresh, started_at),
    }
    return manifest, [DataFile(**record["file"]) for record in records if record["file"]]


def spooled_buckets(plan: Plan, run: Run) -> list[int]:
    """Copies the files that name users and candidates, which may change, for the actors. The buckets to do, as `_buckets`."""
    if plan.candidates:
        spool(plan.candidates, plan.inputs["candidates"], run.candidates)
    return _buckets(plan, run)


def _buckets(plan: Plan, run: Run) -> list[int]:
    """The buckets in which somebody is asked about, those with most first, so that none is waited for at the end."""
    if plan.users:
        num_buckets = plan.sequences.manifest["settings"]["num_buckets"]
        count_P = spread(plan.users, plan.inputs["users"], num_buckets, run.users)
        return [int(bucket) for bucket in np.argsort(-count_P, kind="stable") if count_P[bucket]]
    if plan.kind == "requests":
        requests = RequestTable(f"{plan.root}/tables/requests", plan.schema, plan.inputs["requests"]).version
        prefix = f"split={plan.split}/bucket="
        files = [file for file in requests.data_files() if file.path.startswith(prefix)]
        largest_first = sorted(files, key=lambda file: (-file.num_bytes, file.path))
        return list(dict.fromkeys(int(file.path.removeprefix(prefix)[:4]) for file in largest_first))
    return SequenceTable(f"{plan.root}/tables/sequences", plan.schema, plan.sequences.id).buckets


def scorer_options(pool: ScorerPool, where: RaySettings) -> dict[str, Any]:
    """Ray's options of an actor of the pool."""
    return where.options(num_cpus=1, num_gpus=pool.num_gpus_per_scorer)


def _score_buckets(
    plan: Plan, pool: ScorerPool, where: RaySettings, run: Run, buckets: list[int], job: str
) -> list[Record]:
    """Records of the buckets, as the actors finish them. An actor that dies is started again, and so is its bucket."""
    if where.cluster is None and pool.num_gpus_per_scorer > ray.cluster_resources().get("GPU", 0):
        raise UserError(
            f"{plan.section}.num_gpus_per_scorer={pool.num_gpus_per_scorer}: this machine has no such GPUs, and its Ray would "
            "wait for ever: set 0, or the address of a cluster that has some"
        )
    fewest, most = (min(number, len(buckets)) for number in pool.concurrency)
    at_once = _BUCKETS_AT_ONCE[plan.device]
    rows = ray.data.from_items([{"bucket": bucket} for bucket in buckets], override_num_blocks=len(buckets))
    with roll() as actors:
        written = rows.map_batches(
            BucketScorer,
            fn_constructor_args=(plan, run, actors),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=fewest,
                max_size=most,
                max_tasks_in_flight_per_actor=2,  # one at least waits, or is read, where another is scored
                enable_true_multi_threading=at_once > 1,
                max_concurrent_calls_per_actor=at_once,
            ),
            **scorer_options(pool, where),
        )
        records: list[Record] = []

        def seconds() -> float:
            return time.time() - min(record["begun_at"] for record in records)  # actors have started before that

        def note() -> str:
            rates = rates_of(records, seconds())
            return f"{rates['rows_per_s']:.0f} scores/s, {rates['users_per_s']:.1f} users/s{cost_in_words(totals_of(records))}"

        def finished() -> Iterator[Record]:
            for row in written.iter_rows():
                records.append(json.loads(row["record"]))
                yield records[-1]

        return list(track(finished(), len(buckets), job.replace("_", " "), "buckets", note, seconds))


def check_against_online(settings: Settings, scored: Version) -> Version:
    """How far the batch scores are from those that the serving check got over HTTP: a record in the manifest, next to them.

    `max_abs_diff_vs_online` is null if no request was scored by both.
    """
    online = Table(settings.path("serving_check")).current()
    if online and online.manifest["inputs"] != scored.manifest["inputs"]:
        online = None
    table = Table(settings.path("batch_scores", "check"))
    version_id = fingerprint("batch_check", TABLE_FORMAT, scored.id, online and online.id)
    if published := table.reuse(version_id):
        return published
    record: dict[str, Any] = {
        "rows": scored.manifest["num_rows"],
        "rows_per_s": scored.manifest["rows_per_s"],
        "seconds": scored.manifest["seconds"],
        "max_abs_diff_vs_online": None,
        "compared_requests": 0,
    }
    if online:
        asked = read_scores(online)
        ours = read_scores(scored, asked["request_id"].to_numpy())
        diff, compared = check_difference(asked, ours, settings.train.tasks)
        record |= {"max_abs_diff_vs_online": diff if compared else None, "compared_requests": compared}
    about = {
        "schema_hash": settings.event_schema.hash(),
        "inputs": {"batch_scores": scored.id, "serving_check": online and online.id},
    }
    return table.publish(version_id, {**about, **record}, [])
