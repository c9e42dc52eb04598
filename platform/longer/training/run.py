"""The driver's side of training: starts or resumes a run on Ray Train and publishes its best checkpoint."""

import math
import os
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from longer.config import Settings
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.progress import say
from longer.storage import Table, Version, arrow_filesystem, fingerprint, read_bytes, write_bytes
from longer.training.checkpoints import FORMAT_VERSION, load_model, read_trainer_state
from longer.training.loop import train_worker
from longer.training.relay import relayed_lines

_HOW_NOT_WHAT = {"num_workers", "use_gpu", "max_failures", "keep_checkpoints"}
"""Settings that do not change what is learned: an interrupted run may go on with other values."""


def train(settings: Settings) -> Version:
    """A published version of the checkpoints table: the best model by validation, its metrics and history in the manifest.

    A finished run is found and nothing changes; an interrupted one goes on from its last checkpoint.
    """
    schema = settings.event_schema
    requests = RequestTable(settings.path("tables", "requests"), schema).version
    versions = {"requests": requests.id, "sequences": requests.manifest["inputs"]["sequences"]}
    SequenceTable(settings.path("tables", "sequences"), schema, versions["sequences"])
    _check_split(requests, "train", "lower requests.test_days_share and validation_days_share")
    _check_split(requests, "valid", "raise requests.validation_days_share")
    chosen = {
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude=_HOW_NOT_WHAT),
        "seed": settings.seed,
    }
    run_id = fingerprint("checkpoint", FORMAT_VERSION, chosen, versions, schema.hash())
    table = Table(settings.path("checkpoints"))
    if published := table.reuse(run_id):
        say("train", f"run {run_id} is already finished, nothing changed")
        return published
    table.claim()
    result = _fit(settings, versions, run_id)
    manifest = {"schema_hash": schema.hash(), "settings": chosen, "inputs": versions}
    version = _publish(table, run_id, result, manifest)
    say("train", f"run {run_id}: best checkpoint is step {version.manifest['step']}, {version.manifest['validation']}")
    return version


def worker_options(settings: Settings) -> ScalingConfig:
    """How many workers there are, and what each asks Ray for."""
    asked = settings.train
    return ScalingConfig(
        num_workers=asked.num_workers,
        use_gpu=asked.use_gpu,
        label_selector=settings.ray.place(asked.use_gpu),  # type: ignore[call-arg]
    )


def _fit(settings: Settings, versions: dict[str, str], run_id: str) -> Result:
    asked = settings.train
    _check_cluster(settings)
    storage = settings.path("training")
    filesystem, bare = arrow_filesystem(storage)
    on_s3 = storage.startswith("s3://")
    # Workers print their own progress; Ray's copy of each line, its state machine and reports stay in the session's log files.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    with relayed_lines() as lines:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"settings": settings, "versions": versions, "lines": lines},
            scaling_config=worker_options(settings),
            run_config=RunConfig(
                name=run_id,
                storage_path=bare if on_s3 else os.path.abspath(storage),
                storage_filesystem=filesystem if on_s3 else None,
                failure_config=FailureConfig(max_failures=asked.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=asked.keep_checkpoints, checkpoint_score_attribute="score"
                ),
                logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            ),
        )
        return trainer.fit()


def _publish(table: Table, run_id: str, result: Result, manifest: dict[str, Any]) -> Version:
    """Copies the best model; the history is the last checkpoint's, which holds all of it."""
    assert result.best_checkpoints
    assert result.checkpoint
    best, reported = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    path = table.begin(run_id)
    with best.as_directory() as directory:
        for file in ("model.safetensors", "model.json"):
            write_bytes(f"{path}/{file}", read_bytes(f"{directory}/{file}"))
    with result.checkpoint.as_directory() as directory:
        history = read_trainer_state(directory).history
    model, info = load_model(path)
    about = {
        "model_version": info.model_version,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step": reported["step"],
        "validation": reported["validation"],
        "history": history,
    }
    return table.publish(run_id, {**manifest, **about})


def _check_split(requests: Version, split: str, remedy: str) -> None:
    if not requests.manifest["num_requests"][split]:
        raise UserError(
            f"{requests.path}: no requests in the {split} split: {remedy}, then run `python -m jobs.build_requests`"
        )


def _check_cluster(settings: Settings) -> None:
    """Ray would wait for ever for workers that a local Ray cannot hold; a cluster may still grow."""
    kind = "GPU" if settings.train.use_gpu else "CPU"
    there = math.floor(ray.cluster_resources().get(kind, 0))
    if settings.ray.cluster is None and settings.train.num_workers > there:
        raise UserError(
            f"train.num_workers={settings.train.num_workers}: this Ray has {there} {kind}s, one is needed a worker: "
            f"lower num_workers{' or raise ray.num_cpus' if kind == 'CPU' else ''}"
        )
