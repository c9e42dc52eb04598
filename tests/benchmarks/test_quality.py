"""The study's grid, rows and fits: what would make its tables wrong without anything failing."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality_study.arms import BASES, QUICK, Arm, Trained, model_settings
from benchmarks.quality_study.cache import cached
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.draws import auc_of_draws, lead
from benchmarks.quality_study.grid import grid
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.records import Records
from benchmarks.quality_study.steering import trials
from benchmarks.quality_study.training import _plan, _runs
from benchmarks.quality_study.tuning import SEARCH, chains, chosen, runnable
from longer.data.batches import plan_packs
from longer.encoder_settings import Sim
from longer.table_settings import GenerateSettings
from longer.training.metrics import auc as roc_auc
from longer.windows import WindowRule

_LOGS = sorted(SCHEMAS)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("log", _LOGS)
def test_every_arm_has_settings_of_the_window_and_width_that_it_names(log: str, quick: bool) -> None:
    base = (QUICK if quick else BASES)[log]
    arms = grid(log, quick, seeds=2)
    assert len({arm.key for arm in arms}) == len(arms)
    for arm in arms:
        settings = model_settings(arm, base)
        wanted, width = arm.length or base.length, arm.model.get("width", base.width)
        assert wanted <= settings.history_events < wanted + max(16, wanted // 8), arm
        assert settings.width == width, arm
        assert settings.windows.stride_events <= max(16, wanted // 8), arm
        longers = model_settings(replace(arm, encoder="longer"), base)
        assert (settings.history_events, settings.windows.stride_events) == (
            longers.history_events,
            longers.windows.stride_events,
        )
        if isinstance(settings.encoder, Sim) and settings.encoder.search == "hard":
            assert settings.encoder.field in SCHEMAS[log].features_of("item", "categorical")


@pytest.mark.parametrize("best_on_ids", [0.0003, 0.001, 0.03, 0.1])
@pytest.mark.parametrize("best", [0.0003, 0.003, 0.01, 0.1])
@pytest.mark.parametrize("log", _LOGS)
def test_trials_go_on_until_the_best_rate_is_between_its_neighbours_and_are_no_arms_of_the_grid(
    log: str, best: float, best_on_ids: float
) -> None:
    """The best rate with the features may lie far from that on ids, where their trials begin."""
    records: list[dict] = []

    def auc(trial: Trained, features: bool) -> float:  # best at dense 0.02 and two passes
        tables = best if features else best_on_ids
        off = abs(math.log(trial.tables / tables)) + abs(math.log(trial.dense / 0.02)) + abs(trial.passes - 2)
        return 0.8 - 0.01 * off

    while turn := [arm for chain in chains(log) for arm in runnable(log, chain, SEARCH, records)]:
        for arm in turn:
            assert arm.trial
            about = {"group": "tuning", "log": log, "encoder": arm.encoder, "features": arm.features}
            found = {"auc": auc(arm.trial, arm.features)}
            records.append({**about, "key": arm.key, "trained": asdict(arm.trial), "valid": found})
    keys = [record["key"] for record in records]
    assert len(set(keys)) == len(keys)
    arms = grid(log, quick=False, seeds=3)
    assert not set(keys) & {arm.key for arm in arms}
    as_tried = [arm for arm in arms if not arm.trial and not arm.more_passes]
    for encoder, features in chains(log):
        mine = {chosen(records, arm) for arm in as_tried if (arm.encoder, arm.features) == (encoder, features)}
        assert mine == {Trained(best if features else best_on_ids, 0.02, 2)}
    assert chosen([], arms[0]) == Trained()


@pytest.mark.parametrize(("gains", "passes"), [((0.01, 0.01), 3), ((0.01, 0.0005), 3), ((0.0005,), 2), ((-0.01,), 2)])
def test_another_pass_is_tried_if_the_last_was_worth_it(gains: tuple[float, ...], passes: int) -> None:
    """Three at most, for all encoders: whom that stops is told beside the trials."""
    values, records = [0.7, *(0.7 + sum(gains[: n + 1]) for n in range(len(gains)))], list[dict]()
    while turn := runnable("journey", ("din", False), SEARCH, records):
        for arm in turn:
            assert arm.trial
            value = values[arm.trial.passes - 1] - 0.1 * (replace(arm.trial, passes=1) != Trained())
            about = {"group": "tuning", "log": "journey", "encoder": "din", "features": False, "arm": arm.name}
            records.append({**about, "trained": asdict(arm.trial), "valid": {"auc": value}})
    assert max(record["trained"]["passes"] for record in records) == passes
    row = next(line for line in trials(records).splitlines() if line.startswith("| din |"))
    assert ("the last gained 0.0100" in row) == (gains == (0.01, 0.01))
    more = Arm("din, 2 more", "journey", "tried", 0, encoder="din", features=False, more_passes=2)
    assert chosen(records, more).passes == chosen(records, replace(more, more_passes=0)).passes + 2


def test_every_arm_takes_the_same_steps_of_the_same_requests() -> None:
    """Windows of different lengths cut a user's requests into different packs; what a step learns from must not depend on that."""
    sizes = GenerateSettings(num_users=30, num_events=20_000, num_items=500, num_clusters=50)
    log, seen = read_log("generated", "", sizes=sizes), []
    for windows, most_cost in ((WindowRule(4, 8, 4, 2), None), (WindowRule(1, 400, 400, 50), 5_000)):
        data = log.split("train", windows)
        run_R = _runs(data)
        packs = plan_packs(run_R, data.requests.history_end_R, windows, 16)
        plan = _plan(data, packs, run_R, 128, (0, 0), most_cost)
        assert (most_cost is None) == (plan.num_batches == 1)
        seen.append([np.sort(packs.take(plan.step(step)).order_R).tolist() for step in range(plan.num_steps)])
    assert seen[0] == seen[1]
    assert sorted(request for step in seen[0] for request in step) == list(range(len(log.requests["train"])))
    assert {len(step) // 16 for step in seen[0][:-1]} <= {7, 8, 9}


def test_a_log_is_prepared_once_and_read_back_as_it_was(tmp_path: Path) -> None:
    sizes, made = GenerateSettings(num_users=30, num_events=20_000, num_items=500, num_clusters=50), []

    def make() -> Log:
        made.append(read_log("generated", "", sizes=sizes))
        return made[-1]

    for _ in range(2):
        log = cached(tmp_path / "log", make)
        for name, values in made[0].histories.features.items():
            np.testing.assert_array_equal(log.histories.features[name], values)
        np.testing.assert_array_equal(log.histories.event_ts_E, made[0].histories.event_ts_E)
        assert log.requests["test"].labels["label"].tolist() == made[0].requests["test"].labels["label"].tolist()
    assert len(made) == 1


def test_no_record_is_made_twice_and_what_was_left_out_is_tried_by_the_next_run(tmp_path: Path) -> None:
    mine, others = Records(tmp_path / "results.jsonl"), Records(tmp_path / "results.jsonl")
    with mine.claim("a") as is_mine, others.claim("a") as is_others, others.claim("b") as is_free:
        assert (is_mine, is_others, is_free) == (True, False, True)
        mine.append({"key": "a"})
    mine.append({"left_out": "b"})
    with others.claim("b") as once_more:
        assert once_more
    mine.append({"left_out": "b"})
    with others.claim("a") as again, others.claim("b") as now:
        assert (again, now) == (False, False)
    with Records(tmp_path / "results.jsonl").claim("b") as later:
        assert later


def test_processes_of_one_command_train_each_arm_once_and_one_page_is_printed(tmp_path: Path) -> None:
    """Half a minute: two new processes import torch and train a model each."""
    results = tmp_path / "results.jsonl"
    sizes = ["--train-requests", "200", "--test-requests", "40"]
    where = ["--results", str(results), "--cache", str(tmp_path / "cache")]
    only = ["--log", "generated", "--quick", "--only", "longer L=100", "longer L=50"]
    command = [sys.executable, "-m", "benchmarks.quality", *only, *sizes, *where, "--processes", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    keys = sorted(json.loads(line)["key"] for line in results.read_text().splitlines())
    assert keys == ["generated/baselines", "generated/longer L=100/0", "generated/longer L=50/0"]
    assert printed.count("# Quality") == 1


def test_draws_count_ties_half_and_all_rows_of_a_user_as_often_as_drawn() -> None:
    rng = np.random.default_rng(1)
    user, label = rng.integers(5, 12, 400), rng.random(400) < 0.3
    score = np.round(rng.normal(size=400) + label, 1)
    found = auc_of_draws(score, label, user)
    times_of_users = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), len(found))
    for times, value in list(zip(times_of_users, found, strict=True))[:20]:
        again = np.repeat(np.arange(400), times[user - 5])
        assert value == pytest.approx(roc_auc(score[again], label[again].astype(np.float32)), abs=1e-6)
    assert auc_of_draws(score + 0.05, label, user) == found


def test_a_lead_is_drawn_with_the_same_users_for_both() -> None:
    ours, theirs = {"long_auc_draws": [0.7, 0.8, 0.9]}, {"long_auc_draws": [0.6, 0.7, 0.8]}
    assert lead([ours], [theirs]) == pytest.approx((0.1, 0.1))


def test_only_events_of_one_period_before_answer_the_generated_requests() -> None:
    sizes = GenerateSettings(num_users=30, num_events=60_000, num_items=50_000, num_clusters=5_000)
    log = read_log("generated", "", sizes=sizes)
    for requests, row_R in zip(log.requests.values(), log.row_R.values(), strict=True):
        assert len(requests) > 100
        end_R, begin_R = requests.history_end_R, log.histories.offsets_B1[row_R]
        assert (log.histories.event_ts_E[begin_R + end_R - 1] < requests.request_ts_R).all()
        label_C, cluster_C = requests.labels["label"], requests.candidates.features["category"]
        first_C = requests.candidates.offsets_R1[:-1]
        assert (label_C[first_C] == 1).all()
        assert label_C.sum() == len(requests)
        request_C = np.repeat(np.arange(len(requests)), np.diff(requests.candidates.offsets_R1))
        assert not ((cluster_C == cluster_C[first_C][request_C]) & (label_C == 0)).any()
        since_ms = (sizes.period_days - sizes.episode_days) * 86_400_000
        long_ago, lately = np.zeros(len(label_C), bool), np.zeros(len(label_C), bool)
        for candidate, request in enumerate(request_C):
            seen = slice(begin_R[request], begin_R[request] + end_R[request])
            same = log.histories.features["category"][seen] == cluster_C[candidate]
            is_old = log.histories.event_ts_E[seen] < requests.request_ts_R[request] - since_ms
            long_ago[candidate], lately[candidate] = (same & is_old).any(), (same & ~is_old).any()
        assert long_ago[label_C == 1].mean() > 0.99
        assert abs(lately[label_C == 1].mean() - lately[label_C == 0].mean()) < 0.1


def test_no_label_of_training_tells_which_cluster_a_test_asks_for() -> None:
    log = read_log("generated", "", sizes=GenerateSettings(num_users=30, num_events=60_000, num_clusters=5_000))

    def asked(split: str) -> set[tuple[int, int]]:
        requests = log.requests[split]
        cluster_R = requests.candidates.features["category"][requests.candidates.offsets_R1[:-1]]
        return set(zip(log.row_R[split].tolist(), cluster_R.tolist(), strict=True))

    assert asked("train")
    assert (
        len(asked("train") & (asked("test") | asked("valid"))) <= 1
    )  # of 1,200 pairs of episodes, one in 5,000 by chance
