"""What is removed of runs: never what a live or an unfinished run needs; a store that fails costs no training."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from longer import s3 as longer_s3
from longer.files import file_sizes, read_bytes, remove_tree, write_bytes
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.storage import Table
from longer.training.checkpoints import save_weights
from longer.training.cursor import Position
from longer.training.runs import (
    RECORD,
    KeepBestAndLast,
    best_that_is_whole,
    mend_record,
    note_start,
    remove_old_runs,
    step_folder,
    tell_what_is_left,
)
from longer.training.trainer_state import TrainerState, read_trainer_state, save_trainer
from tests.s3.proxy import Fault, Proxy

FILES = ("model.json", "model.safetensors", "trainer.json", "trainer.safetensors")


def make_run(root: str, run: str, published_at: str | None = None, folder: str = "step_0000001") -> None:
    """A run with one checkpoint, and the version that it has published, if any."""
    for name in (*(f"{folder}/{file}" for file in FILES), RECORD, "tensorboard/events"):
        write_bytes(f"{root}/training/{run}/{name}", b"x")
    if published_at:
        table = Table(f"{root}/checkpoints")
        write_bytes(f"{table.begin(run)}/model.json", b"x")
        table.publish(run, {"published_at": published_at})


def save_checkpoint(run: str, step: int) -> None:
    """A whole one, of weights that make no model."""
    path = f"{run}/{step_folder(step)}"
    save_weights(path, {"a": torch.zeros(8), "b": torch.zeros(3)}, ModelSettings(), EventSchema(), ())
    state = TrainerState(Position(0, step), checkpoints=[{"step": step}])
    save_trainer(path, {"a/step": torch.zeros(())}, state)


def runs_with_checkpoints(root: str) -> set[str]:
    return {path.split("/")[0] for path in file_sizes(f"{root}/training") if "/step_" in path or path.endswith(RECORD)}


def num_files(root: str, run: str) -> dict[int, int]:
    """Of each checkpoint, by its step."""
    found = [path.split("/")[0] for path in file_sizes(f"{root}/training/{run}") if path.startswith("step_")]
    return {int(folder.removeprefix("step_")): found.count(folder) for folder in found}


def remove(root: str, num_kept: int = 2) -> None:
    remove_old_runs(f"{root}/training", Table(f"{root}/checkpoints"), num_kept)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)


def test_of_published_runs_the_newest_stay_and_old_ones_keep_their_scalars(
    root: str, capsys: pytest.CaptureFixture
) -> None:
    for day, run in ((3, "new"), (1, "older"), (2, "old")):
        make_run(root, run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    remove(root)
    assert runs_with_checkpoints(root) == {"old", "new"}
    assert set(file_sizes(f"{root}/training/older")) == {"tensorboard/events"}
    assert "removed the checkpoints of older runs, published ones (train.keep_runs): older" in capsys.readouterr().err
    remove(root)
    assert "removed" not in capsys.readouterr().err


def test_a_run_that_has_published_nothing_stays_whether_it_is_live_or_waits_for_its_command(root: str) -> None:
    for run in ("live", "interrupted"):
        make_run(root, run)
    for day, run in enumerate(("a", "b", "c"), start=1):
        make_run(root, run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    remove(root, 1)
    assert runs_with_checkpoints(root) == {"live", "interrupted", "c"}


def test_a_checkpoint_from_which_another_run_starts_stays_until_that_is_old_too(root: str) -> None:
    for day, run in enumerate(("base", "other"), start=1):
        make_run(root, run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    make_run(root, "live")
    note_start(f"{root}/training/live", "requests", f"{root}/training/base/step_0000001")
    remove(root, 1)
    assert runs_with_checkpoints(root) == {"base", "other", "live"}
    remove_tree(f"{root}/training/live")
    remove(root, 1)
    assert runs_with_checkpoints(root) == {"other"}


def test_runs_that_a_new_version_of_the_requests_has_left_unfinished_are_named_once(
    root: str, capsys: pytest.CaptureFixture
) -> None:
    """Their command starts another run now: their checkpoints would lie there for ever without a word."""
    folder, table = f"{root}/training", Table(f"{root}/checkpoints")
    make_run(root, "over", published_at="2026-01-01T00:00:00+00:00")
    for run, requests in (("over", "old"), ("left", "old"), ("waits", "new")):
        make_run(root, run)
        note_start(f"{folder}/{run}", requests, None)
    note_start(f"{folder}/never_began", "old", None)
    tell_what_is_left(folder, table, "again", "new")
    told = capsys.readouterr().err
    assert "run again begins on requests new; runs of other ones have published nothing: left: start from" in told
    tell_what_is_left(folder, table, "waits", "new")
    tell_what_is_left(folder, table, "again", "old")
    remove_tree(f"{folder}/left")
    tell_what_is_left(folder, table, "again", "new")
    assert "left" not in capsys.readouterr().err


def test_a_damaged_note_of_one_run_ends_no_other_and_keeps_nothing_for_ever(
    root: str, capsys: pytest.CaptureFixture
) -> None:
    """Each training under the root would fail at it, where it begins and at each of its checkpoints."""
    folder = f"{root}/training"
    for step in (1, 2):
        make_run(root, "left", folder=step_folder(step))
    note_start(f"{folder}/left", "old", None)
    write_bytes(f"{folder}/damaged/start.json", b'{"requests": "o')
    tell_what_is_left(folder, Table(f"{root}/checkpoints"), "again", "new")
    assert "runs of other ones have published nothing: left: start from" in capsys.readouterr().err
    KeepBestAndLast(f"{folder}/left").after_report(None, [{"step": 2, "keep": [2]}], None)
    assert num_files(root, "left") == {1: 1, 2: 4}


def test_a_checkpoint_that_was_named_by_another_path_stays_too(tmp_path: Path) -> None:
    root, link = str(tmp_path / "root"), tmp_path / "link"
    link.symlink_to(tmp_path / "root")
    for day, run in enumerate(("linked", "dotted", "other", "new"), start=1):
        make_run(root, run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    note_start(f"{root}/training/new", "requests", f"{link}/training/linked/step_0000001")
    note_start(f"{root}/training/other", "requests", f"{root}/checkpoints/../training/dotted/step_0000001")
    remove(str(link), 2)
    assert runs_with_checkpoints(root) == {"linked", "dotted", "other", "new"}


def test_a_removal_that_was_killed_half_way_is_gone_on_with_and_leaves_no_record_of_what_is_gone(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day, run in enumerate(("old", "new"), start=1):
        make_run(root, run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    write_bytes(f"{root}/training/old/step_0000002/model.json", b"x")
    left = [1]

    def killed(path: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        remove_tree(path)

    with monkeypatch.context() as patch:
        patch.setattr("longer.training.runs.remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(root, 1)
    assert RECORD not in file_sizes(f"{root}/training/old"), "the record goes first"
    assert "old" in runs_with_checkpoints(root)
    remove(root, 1)
    assert runs_with_checkpoints(root) == {"new"}


def test_a_store_that_neither_lists_nor_removes_ends_no_training(
    faulty_s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(longer_s3.CONFIG["retries"], "total_max_attempts", 1)  # type: ignore[arg-type]
    for day, run in enumerate(("old", "new"), start=1):
        make_run("s3://tables", run, published_at=f"2026-01-0{day}T00:00:00+00:00")
    whole = file_sizes("s3://tables/training")
    keep = KeepBestAndLast("s3://tables/training/new")
    report: list[dict[str, Any]] = [{"step": 3, "keep": [3]}]
    for refused in ({"GET"}, {"POST", "DELETE"}):
        faulty_s3.plan = lambda request, refused=refused: Fault(status=403) if request.method in refused else None
        num_faults = faulty_s3.num_faults
        remove("s3://tables", 1)
        keep.after_report(None, report, None)
        assert faulty_s3.num_faults >= num_faults + 2
    faulty_s3.plan = lambda _: None
    assert file_sizes("s3://tables/training") == whole
    keep.after_report(None, report, None)
    remove("s3://tables", 1)
    assert {path for path in file_sizes("s3://tables/training") if "step_" in path} == {"new/step_0000001/model.json"}


def test_the_best_checkpoint_stays_whole_though_it_is_older_than_the_newest_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_run(str(tmp_path), "run", folder=step_folder(step))
    KeepBestAndLast(f"{tmp_path}/training/run").after_report(None, [{"step": 4, "keep": [1, 3, 4]}], None)
    assert num_files(str(tmp_path), "run") == {1: 4, 2: 1, 3: 4, 4: 4}


def test_a_checkpoint_of_a_live_run_from_which_another_has_started_stays_whole(root: str) -> None:
    """The other reads it at each start: it would never start again, and its base would be lost."""
    for step in (1, 2, 3, 4):
        make_run(root, "live", folder=step_folder(step))
    make_run(root, "other", folder=step_folder(1))
    note_start(f"{root}/training/other", "requests", f"{root}/training/live/{step_folder(2)}")
    keep = KeepBestAndLast(f"{root}/training/live")
    keep.after_report(None, [{"step": 4, "keep": [3, 4]}], None)
    assert num_files(root, "live") == {1: 1, 2: 4, 3: 4, 4: 4}
    assert num_files(root, "other") == {1: 4}
    remove_tree(f"{root}/training/other")
    keep.after_report(None, [{"step": 4, "keep": [3, 4]}], None)
    assert num_files(root, "live") == {1: 1, 2: 1, 3: 4, 4: 4}


def test_a_damaged_record_names_the_whole_checkpoints_or_goes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = str(tmp_path)
    write_bytes(f"{run}/{RECORD}", b'{"checkpoint_results": [{')
    write_bytes(f"{run}/{step_folder(1)}/model.json", b"x")
    mend_record(run)
    assert not (tmp_path / RECORD).exists()
    assert "starts anew" in capsys.readouterr().err
    for step in (2, 3, 4):
        save_checkpoint(run, step)
    os.truncate(f"{run}/{step_folder(4)}/trainer.json", 9)
    write_bytes(f"{run}/{RECORD}", b"{}")
    mend_record(run)
    record = json.loads(read_bytes(f"{run}/{RECORD}"))
    assert [r["checkpoint_dir_name"] for r in record["checkpoint_results"]] == [step_folder(2), step_folder(3)]
    assert (
        record["latest_checkpoint_result"]["metrics"] == read_trainer_state(f"{run}/{step_folder(3)}").checkpoints[-1]
    )
    before = (tmp_path / RECORD).read_bytes()
    mend_record(run)
    assert (tmp_path / RECORD).read_bytes() == before


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("left", [0, 5, 60])
def test_a_run_whose_newest_checkpoint_has_lost_a_part_goes_on_from_the_one_before(
    root: str, file: str, left: int, capsys: pytest.CaptureFixture
) -> None:
    """The record names it all the same: each start would fail at it."""
    run = f"{root}/training/run"
    for step in (1, 2):
        save_checkpoint(run, step)
    results = [{"checkpoint_dir_name": step_folder(step)} for step in (1, 2)]
    record = json.dumps({"checkpoint_results": results, "latest_checkpoint_result": results[-1]}).encode()
    write_bytes(f"{run}/{RECORD}", record)
    mend_record(run)
    assert read_bytes(f"{run}/{RECORD}") == record
    damaged = f"{run}/{step_folder(2)}/{file}"
    write_bytes(damaged, read_bytes(damaged)[:left])
    mend_record(run)
    named = json.loads(read_bytes(f"{run}/{RECORD}"))["checkpoint_results"]
    assert [result["checkpoint_dir_name"] for result in named] == [step_folder(1)]
    assert "its newest checkpoint was damaged: made anew from the 1 whole checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("file", FILES)
def test_a_run_does_not_go_on_from_a_checkpoint_of_which_a_byte_has_changed(file: str, tmp_path: Path) -> None:
    """All sizes are right: other weights, moments or another position would be trained on without a word."""
    run = str(tmp_path)
    for step in (1, 2):
        save_checkpoint(run, step)
    results = [{"checkpoint_dir_name": step_folder(step)} for step in (1, 2)]
    record = json.dumps({"checkpoint_results": results, "latest_checkpoint_result": results[-1]}).encode()
    whole = (tmp_path / step_folder(2) / file).read_bytes()
    for place in [*range(3, len(whole), 101), len(whole) - 1]:
        write_bytes(f"{run}/{RECORD}", record)
        (tmp_path / step_folder(2) / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        mend_record(run)
        named = json.loads(read_bytes(f"{run}/{RECORD}"))["checkpoint_results"]
        assert [result["checkpoint_dir_name"] for result in named] == [step_folder(1)], place


def test_a_run_whose_best_checkpoint_is_damaged_or_gone_publishes_the_next_best(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It could never end: all is trained, and the command fails at what it copies."""
    run, scores = str(tmp_path), {1: 0.9, 2: 0.6, 3: 0.7}
    checkpoints = [{"step": step, "score": score, "epochs": step} for step, score in scores.items()]
    for step in scores:
        save_checkpoint(run, step)
    assert best_that_is_whole(run, checkpoints)["step"] == 1
    assert capsys.readouterr().err == ""
    weights = tmp_path / step_folder(1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert best_that_is_whole(run, checkpoints)["step"] == 3
    assert f"{step_folder(1)}, the best by validation, is damaged: the next best takes" in capsys.readouterr().err
    remove_tree(f"{run}/{step_folder(1)}")
    assert best_that_is_whole(run, checkpoints)["step"] == 3
