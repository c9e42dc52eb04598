"""The driver's side of training: starts or resumes a run on Ray Train and publishes its checkpoint."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train import (
    Checkpoint,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from longer.config import Settings
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import StorageError, UserError
from longer.files import arrow_filesystem, read_bytes, write_bytes
from longer.model.flops import longer_flops, longer_parameters
from longer.progress import say
from longer.runner import user_error_in
from longer.storage import Table, Version, fingerprint
from longer.training.checkpoints import FORMAT_VERSION, check_start, check_upstream, load_model
from longer.training.content import Job
from longer.training.lineage import finished, later, past_of
from longer.training.loop import train_worker
from longer.training.metrics import shown_all
from longer.training.reading import request_files
from longer.training.relay import relayed_lines
from longer.training.runs import (
    KeepBestAndLast,
    best_that_is_whole,
    mend_record,
    note_start,
    remove_old_runs,
    step_folder,
    tell_what_is_left,
)
from longer.training.trainer_state import TRAINER_VERSION, TrainerState, read_trainer_state

_KEPT = {"keep_checkpoints", "keep_runs"}
_HOW_NOT_WHAT = {"num_workers", "use_gpu", "max_failures", "max_tokens_per_batch", "table_sharding", *_KEPT}
"""Settings that do not change what is learned: an interrupted run may go on with other values."""

_WAIT_FOR_MORE_WORKERS_S = "10"
"""Ray counts on a lost node for up to 20 s; then it would wait a minute for workers there, where fewer would do."""


def train(settings: Settings, start_from: str | None = None) -> Version:
    """A published version of the checkpoints table: its metrics and history are in the manifest.

    It is the model that was best by validation at the end of an epoch: one that has trained every request of the split, each as
    often as the others. With `start_from`, the path of a checkpoint, its weights are the first ones. A finished run is found and
    trains nothing; it is served, unless what is served comes from it. An interrupted one goes on from its last checkpoint.
    """
    requests, versions = pin_tables(settings)
    _check_split(requests, "train", "lower requests.test_days_share and validation_days_share")
    _check_split(requests, "valid", "raise requests.validation_days_share")
    chosen = chosen_settings(settings)
    start = check_start(start_from, settings) if start_from else None
    tower = None if start else check_upstream(settings.model)
    first = {"from": start.model_version} if start else {"tower": tower.model_version} if tower else {}
    run_id = fingerprint(
        "checkpoint", FORMAT_VERSION, TRAINER_VERSION, chosen, versions, settings.event_schema.hash(), first
    )
    table = Table(settings.path("checkpoints"))
    if published := finished(table, run_id):
        return published
    _say_cost(settings, requests)
    own_until = requests.manifest["valid_from"]
    past = past_of(start_from, tower, own_until)
    table.claim()
    run_path = settings.path("training", run_id)
    state = read_trainer_state(fit(Job(settings, versions, start_from), run_id))
    best = best_that_is_whole(run_path, state.checkpoints)
    (validation,) = (r["validation"] for r in state.history if r["step"] == best["step"] and "validation" in r)
    trained = {"requests": requests.id, "split": "train", "until": own_until, "epochs": state.epochs}
    about = {
        "inputs": versions,
        "settings": chosen,
        **first,
        "base": past.version,
        "step": best["step"],
        "validation": validation,
        "validation_may_be_seen": past.is_leaking,
        "trained": [*past.trained, {**trained, "published_after_epochs": best["epochs"]}],
        "trained_until": later(own_until, past.until),
        "upstream": past.upstream,
    }
    version = publish(settings, table, run_id, f"{run_path}/{step_folder(best['step'])}", state, about)
    after = f"epoch {best['epochs']} of {settings.train.epochs}, step {best['step']}"
    unscored = "" if best["score"] is not None else ", the last one: no epoch's validation score is defined"
    shown = f"validation {shown_all(validation)}{of_skipped(state)}"
    say("train", f"run {run_id}: published as it was after {after}{unscored}: {shown}")
    if any((of_task.get("ne") or 0) > 1 for of_task in validation.values()):
        remedy = "raise train.epochs, or lower train.tokens_per_step, for more steps"
        say("train", f"ne above 1, after {best['step']} steps: worse than the mean label for every candidate: {remedy}")
    return version


def of_skipped(state: TrainerState) -> str:
    """What a run's last line says of requests that it counts as trained and that changed nothing; nothing if there are none."""
    num_requests = state.skipped["requests"]
    return f"; {num_requests} requests changed nothing: gradients were not finite" if num_requests else ""


def pin_tables(settings: Settings) -> tuple[Version, dict[str, str]]:
    """The served requests, and the ids of the versions that a run on them reads."""
    schema = settings.event_schema
    requests = RequestTable(settings.path("tables", "requests"), schema).version
    versions = {"requests": requests.id, "sequences": requests.manifest["inputs"]["sequences"]}
    SequenceTable(settings.path("tables", "sequences"), schema, versions["sequences"])
    return requests, versions


def chosen_settings(settings: Settings) -> dict[str, Any]:
    """The settings that decide what is learned."""
    return {
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude=_HOW_NOT_WHAT),
        "seed": settings.seed,
    }


def worker_options(settings: Settings) -> ScalingConfig:
    """How many workers there are, and what each asks Ray for."""
    asked = settings.train
    return ScalingConfig(
        num_workers=asked.num_workers,  # type: ignore[arg-type]
        use_gpu=asked.use_gpu,
        label_selector=settings.ray.place(asked.use_gpu),  # type: ignore[call-arg]
    )


class EndAtMistakes(UserCallback):
    """What a user must put right first ends the run at once: Ray would start workers again, to fail in the same way.

    A file that cannot be read may be readable to the next ones.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            mistake = user_error_in(error)
            if mistake and not isinstance(mistake, StorageError):
                raise ControllerError(mistake)


def fit(job: Job, run_id: str) -> str:
    """Trains to the end, from the last checkpoint of a run of this id if there is one; returns the path of the last one."""
    settings = job.settings
    asked = settings.train
    _check_cluster(settings)
    storage = settings.path("training")
    filesystem, bare = arrow_filesystem(storage)
    on_s3 = storage.startswith("s3://")
    # Workers print their own progress; Ray's copy of each line, its state machine and reports stay in the session's log files.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if settings.ray.cluster is None:  # nobody takes this machine away
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    mend_record(f"{storage}/{run_id}")
    tell_what_is_left(storage, Table(settings.path("checkpoints")), run_id, job.versions["requests"])
    note_start(f"{storage}/{run_id}", job.versions["requests"], job.base)
    say("train", "reading the requests")
    if isinstance(asked.num_workers, tuple):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WAIT_FOR_MORE_WORKERS_S)
    with request_files(job) as requests, relayed_lines() as lines, interrupts_as_before():
        say("train", "starting workers")
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job, "requests": requests, "lines": lines, "start": start_of(job.weights)},
            scaling_config=worker_options(settings),
            run_config=RunConfig(
                name=run_id,
                storage_path=bare if on_s3 else os.path.abspath(storage),
                storage_filesystem=filesystem if on_s3 else None,
                failure_config=FailureConfig(max_failures=asked.max_failures),
                callbacks=[EndAtMistakes(), KeepBestAndLast(f"{storage}/{run_id}")],  # type: ignore[list-item]
                logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            ),
        )
        last = trainer.fit().checkpoint
    assert last
    return f"{storage}/{run_id}/{os.path.basename(last.path)}"


def start_of(path: str | None) -> Checkpoint | None:
    """What all workers start from; the same object for all, so that a node copies it from S3 once."""
    if path is None:
        return None
    filesystem, bare = arrow_filesystem(path)
    return Checkpoint(bare, filesystem)


@contextmanager
def interrupts_as_before() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, here and afterwards.

    Ray Train's handler ends the process without a word while workers train; it stays when they have ended, and then lets the first
    two go by without effect.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # Ray's handler of that; Ray Train's ends with 0, or with 1 while Ray waits
            raise
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def publish(
    settings: Settings, table: Table, run_id: str, chosen: str, state: TrainerState, about: dict[str, Any]
) -> Version:
    """Copies the model of the checkpoint at `chosen`; the history is `state`'s, which holds all. Old runs' checkpoints go."""
    path = table.begin(run_id)
    for file in ("model.safetensors", "model.json"):
        write_bytes(f"{path}/{file}", read_bytes(f"{chosen}/{file}"))
    model, info = load_model(path)
    of_model = {
        "schema_hash": info.schema.hash(),
        "model_version": info.model_version,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    version = table.publish(run_id, {**about, **of_model, "skipped": state.skipped, "history": state.history})
    remove_old_runs(settings.path("training"), table, settings.train.keep_runs)
    return version


def _say_cost(settings: Settings, requests: Version) -> None:
    """By the paper's formulas; other encoders' costs are counted by `benchmarks.quality`."""
    model = settings.model
    if model.encoder.kind != "longer":
        return
    num_candidates = round(requests.manifest["num_candidates"]["train"] / requests.manifest["num_requests"]["train"])
    num_groups = model.history_events // model.merge_size
    cost = longer_flops(model, num_groups, min(model.query_groups, num_groups), num_candidates)
    say(
        "train",
        f"layers of {longer_parameters(model):,} weights; a request of {model.history_events:,} events and {num_candidates} "
        f"candidates takes {cost / 1e6:,.0f} MFLOPs",
    )


def _check_split(requests: Version, split: str, remedy: str) -> None:
    if not requests.manifest["num_requests"][split]:
        raise UserError(
            f"{requests.path}: no requests in the {split} split: {remedy}, then run `python -m jobs.build_requests`"
        )


def _check_cluster(settings: Settings) -> None:
    """Ray would wait for ever for workers that a local Ray cannot hold; a cluster may still grow."""
    kind = "GPU" if settings.train.use_gpu else "CPU"
    there = math.floor(ray.cluster_resources().get(kind, 0))
    if settings.ray.cluster is None and settings.train.min_workers > there:
        raise UserError(
            f"train.num_workers={settings.train.num_workers}: this Ray has {there} {kind}s, one is needed a worker: "
            f"lower num_workers or {'leave out train.use_gpu' if settings.train.use_gpu else 'raise ray.num_cpus'}"
        )
