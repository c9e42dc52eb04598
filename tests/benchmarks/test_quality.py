"""The study's grid, rows and fits: what would make its tables wrong without anything failing."""

import json

import numpy as np
import pytest

from benchmarks.quality_study.arms import BASES, QUICK, chosen_rates, grid, model_settings, tuning
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.page import page
from benchmarks.quality_study.rows import power_law
from longer.encoder_settings import Sim
from longer.table_settings import GenerateSettings
from longer.training.baselines import count_in_history

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
        if isinstance(settings.encoder, Sim) and settings.encoder.search == "hard":
            assert settings.encoder.field in SCHEMAS[log].features_of("item", "categorical")


@pytest.mark.parametrize("log", _LOGS)
def test_rates_are_chosen_by_validation_and_their_trials_are_no_arms_of_the_grid(log: str) -> None:
    arms = tuning(log)
    assert not {arm.key for arm in arms} & {arm.key for arm in grid(log, quick=False, seeds=3)}
    records = [
        {"group": "tuning", "log": log, "encoder": "longer", "embedding_rate": rate, "valid": {"auc": found}}
        for rate, found in ((0.01, 0.7), (0.003, 0.8), (0.03, 0.6))
    ]
    assert chosen_rates([*records, {"key": "baselines"}]) == {(log, "longer"): 0.003}


def test_generated_requests_see_only_earlier_events_and_drawn_items_are_no_positives() -> None:
    sizes = GenerateSettings(num_users=30, num_events=20_000, num_items=500, num_clusters=50)
    log = read_log("generated", "", sizes=sizes)
    for name, requests in log.requests.items():
        row_R, end_R = log.row_R[name], requests.history_end_R
        assert len(requests) > 100
        newest_E = log.histories.offsets_B1[row_R] + end_R - 1
        assert (log.histories.event_ts_E[newest_E] < requests.request_ts_R).all()
        label_C, item_C = requests.labels["label"], requests.candidates.features["item_id"]
        first_C = requests.candidates.offsets_R1[:-1]
        assert (label_C[first_C] == 1).all()
        assert label_C.sum() == len(requests)
        request_C = np.repeat(np.arange(len(requests)), np.diff(requests.candidates.offsets_R1))
        assert not ((item_C == item_C[first_C][request_C]) & (label_C == 0)).any()
        asked_E = log.histories.offsets_B1[row_R] + end_R  # the positive is among the events of that very time
        counts = count_in_history(log.histories, row_R, end_R + 1, item_C[first_C], [1])[0]
        alone_R = (
            log.histories.event_ts_E[np.minimum(asked_E + 1, len(log.histories.event_ts_E) - 1)]
            != requests.request_ts_R
        )
        assert counts[alone_R].all()


def test_power_laws_are_found_with_their_fit() -> None:
    x = np.array([20, 50, 100, 500, 2000, 4000.0])
    alpha, beta, gamma, r2 = power_law(x.tolist(), (0.8 - 0.3 * x**-0.4).tolist())
    assert r2 > 0.999
    assert beta == pytest.approx(-0.4, rel=0.05)
    assert alpha == pytest.approx(-0.3, rel=0.1)
    assert gamma == pytest.approx(0.8, abs=0.01)


def test_the_page_ends_with_one_line_of_json_and_means_over_seeds() -> None:
    def record(arm: str, seed: int, auc: float) -> dict:
        test = {"auc": auc, "long_auc": auc, "gauc": auc, "logloss": 0.4}
        about = {
            "embedding_rate": 0.01,
            "hardware": "cpu",
            "torch": "2",
            "quick": True,
            "train_requests": 1,
            "epochs": 1,
            "steps": 1,
            "train_s": 1.0,
        }
        same = {"log": "journey", "group": "encoders", "encoder": "longer", "features": True, "length": 200}
        sizes = {"dense_parameters": 1, "forward_flops": {"flops": 1e6}}
        return {"key": f"{arm}/{seed}", "arm": arm, "seed": seed, "test": test, **about, **same, **sizes}

    lines = page([record("longer+features", 0, 0.7), record("longer+features", 1, 0.8)]).splitlines()
    last = json.loads(lines[-1])
    assert last["auc"]["longer+features"] == pytest.approx(0.75)
    assert last["spread"] == pytest.approx(0.05)
    assert any("0.7500 ± 0.0500" in line for line in lines)
