"""Offline runs on Ray Data: one row a bucket of users, a pool of actors that each hold the model.

Each bucket becomes one file, whole or not at all, under a version whose id is decided by everything that goes into it. So an
interrupted run keeps its finished buckets, a dead actor or node costs its bucket only, and a finished run is found.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data

from longer.batch_settings import ScorerPool
from longer.config import RaySettings, Settings
from longer.data.id_lists import spool, spread
from longer.data.layout import bucket_files
from longer.data.records import Record, scratch
from longer.errors import UserError
from longer.files import remove_tree, write_bytes
from longer.progress import say, track
from longer.serving.batch_alive import marked_alive, meanwhile
from longer.serving.batch_output import Run, done_buckets, remove_unnamed
from longer.serving.batch_plan import Plan, check_model, plan_scores, plan_vectors
from longer.serving.batch_roll import roll
from longer.serving.batch_scorer import BucketScorer
from longer.serving.batch_totals import Progress, actors_of, held_device_s, in_words, rates_of, totals_of
from longer.storage import DataFile, Table, Version

_BUCKETS_AT_ONCE = {"cpu": 1, "cuda": 2}
"""In an actor: on a GPU one is read and written while another is scored. A CPU has nothing to wait for."""

_FIRST_TOLD_EVERY_S = 15.0


def batch_score(settings: Settings) -> Version:
    """The published scores of what the settings ask, by the served checkpoint; a finished run is found and nothing changes."""
    return _run(lambda: plan_scores(settings), settings.batch_score, settings.ray, "batch_score")


def export_vectors(settings: Settings) -> Version:
    """The published vectors of the users, by the served checkpoint; a finished run is found and nothing changes."""
    return _run(lambda: plan_vectors(settings), settings.export_embeddings, settings.ray, "export_embeddings")


def _run(asked: Callable[[], Plan], pool: ScorerPool, where: RaySettings, job: str) -> Version:
    started_at = time.time()
    plan = asked()  # which reads the users' and candidates' lists
    table = Table(plan.table_path)
    if published := table.reuse(plan.version_id):
        remove_unnamed(Run(published.path))  # if a run was killed before it could
        remove_tree(scratch(published.path))
        say(job, f"version {plan.version_id} is already there, nothing changed{_less_checked(published, plan)}")
        return published
    run = Run(table.resume(plan.version_id))
    table.sweep(plan.version_id, plan.mark)
    write_bytes(f"{run.version_path}/{plan.mark}", b"")
    check_model(plan)
    with marked_alive(run.alive) if run.is_on_s3 else nullcontext():  # until its files are named, or removed by itself
        told = _publish(table, plan, run, partial(_scored, plan, pool, where, run, job, started_at))
        remove_unnamed(run)
    version = table.find(plan.version_id)  # of two runs that have published it at once, the later one's
    if version is None:
        raise UserError(
            f"{run.version_path}: another run has found it damaged and is at it: run again when it is through"
        )
    remove_tree(scratch(version.path))
    say(job, f"version {version.id}: {told}")
    return version


def _publish(table: Table, plan: Plan, run: Run, scored: Callable[[], tuple[dict[str, Any], list[DataFile]]]) -> str:
    """Publishes what is scored, if no other run of the version has meanwhile; which of both, in words."""
    try:
        manifest, files = scored()
    except Exception as error:  # of any kind: a faster run has removed what this one reads
        if _is_failed_check(error) or not table.find(plan.version_id):
            raise
    else:
        if not table.find(plan.version_id):
            table.publish(plan.version_id, manifest, files)
            return in_words(manifest)
    return "another run has published it meanwhile, which is used"


def _is_failed_check(error: BaseException) -> bool:
    """Scores that differ from the serving path's stay an error, whoever has published others. Ray Data keeps its text only."""
    return isinstance(error, ArithmeticError) or re.search(r"^ArithmeticError: ", str(error), re.MULTILINE) is not None


def _less_checked(published: Version, plan: Plan) -> str:
    """If fewer requests of its buckets were compared than are asked for now: the rows would be the same."""
    was = published.manifest["online_check"].get("check_requests", plan.check_requests)
    if was >= plan.check_requests:
        return ""
    return f", {was} requests of each bucket compared: for {plan.check_requests}, remove {published.path} and run again"


def _scored(
    plan: Plan, pool: ScorerPool, where: RaySettings, run: Run, job: str, started_at: float
) -> tuple[dict[str, Any], list[DataFile]]:
    """The manifest and the files of all buckets, once those that are missing are done."""
    buckets, done = spooled_buckets(plan, run), done_buckets(run.version_path)
    missing = {bucket: size for bucket, size in buckets.items() if bucket not in done}
    if done:
        say(job, f"{len(buckets) - len(missing)} of {len(buckets)} buckets are there from an interrupted run")
    fresh, left = list[Record](), missing
    while left:  # again, if what had waited died with an actor
        fresh += _score_buckets(plan, pool, where, run, left, job)
        scored = {record["bucket"] for record in fresh}
        left = {bucket: size for bucket, size in missing.items() if bucket not in scored}
    seconds = time.time() - started_at
    start_s = min((record["begun_at"] for record in fresh), default=started_at) - started_at
    records = [done[bucket] for bucket in buckets if bucket in done] + fresh
    manifest = {
        **plan.manifest,
        **totals_of(records),
        "seconds": seconds,
        "start_s": start_s,  # of them, until lists were read and the first actor was there with its model
        **rates_of(fresh, seconds - start_s),
        "held_device_s": held_device_s(fresh, plan.device_share, time.time()),  # by this run, with what waited
        "lost_attempts": sum(map(len, run.begun.values())),  # of this run, at buckets, which others have done since
        "actors": actors_of(fresh, started_at),
    }
    return manifest, [DataFile(**record["file"]) for record in records if record["file"]]


def spooled_buckets(plan: Plan, run: Run) -> dict[int, int]:
    """Copies the files that name users and candidates, which may change, for the actors. The buckets to do, as `_buckets`."""
    if plan.candidates:
        spool(plan.candidates, plan.inputs["candidates"], run.candidates)
    return _buckets(plan, run)


def _buckets(plan: Plan, run: Run) -> dict[int, int]:
    """The buckets in which somebody is asked about, and how much that is in users or bytes of their tables.

    Those with most come first, so that none is waited for at the end.
    """
    if plan.users:
        num_buckets = plan.sequences.manifest["settings"]["num_buckets"]
        count_P = spread(plan.users, plan.inputs["users"], num_buckets, run.users)
        return {int(bucket): int(count_P[bucket]) for bucket in np.argsort(-count_P, kind="stable") if count_P[bucket]}
    if plan.kind == "requests":
        sizes = {bucket: sum(file.num_bytes for file in files) for bucket, files in plan.request_files.items()}
    else:
        sizes = {bucket: files.rows.num_bytes for bucket, files in bucket_files(plan.sequences).items()}
    return dict(sorted(sizes.items(), key=lambda of_bucket: -of_bucket[1]))


def scorer_options(pool: ScorerPool, where: RaySettings) -> dict[str, Any]:
    """Ray's options of an actor of the pool."""
    return where.options(num_cpus=1, num_gpus=pool.num_gpus_per_scorer)


def _score_buckets(
    plan: Plan, pool: ScorerPool, where: RaySettings, run: Run, buckets: dict[int, int], job: str
) -> list[Record]:
    """Records of the buckets, of these sizes, as the actors finish them. An actor that dies is started again, and so is its
    bucket."""
    if where.cluster is None and pool.num_gpus_per_scorer > ray.cluster_resources().get("GPU", 0):
        raise UserError(
            f"{plan.section}.num_gpus_per_scorer={pool.num_gpus_per_scorer}: this machine has no such GPUs, and its Ray would "
            "wait for ever: set 0, or the address of a cluster that has some"
        )
    fewest, most = (min(number, len(buckets)) for number in pool.concurrency)
    at_once = _BUCKETS_AT_ONCE[plan.device]
    # One bucket at least waits, or is read, where another is scored. A pool grows only where as many wait as are worked on; others
    # wait for whichever actor is free first.
    in_flight = 2 if fewest == most else 2 * at_once
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
                max_tasks_in_flight_per_actor=in_flight,
                enable_true_multi_threading=at_once > 1,
                max_concurrent_calls_per_actor=at_once,
            ),
            **scorer_options(pool, where),
        )
        progress = Progress(job, buckets, run)

        def finished() -> Generator[Record]:
            # Not iter_rows: it keeps each row until the next block is there, and a record is clocked as it comes.
            blocks = written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for together in cast("Iterable[pa.Table]", blocks):
                yield from (progress.add(json.loads(record)) for record in together["record"].to_pylist())

        say(job, f"waiting for {fewest} {'actor' if fewest == 1 else 'actors'} to start")
        with (
            meanwhile(progress.tell_of_the_first, _FIRST_TOLD_EVERY_S),
            closing(finished()) as fresh,
        ):  # else, of an error here, Ray Data's own end would wait for a Ray that is gone
            told = progress.note, progress.seconds, progress.part_done
            return list(track(fresh, len(buckets), job.replace("_", " "), "buckets", *told))
