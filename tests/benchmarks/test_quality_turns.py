"""What a process of the study trains next, and what it goes on after: a sitting on a GPU has no time to lose."""

import fcntl
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality_study.arms import ITSELF, Arm, Trained
from benchmarks.quality_study.cache import cached
from benchmarks.quality_study.grid import GROUPS, OF_GOALS, grid, turn
from benchmarks.quality_study.records import Records
from benchmarks.quality_study.tuning import SEARCH, runnable, stands, waits
from longer.table_settings import GenerateSettings


def record(arm: Arm, trained: Trained, auc: float = 0.7, **more: Any) -> dict[str, Any]:
    about = {"key": arm.key, "arm": arm.name, "log": arm.log, "group": arm.group, "seed": arm.seed}
    about |= {"encoder": arm.encoder, "features": arm.features, "length": arm.length or 4000}
    costs = {"steps": 1, "train_s": 10.0, "upstream_s": 0.0, "test_s": 0.0}
    return about | costs | {"trained": asdict(trained), "valid": {"auc": auc, "long_auc": auc}} | more


def study(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> quality._Study:
    results = folder / "results.jsonl"
    given = ["--results", str(results), "--cache", str(folder / "cache"), *arguments]
    monkeypatch.setattr(sys, "argv", ["quality", *given])
    sizes = GenerateSettings(num_users=30, num_events=20_000, num_items=500, num_clusters=50)
    monkeypatch.setattr(quality, "_GENERATED_QUICK", sizes)
    return quality._Study(quality._arguments(), results)


def test_an_arm_waits_for_trials_of_its_own_encoder_only() -> None:
    def waiting(encoder: str, features: bool, passes: int = 1) -> set[tuple[str, bool]]:
        trial = Arm("", "journey", "tuning", 0, encoder=encoder, features=features, trial=Trained(passes=passes))
        arms = [arm for log in ("journey", "movielens") for arm in grid(log, False, 1) if waits(arm, [trial])]
        assert {arm.log for arm in arms} == {"journey"}
        return {(arm.encoder, arm.features) for arm in arms}

    assert waiting("din", False) == {
        ("din", False),
        ("din", True),
    }  # its best rates on ids are where the features begin
    assert waiting("din", False, passes=2) == {("din", False)}
    assert waiting("din", True, passes=2) == {("din", True)}
    assert waiting("none", True) == {("none", False), ("none", True)}  # on ids there is no trial
    assert waiting("longer", False) == {(name, features) for name in ("longer", ITSELF) for features in (False, True)}


def test_trials_with_the_features_begin_when_the_rates_on_ids_are_found() -> None:
    """An encoder's passes on ids and its trials with the features, one after the other, take longer than a sitting."""
    records: list[dict[str, Any]] = []
    on_ids, counted = ("transformer", False), ("transformer", True)
    while turn := runnable("journey", on_ids, SEARCH, records):
        if turn[0].trial and turn[0].trial.passes > 1:
            break
        assert not runnable("journey", counted, SEARCH, records)
        records += [record(arm, arm.trial, 0.7 - 0.01 * (arm.trial != Trained())) for arm in turn if arm.trial]
    assert {arm.trial.dense for arm in runnable("journey", counted, SEARCH, records) if arm.trial} == {Trained().dense}
    assert turn


def test_an_arm_is_trained_again_once_its_trials_have_found_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the seeds of one row would be trained in two ways, or a search that went on would be for nothing."""
    here = study(monkeypatch, tmp_path, "--seeds", "2")
    first, second = (Arm("din", "journey", "encoders", seed, encoder="din", features=False) for seed in (0, 1))
    trials = [
        record(Arm(f"trial {n}", "journey", "tuning", 0, encoder="din", features=False, trial=how), how, 0.70 + n / 10)
        for n, how in enumerate((Trained(), Trained(passes=3)))
    ]
    for one in (trials[0], record(first, Trained())):
        here.records.append(one)
    assert here._left([first, second], here.records.read()) == [second]
    here.records.append(trials[1])
    assert here._left([first, second], here.records.read()) == [first, second]
    with here.records.claim(first.key, partial(stands, arm=first)) as is_mine:
        assert is_mine
    here.records.append(record(first, Trained(passes=3)))
    assert here._left([first, second], here.records.read()) == [second]
    with here.records.claim(first.key, partial(stands, arm=first)) as is_mine:
        assert not is_mine


def test_headline_rows_of_all_logs_come_before_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = study(monkeypatch, tmp_path, "--log", "all")._grid(("journey", "generated", "movielens"), [], [])
    logs = [(arm.log, arm.group) for arm in found]
    assert list(dict.fromkeys(log for log, group in logs if group in GROUPS[:2])) == [
        "journey",
        "generated",
        "movielens",
    ]
    headline = [arm for arm in found if arm.group in GROUPS[:2] and turn(arm) == (0, 0, 0)]
    assert {(arm.log, arm.encoder) for arm in found if arm.group in GROUPS[:2]} == {
        (a.log, a.encoder) for a in headline
    }
    later = [arm for arm in found if arm not in headline]
    assert later == found[-len(later) :]
    assert {arm.name for arm in later[: 3 * len(OF_GOALS)]} == set(OF_GOALS)
    others = [(arm.seed, GROUPS.index(arm.group)) for arm in later[3 * len(OF_GOALS) :]]
    assert others == sorted(others)
    assert {seed for seed, _ in others} == {0, 1, 2}
    assert [arm.seed for arm in found[:24]] == [0] * 24


@pytest.mark.parametrize(("error", "why"), [(ValueError("so"), "ValueError: so"), (MemoryError(), "MemoryError: ")])
def test_an_arm_that_fails_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, why: str
) -> None:
    """Each process of a sitting would die of the same arm, one after the other."""
    tried = []

    def run(arm: Arm, *_: object) -> dict[str, Any]:
        tried.append(arm.name)
        if arm.name == "longer L=100":
            raise error
        return record(arm, Trained(), test={"auc": 0.7, "long_auc": 0.7})

    monkeypatch.setattr(quality, "run", run)
    names = ["longer L=100", "longer L=200", "longer L=50"]
    study(monkeypatch, tmp_path, "--log", "generated", "--quick", "--only", *names).train(["generated"])
    assert tried[-1] == "longer L=100"  # memory may be there when the others are done
    assert sorted(tried) == [names[0], *names]
    records = Records(tmp_path / "results.jsonl").read()
    left_out, _ = [each for each in records if "left_out" in each]
    assert (left_out["left_out"], left_out["why"]) == ("generated/longer L=100/0", why)
    assert len(records) == 5  # the baselines too


def test_no_process_waits_for_a_log_that_another_prepares(tmp_path: Path) -> None:
    def make() -> Any:
        raise AssertionError("two processes prepare it")

    with Path(f"{tmp_path}/log.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cached(tmp_path / "log", make) is None


def test_an_arm_begins_if_it_ends_in_time_by_its_own_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The encoder's last record may be of a history a hundredth as long."""
    one_minute = study(monkeypatch, tmp_path, "--minutes", "1")
    longest, short = (Arm(name, "journey", "lengths", 0, length=n) for name, n in (("longer", None), ("L=20", 20)))
    slow = [record(longest, Trained(passes=2), train_s=200.0), record(short, Trained(passes=2), train_s=2.0)]
    has_time: Callable[[Arm], bool] = lambda arm: one_minute._has_time(arm, slow)  # noqa: E731
    assert [has_time(arm) for arm in (longest, short)] == [False, True]
    assert not has_time(Arm("K=1", "journey", "switches", 0))
    one_minute.deadline = time.monotonic() - 1
    assert not one_minute._has_time(Arm("din", "journey", "encoders", 0, encoder="din"), [])


def test_a_copy_that_was_cut_within_a_line_goes_on(tmp_path: Path) -> None:
    """Records are copied while processes add to them; each process of the next run would fail on the line."""
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "a", "test": {"auc": 0.7}}\n{"key": "b", "test": {"auc": 0.7}')
    records = Records(results)
    records.append({"key": "c"})
    records.append({"key": "d"})
    assert [each["key"] for each in records.read()] == ["a", "c", "d"]


def test_a_sitting_without_more_trials_trains_every_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without = study(monkeypatch, tmp_path, "--log", "all", "--group", "all")
    logs = ("journey", "generated", "movielens")
    assert not [arm for log in logs for arm in without._trials(log, [])]
    assert len(without._grid(logs, [], [])) == sum(len(grid(log, False, 3)) for log in logs)
    with pytest.raises(SystemExit):
        study(monkeypatch, tmp_path, "--group", "length")
