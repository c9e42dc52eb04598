"""The study's grid, rows and fits: what would make its tables wrong without anything failing."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality_study.arms import BASES, ENCODERS, FEATURES, ITSELF, QUICK, Trained, model_settings
from benchmarks.quality_study.cache import cached
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.draws import auc_of_draws, lead
from benchmarks.quality_study.goals import goals
from benchmarks.quality_study.grid import grid
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.page import page
from benchmarks.quality_study.plots import plots
from benchmarks.quality_study.records import Records
from benchmarks.quality_study.rows import power_law
from benchmarks.quality_study.training import _plan, _runs
from benchmarks.quality_study.tuning import SEARCH, chains, chosen, runnable
from longer.data.batches import plan_packs
from longer.encoder_settings import Sim
from longer.table_settings import GenerateSettings
from longer.training.metrics import auc as roc_auc
from longer.windows import WindowRule

_LOGS = sorted(SCHEMAS)
_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("records", sorted(_RESULTS.glob("quality_*.jsonl")), ids=lambda path: path.stem)
def test_a_page_that_is_kept_says_what_its_records_do(records: Path) -> None:
    """`--page-only` makes it anew; only what stands before the tables is written by hand."""
    kept, body = records.with_suffix(".md").read_text(), page(Records(records).read()).partition("\n")[2].strip()
    assert kept.rstrip().endswith(body)
    num_trials, num_arms = re.search(r"are (\d+) trials, .* and (\d+) arms", kept.replace("\n", " ")).groups()
    groups = [record["group"] for record in Records(records).read() if "trained" in record]
    assert (groups.count("tuning"), len(groups) - groups.count("tuning")) == (int(num_trials), int(num_arms))


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


@pytest.mark.parametrize("log", _LOGS)
def test_trials_go_on_until_the_best_rate_is_inside_and_are_no_arms_of_the_grid(log: str) -> None:
    records: list[dict] = []

    def auc(trial: Trained) -> float:  # best at 0.0003, 0.02 and two passes
        off = abs(math.log(trial.tables / 0.0003)) + abs(math.log(trial.dense / 0.02)) + abs(trial.passes - 2)
        return 0.8 - 0.01 * off

    while turn := [arm for chain in chains(log) for arm in runnable(log, chain, SEARCH, records)]:
        for arm in turn:
            assert arm.trial
            about = {"group": "tuning", "log": log, "encoder": arm.encoder, "features": arm.features}
            records.append({**about, "key": arm.key, "trained": asdict(arm.trial), "valid": {"auc": auc(arm.trial)}})
    keys = [record["key"] for record in records]
    assert len(set(keys)) == len(keys)
    arms = grid(log, quick=False, seeds=3)
    assert not set(keys) & {arm.key for arm in arms}
    tried = {encoder for encoder, _ in chains(log)} & {"longer", "none"}
    assert {chosen(records, arm) for arm in arms if arm.encoder in tried} == {Trained(0.0003, 0.02, 2)}
    assert chosen([], arms[0]) == Trained()


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


def test_power_laws_are_found_with_their_fit() -> None:
    x = np.array([20, 50, 100, 500, 2000, 4000.0])
    alpha, beta, gamma, r2 = power_law(x.tolist(), (0.8 - 0.3 * x**-0.4).tolist())
    assert r2 > 0.999
    assert beta == pytest.approx(-0.4, rel=0.05)
    assert alpha == pytest.approx(-0.3, rel=0.1)
    assert gamma == pytest.approx(0.8, abs=0.01)


def record(arm: str, seed: int, auc: float, **more: object) -> dict:
    test = {"auc": auc, "long_auc": auc, "gauc": auc, "logloss": 0.4, "rows": 9, "long_rows": 3}
    about = {"hardware": "cpu", "torch": "2", "quick": True, "train_requests": 1, "steps": 1, "train_s": 1.0}
    trained = {"tables": 0.01, "dense": 0.002, "passes": 1}
    same = {"log": "journey", "group": "encoders", "encoder": "longer", "features": True, "length": 200}
    sizes = {"dense_parameters": 1, "table_parameters": 1, "forward_flops": {"flops": 1e6}}
    found = {"test": test, "long_auc_draws": [auc, auc], "trained": trained}
    return {"key": f"{arm}/{seed}", "arm": arm, "seed": seed, **found, **about, **same, **sizes, **more}


def test_a_lead_counts_beyond_the_spread_of_three_seeds_only() -> None:
    def told(ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
        arms = {"longer": ours} | dict.fromkeys(ENCODERS, theirs)
        found = [record(name + FEATURES, seed, auc) for name, aucs in arms.items() for seed, auc in enumerate(aucs)]
        return goals(found, {"count_all": {"auc": 0.5, "long_auc": 0.5, "long_auc_draws": [0.5, 0.5]}})[0]

    assert told((0.80, 0.81, 0.82), (0.70, 0.71, 0.72)).startswith("- **met**")
    assert told((0.80, 0.81, 0.82), (0.79, 0.80, 0.81)).startswith("- **missed**")
    assert told((0.80, 0.82), (0.70, 0.72)).startswith("- not measured")


def test_no_goal_is_met_by_seeds_that_lie_far_apart_or_by_queries_that_gain_nothing() -> None:
    def told(claim: str, **aucs: tuple[float, ...]) -> str:
        names = {"some": "longer L=1000", "every": "k=250 L=1000", "alone": ITSELF, "k1": "K=1"}
        arms = {names.get(name, name): values for name, values in aucs.items()}
        found = [
            record(name, seed, auc, features=False, forward_flops={"flops": 1e6 * (name != ITSELF)})
            for name, values in arms.items()
            for seed, auc in enumerate(values)
        ]
        (line,) = [line for line in goals(found, {}) if claim in line]
        return line

    few = {"some": (0.79, 0.79, 0.79), "alone": (0.5, 0.5, 0.5)}
    share = "at about half of the FLOPs, on ids"
    assert told(share, none=(0.70,) * 3, every=(0.7901,) * 3, **few).startswith("- **missed**")  # at all of the FLOPs
    assert "no gain to keep" in told(share, none=(0.70,) * 3, every=(0.69, 0.70, 0.72), **few)
    assert told("merging loses little", longer=(0.740, 0.740, 0.740), k1=(0.743, 0.743, 0.743)).startswith("- **met**")
    assert told("merging loses little", longer=(0.740, 0.740, 0.740), k1=(0.738, 0.743, 0.748)).startswith(
        "- **missed**"
    )


def test_a_page_before_any_test_shows_the_trials() -> None:
    trial = {**record("longer tables 0.01", 0, 0.7, group="tuning"), "valid": {"auc": 0.7123}}
    del trial["test"]
    lines = page([trial]).splitlines()
    assert any("| longer+features | 0.01, 0.002, 1 | 0.7123 |" in line for line in lines)
    assert json.loads(lines[-1]) == {"auc": {}, "auc_by_length": {}, "spread": None}


def test_the_page_ends_with_one_line_of_json_and_means_over_seeds() -> None:
    lines = page([record("longer+features", 0, 0.7), record("longer+features", 1, 0.8)]).splitlines()
    last = json.loads(lines[-1])
    assert last["auc"]["longer+features"] == pytest.approx(0.75)
    assert last["spread"] == pytest.approx(0.05)
    assert any("0.7500 ± 0.0500" in line for line in lines)


def test_records_of_runs_with_other_budgets_make_no_page_together() -> None:
    """Half of an arm's seeds would be tested on other requests than the arm that it is compared with."""
    one = record("longer", 0, 0.7)
    for other, what in (
        ({"steps": 2}, "steps a pass"),
        ({"test": one["test"] | {"rows": 198}}, "tested on different requests"),
        ({"hardware": "2 CPU cores"}, "precision"),
    ):
        with pytest.raises(AssertionError, match=what):
            page([one, record("longer", 1, 0.8, **other)])


def test_a_sitting_that_ended_early_has_plots_and_a_page_that_names_what_was_left_out(tmp_path: Path) -> None:
    """The first arms that are trained have the features, and there is one of each."""
    first = record("longer+features", 0, 0.7)
    left_out = {"left_out": "journey/din/0", "log": "journey", "why": "out of memory"}
    measured = {"key": "journey/baselines", "log": "journey", "baselines": {}}
    measured |= {"sizes": {"users": 2_500, "events": 9, "longest": 4, "tested": 6_000}}
    assert len(plots([first], tmp_path, "some")) == 2
    told = page([first, left_out, measured])
    assert "- left out: journey/din/0 (out of memory)" in told
    assert "of 6,000 requests, 3 of them with a long history: 100 events and more" in told
