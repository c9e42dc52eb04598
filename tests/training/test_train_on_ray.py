"""Training and evaluation on a real local Ray: killed workers, other numbers of workers, reruns and bad inputs."""

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import ray.train.collective
import safetensors.torch
import torch
from ray.train import TrainingFailedError

from jobs import evaluate, train
from longer.config import Settings
from longer.data.scores import read_scores
from longer.data.tables import RequestTable
from longer.errors import UserError
from longer.files import write_bytes
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model_settings import ModelSettings
from longer.runner import user_error_in
from longer.storage import Table, Version
from longer.training import loop, upload
from longer.training.checkpoints import load_model, save_weights, weights_of
from longer.training.content import tally
from longer.training.cursor import Position
from longer.training.loop import Run, train_worker
from longer.training.metrics import auc
from longer.training.runs import RECORD, step_folder
from longer.training.trainer_state import TrainerState, read_trainer_state
from tests.data.test_build_on_ray import run_all, settings_of
from tests.training.commits import wait_for_commit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

EVERY = 8
TRAIN = {"tokens_per_step": 320, "epochs": 2, "validate_every_steps": EVERY, "learning_rate": 0.01}  # 16 steps an epoch
DIES_AT_STEP = 13


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = settings_of(tmp_path_factory.mktemp("tables"), requests={"validation_days_share": 0.1})
    run_all(settings)
    return settings


def settings_for(tables: Settings, root: Path, **train_settings: Any) -> Settings:
    """Settings of a run in a folder of its own, on the tables that all tests share."""
    shutil.copytree(tables.path("tables"), root / "tables", dirs_exist_ok=True)
    model = {**tables.model.model_dump(), "item_rows": 211, "user_rows": 31, "event_width": 8, "num_heads": 2}
    changed = {"root": str(root), "model": model, "train": {**TRAIN, **train_settings}}
    return Settings(**{**tables.model_dump(), **changed})


def worker_that_is_killed(config: dict[str, Any]) -> None:
    """The worker function, but each of the first four starts ends with kill -9; `starts` gets a line each, where it begins.

    The first time a worker dies within an epoch, the second time the one that is uploading the checkpoint of the epoch's end,
    the third time the same with all files of it there, which Ray has not recorded yet, the fourth time one dies before the next
    epoch's first step, with that checkpoint committed.
    """
    root, rank = Path(config["job"].settings.root), ray.train.get_context().get_world_rank()
    start = len((root / "starts").read_text().split()) if (root / "starts").exists() else 0
    ray.train.collective.barrier()
    if rank == 0:
        checkpoint = ray.train.get_checkpoint()
        position = read_trainer_state(checkpoint.path).position if checkpoint else Position()
        with (root / "starts").open("a") as starts:
            starts.write(f"{position.epoch}/{position.step}\n")
    take_step, save = Run._step, upload.save_trainer

    def step(run: Run, work: Any) -> Any:
        within = start == 0 and rank == 1 and work.position == Position(0, DIES_AT_STEP)
        if within or (start == 3 and rank == 1 and work.position == Position(1, 0)):
            wait_for_commit(root, EVERY if within else 2 * EVERY)
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(run, work)

    def save_trainer(directory: str, moments: Any, state: TrainerState) -> None:
        if start == 1 and state.position == Position(1, 0):
            assert (Path(directory) / "model.json").exists()
            os.kill(os.getpid(), signal.SIGKILL)
        save(directory, moments, state)
        if start == 2 and state.position == Position(1, 0):  # which Ray hears of only after the upload
            os.kill(os.getpid(), signal.SIGKILL)

    Run._step, upload.save_trainer = step, save_trainer  # type: ignore[method-assign]
    train_worker(config)


@pytest.fixture(scope="module")
def trained(tables: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Version]:
    """A finished run of three workers, then one, then two; each time, some worker was killed."""
    root = tmp_path_factory.mktemp("trained")
    chosen = {"table_sharding": "rows", "max_tokens_per_batch": 150}  # two batches each of two workers, or four of one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longer.training.run.train_worker", worker_that_is_killed)
        for num_workers in (3, 1):
            with pytest.raises(TrainingFailedError):
                train.run(settings_for(tables, root, num_workers=num_workers, max_failures=0, **chosen))
        settings = settings_for(tables, root, num_workers=2, max_failures=2, **chosen)
        return settings, train.run(settings)


def test_kills_within_an_epoch_at_its_end_and_in_an_upload_cost_no_step_and_repeat_none(
    trained: tuple[Settings, Version],
) -> None:
    settings, version = trained
    assert (Path(settings.root) / "starts").read_text().split() == ["0/0", *[f"0/{EVERY}"] * 3, "1/0"]
    losses = [record["step"] for record in version.manifest["history"] if "loss" in record]
    validations = [record["step"] for record in version.manifest["history"] if "validation" in record]
    assert losses == list(range(1, 4 * EVERY + 1))
    assert validations == [EVERY, 2 * EVERY, 3 * EVERY, 4 * EVERY]


def test_a_run_with_kills_and_changing_workers_ends_where_an_undisturbed_one_does(
    trained: tuple[Settings, Version], tables: Settings, tmp_path: Path
) -> None:
    undisturbed_settings = settings_for(tables, tmp_path, num_workers=1)
    undisturbed = train.run(undisturbed_settings).manifest
    assert undisturbed["trained"] == trained[1].manifest["trained"]
    folder = Path(undisturbed_settings.path("training", undisturbed["version"]))
    kept = {3 * EVERY, 4 * EVERY, undisturbed["step"]}
    whole = {int(path.parent.name[5:]) for path in folder.glob("step_*/trainer.safetensors")}
    assert whole == kept, "the newest two checkpoints and the one that was published"
    assert list(folder.glob("tensorboard/events*"))
    ends = [[r for r in m["history"] if "validation" in r][-1] for m in (undisturbed, trained[1].manifest)]
    assert ends[1]["validation"]["label"]["logloss"] == pytest.approx(
        ends[0]["validation"]["label"]["logloss"], rel=1e-3
    )


def test_the_manifest_proves_that_each_epoch_trained_every_request_of_the_split_once(
    trained: tuple[Settings, Version],
) -> None:
    settings, version = trained
    table = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    ids = np.concatenate([table.read("train", bucket).request_id_R for bucket in range(table.num_buckets)])
    (trained_on,) = version.manifest["trained"]
    assert len(ids) == table.version.manifest["num_requests"]["train"]
    assert trained_on["epochs"] == [tally(ids)] * 2
    assert trained_on["published_after_epochs"] == version.manifest["step"] / (2 * EVERY)
    assert version.manifest["skipped"] == {"steps": 0, "requests": 0}
    assert trained_on["requests"] == table.version.id


def test_the_published_checkpoint_is_the_best_of_those_that_have_trained_their_whole_split(
    trained: tuple[Settings, Version],
) -> None:
    settings, version = trained
    scores = {r["step"]: r["validation"]["label"]["auc"] for r in version.manifest["history"] if "validation" in r}
    assert version.manifest["step"] == max((2 * EVERY, 4 * EVERY), key=lambda step: scores[step])
    assert (
        load_model(version.path, expected_schema=settings.event_schema)[1].model_version
        == version.manifest["model_version"]
    )


def test_training_learns(trained: tuple[Settings, Version]) -> None:
    losses = [record["loss"] for record in trained[1].manifest["history"] if "loss" in record]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3])


def test_a_finished_run_says_so_and_changes_nothing(
    trained: tuple[Settings, Version], capsys: pytest.CaptureFixture
) -> None:
    settings, version = trained
    before = {path: path.stat().st_mtime_ns for path in Path(settings.root).rglob("*.safetensors")}
    assert train.run(settings).manifest == version.manifest
    assert "already finished, nothing changed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path(settings.root).rglob("*.safetensors")} == before


def test_a_run_that_finished_but_was_not_published_is_published_without_training_again(
    trained: tuple[Settings, Version], tmp_path: Path
) -> None:
    settings, version = trained
    shutil.copytree(settings.path("training"), tmp_path / "training")
    again = train.run(settings_for(settings, tmp_path, num_workers=1))
    assert again.id == version.id
    for key in ("model_version", "step", "history"):
        assert again.manifest[key] == version.manifest[key]


@pytest.mark.parametrize("damage", ["half a record", "a checkpoint that is gone"])
def test_a_run_whose_record_a_kill_has_damaged_goes_on_from_its_newest_whole_checkpoint(
    damage: str, trained: tuple[Settings, Version], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings, version = trained
    shutil.copytree(settings.path("training"), tmp_path / "training")
    run = tmp_path / "training" / version.id
    if damage == "half a record":
        record = (run / RECORD).read_bytes()
        (run / RECORD).write_bytes(record[: len(record) // 2])
    else:
        shutil.rmtree(run / step_folder(4 * EVERY))
    again = train.run(settings_for(settings, tmp_path, num_workers=1))
    assert f"{RECORD} or its newest checkpoint was damaged: made anew from" in capsys.readouterr().err
    assert again.manifest["trained"][-1]["epochs"] == version.manifest["trained"][-1]["epochs"]
    assert [r["step"] for r in again.manifest["history"]] == [r["step"] for r in version.manifest["history"]]


def test_a_pool_that_no_node_belongs_to_is_told_and_does_not_hang(
    tables: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("_WAIT_IS_TOLD_AFTER_S", "_WAIT_ENDS_AFTER_S"):
        monkeypatch.setattr(f"longer.training.reading.{name}", 0.2)
    settings = settings_for(tables, tmp_path)
    labelled = settings.model_copy(update={"ray": settings.ray.model_copy(update={"pool_label": "nowhere.pool"})})
    with pytest.raises(UserError, match=r"no node that may read .*--labels nowhere.pool=cpu"):
        train.run(labelled)
    assert "waiting for a free CPU" in capsys.readouterr().err


def test_a_disk_that_a_worker_cannot_write_to_ends_the_run_with_one_line(tables: Settings, tmp_path: Path) -> None:
    settings = settings_for(tables, tmp_path, num_workers=1)
    (tmp_path / "scratch").touch()
    there = settings.ray.model_copy(update={"scratch": str(tmp_path / "scratch")})
    with pytest.raises(TrainingFailedError) as failed:
        train.run(settings.model_copy(update={"ray": there}))
    mistake = user_error_in(failed.value)
    assert str(mistake) == f"ray.scratch={tmp_path}/scratch: File exists: name a folder that every node can write to"


def with_overflows(take_step: Any, overflows: Any) -> Any:
    """A step that leaves gradients that are not finite where `overflows` says so of its number within the epoch."""

    def step(run: Run, work: Any) -> Any:
        run.stepper.optimizer.scaling.scale.fill_(torch.inf if overflows(work.position.step) else 1.0)
        return take_step(run, work)

    return step


def worker_in_trouble(config: dict[str, Any]) -> None:
    """The worker function, but the first upload fails half-way as S3 sometimes does, and two steps of each epoch overflow.

    The tables are gone by then: they have been read, once for all workers and all starts.
    """
    shutil.rmtree(config["job"].settings.path("tables"))
    save, failed = upload.save_trainer, []

    def save_trainer(directory: str, moments: Any, state: TrainerState) -> None:
        if not failed:
            failed.append(directory)
            raise OSError("AWS Error SLOW_DOWN during PutObject: please reduce your request rate")
        save(directory, moments, state)

    upload.save_trainer = save_trainer  # type: ignore[assignment]
    Run._step = with_overflows(Run._step, lambda step: step in (3, 4))  # type: ignore[method-assign]
    train_worker(config)


@pytest.fixture(scope="module")
def troubled(tables: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Version]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longer.training.run.train_worker", worker_in_trouble)
        asked = {"num_workers": 1, "validate_every_steps": 21, "max_failures": 0}
        settings = settings_for(tables, tmp_path_factory.mktemp("troubled"), **asked)
        return settings, train.run(settings)


def test_an_upload_that_is_tried_again_loses_no_checkpoint_and_a_checkpoint_no_loss(
    troubled: tuple[Settings, Version],
) -> None:
    """Losses since the last record are recorded at a checkpoint, or a run that is resumed there would not have them."""
    settings, version = troubled
    folder, steps = Path(settings.path("training", version.id)), (16, 21, 32)
    states = [read_trainer_state(str(folder / f"step_{step:07d}")) for step in steps if step in (21, 32)]
    assert [state.checkpoints[-1]["step"] for state in states] == [21, 32]
    assert [checkpoint["step"] for checkpoint in states[-1].checkpoints] == list(steps), "an epoch ends with one, too"
    assert set(steps) <= {record["step"] for record in version.manifest["history"] if "loss" in record}


def test_steps_that_changed_nothing_are_told_with_their_requests_and_are_not_trained_again(
    troubled: tuple[Settings, Version],
) -> None:
    _, version = troubled
    epochs, skipped = version.manifest["trained"][-1]["epochs"], version.manifest["skipped"]
    assert epochs[0] == epochs[1]
    assert skipped["steps"] == 4
    assert skipped["requests"] == pytest.approx(4 / 16 * epochs[0]["num_requests"], rel=0.5)
    told = [(r["skipped_steps"], r["skipped_requests"]) for r in version.manifest["history"] if "skipped_steps" in r]
    assert told[0] == (0, 0)
    assert told[-1] == (4, skipped["requests"])


def worker_that_never_learns(config: dict[str, Any]) -> None:
    """The worker function, but no step from the fourth on has finite gradients; `starts` gets a line for each start."""
    with (Path(config["job"].settings.root) / "starts").open("a") as starts:
        starts.write("start\n")
    loop._MOST_SKIPPED_IN_ROW = 6
    Run._step = with_overflows(Run._step, lambda step: step >= 3)  # type: ignore[method-assign]
    train_worker(config)


def test_a_mistake_that_a_worker_finds_ends_the_run_at_once_in_one_line(
    tables: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longer.training.run.train_worker", worker_that_never_learns)
    with pytest.raises(TrainingFailedError) as raised:
        train.run(settings_for(tables, tmp_path, num_workers=2, epochs=1, max_failures=3))
    assert str(user_error_in(raised.value)).startswith("training: the gradients of steps 4 to 9 are not finite")
    assert len((tmp_path / "starts").read_text().split()) == 2, "each of two workers started once"


def worker_of_which_an_epoch_teaches_nothing(config: dict[str, Any]) -> None:
    """The worker function, but no step of the second epoch has finite gradients: fewer than what ends a run within an epoch."""
    take_step = Run._step
    nothing = with_overflows(Run._step, lambda _: True)
    Run._step = lambda run, work: (nothing if work.position.epoch == 1 else take_step)(run, work)  # type: ignore[method-assign]
    train_worker(config)


def test_an_epoch_of_which_nothing_was_learned_is_not_passed_and_nothing_is_published(
    tables: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label without bounds in every step would end as a model of random weights that is served."""
    monkeypatch.setattr("longer.training.run.train_worker", worker_of_which_an_epoch_teaches_nothing)
    settings = settings_for(tables, tmp_path, num_workers=1, max_failures=0)
    with pytest.raises(TrainingFailedError) as raised:
        train.run(settings)
    assert re.match(r"training: the gradients of steps 17 to 32 are not finite", str(user_error_in(raised.value)))
    assert Table(settings.path("checkpoints")).current() is None


def test_a_model_worse_than_the_mean_label_says_so_and_what_to_do(
    tables: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A small log in a few steps of the default size would publish one without a word."""
    train.run(settings_for(tables, tmp_path, num_workers=1, epochs=1, learning_rate=1e-9, embedding_learning_rate=1e-9))
    assert "worse than the mean label for every candidate: raise train.epochs" in capsys.readouterr().err


def worker_on_a_full_disk(config: dict[str, Any]) -> None:
    """The worker function, but there is no room for the second file of a checkpoint."""

    def save_trainer(directory: str, moments: Any, state: TrainerState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload.save_trainer = save_trainer  # type: ignore[assignment]
    train_worker(config)


def test_a_full_disk_is_one_line_that_says_what_to_do(
    tables: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longer.training.run.train_worker", worker_on_a_full_disk)
    with pytest.raises(TrainingFailedError) as raised:
        train.run(settings_for(tables, tmp_path, num_workers=1, max_failures=3))
    assert "cannot be written (No space left on device): make room" in str(user_error_in(raised.value))


def worker_whose_user_gives_up(config: dict[str, Any]) -> None:
    """Sends Ctrl-C to the driver and waits for the end."""
    os.kill(int((Path(config["job"].settings.root) / "driver").read_text()), signal.SIGINT)
    time.sleep(600)


def test_ctrl_c_ends_training_as_an_interrupt_and_whatever_comes_after_it_too(
    tables: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train's own handler would end the process without a word, and stay: the pipeline's next stages could not be ended."""
    monkeypatch.setattr("longer.training.run.train_worker", worker_whose_user_gives_up)
    (tmp_path / "driver").write_text(str(os.getpid()))
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is none in a background job
    try:
        with pytest.raises(KeyboardInterrupt):
            train.run(settings_for(tables, tmp_path, num_workers=1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, of_pytest)


def test_one_and_two_workers_have_the_same_gradient_from_the_same_checkpoint(
    trained: tuple[Settings, Version], tables: Settings, tmp_path: Path
) -> None:
    moments, start = [], load_model(trained[1].path)[0].state_dict()
    for num_workers in (1, 2):
        one_step = {"num_workers": num_workers, "epochs": 1, "max_requests": 31, "tokens_per_step": 10_000}
        settings = settings_for(tables, tmp_path / str(num_workers), **one_step)
        run = train.run(settings, from_=trained[1].path)
        assert run.manifest["from"] == trained[1].manifest["model_version"]
        assert (run.manifest["base"], run.manifest["validation_may_be_seen"]) == (trained[1].id, False)
        largest_rate = settings.train.embedding_learning_rate
        for name, tensor in load_model(run.path)[0].state_dict().items():
            torch.testing.assert_close(tensor, start[name], rtol=1e-3, atol=1.01 * largest_rate)
        state = Path(settings.path("training", run.id, "step_0000001", "trainer.safetensors"))
        moments.append(safetensors.torch.load(state.read_bytes()))
    for name, moment in moments[0].items():  # after one step the first moment is a tenth of the gradient
        torch.testing.assert_close(moments[1][name], moment, rtol=1e-4, atol=1e-7)


def save_tower(settings: Settings, seed: int) -> str:
    """A user tower of fresh weights where the settings name it, in place of one that may be there, trained until far ahead."""
    wanted, schema, tasks = upstream_settings(settings.model), settings.event_schema, settings.train.tasks
    folder = f"{settings.root}/tower"
    torch.manual_seed(seed)
    about = {"trained": [], "trained_until": "2999-01-01T00:00:00.000+00:00"}
    write_bytes(f"{folder}/_MANIFEST.json", json.dumps(about).encode())
    return save_weights(folder, weights_of(make_model(wanted, schema, tasks)), wanted, schema, tasks)


def tower_in(version: Version) -> dict[str, torch.Tensor]:
    weights = load_model(version.path)[0].state_dict()
    return {name: tensor for name, tensor in weights.items() if name.startswith("encoder.upstream.")}


def test_a_user_tower_is_a_part_of_the_run_and_of_what_its_model_has_seen(
    tables: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Slow for two runs of a step: one with a tower, one from that one's weights."""
    encoder = {"kind": "user_embedding", "num_layers": 1, "upstream": str(tmp_path / "tower")}
    one_step = {"num_workers": 1, "epochs": 1, "max_requests": 31, "tokens_per_step": 10_000}
    model = ModelSettings(**{**tables.model.model_dump(), "merge_size": 1, "encoder": encoder})
    settings = settings_for(tables.model_copy(update={"model": model}), tmp_path, **one_step)
    tower = save_tower(settings, seed=1)
    first = train.run(settings)
    assert first.manifest["upstream"]["model_version"] == tower
    assert first.manifest["validation_may_be_seen"]
    assert "tower has trained requests until 2999-01-01" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"tower, the user tower of .*, has trained requests until 2999-01-01"):
        evaluate.run(settings)
    save_tower(settings, seed=2)
    many = settings.model_copy(update={"train": settings.train.model_copy(update={"num_workers": 99})})
    with pytest.raises(UserError, match="num_workers=99"):
        train.run(many)  # not finished: with another tower at the same path it is another run
    shutil.rmtree(tmp_path / "tower")
    tuned = train.run(settings, from_=first.path)
    assert tuned.manifest["upstream"] == first.manifest["upstream"]
    assert all(torch.equal(tensor, tower_in(first)[name]) for name, tensor in tower_in(tuned).items())


def test_evaluation_publishes_scores_that_have_its_metrics(
    trained: tuple[Settings, Version], capsys: pytest.CaptureFixture
) -> None:
    settings, checkpoint = trained
    version = evaluate.run(settings)
    assert version.manifest["model_version"] == checkpoint.manifest["model_version"]
    assert set(version.manifest["baselines"]) == {
        *("popularity", "count_last_20", "count_last_100", "count_last_1000", "count_all")
    }
    assert version.manifest["auc_by_length"]

    table = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    asked = [table.read("test", bucket) for bucket in range(table.num_buckets)]
    labels = {int(i): label for part in asked for i, label in zip(part.request_id_R, _label_lists(part), strict=True)}
    rows = read_scores(version)
    assert sorted(rows["request_id"].to_pylist()) == sorted(labels)
    scores = np.concatenate(rows["score_label"].to_numpy())
    assert auc(scores, np.concatenate([labels[i] for i in rows["request_id"].to_pylist()])) == pytest.approx(
        version.manifest["test"]["auc"], abs=1e-6
    )

    assert evaluate.run(settings).manifest == version.manifest
    assert "nothing changed" in capsys.readouterr().err


def _label_lists(requests: Any) -> list[np.ndarray]:
    return np.split(requests.labels["label"], requests.candidates.offsets_R1[1:-1])


def test_more_workers_than_a_local_ray_holds_are_refused(tables: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_workers=99: this Ray has"):
        train.run(settings_for(tables, tmp_path, num_workers=99))
    with pytest.raises(UserError, match=r"this Ray has \d+ GPUs, .* leave out train.use_gpu"):
        train.run(settings_for(tables, tmp_path, num_workers=99, use_gpu=True))
