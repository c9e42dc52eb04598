"""The study's page says what its records do: means and spreads, fits, the frontier, what stopped a search, what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality_study.page import page
from benchmarks.quality_study.plots import plots
from benchmarks.quality_study.records import Records
from benchmarks.quality_study.rows import auc, by_arm, frontier, power_law
from benchmarks.quality_study.steering import trials
from benchmarks.quality_study.tuning import SEARCH

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def record(arm: str, seed: int, auc: float, **more: object) -> dict:
    test = {"auc": auc, "long_auc": auc, "gauc": auc, "logloss": 0.4, "rows": 9, "long_rows": 3}
    about = {"hardware": "cpu", "torch": "2", "quick": True, "train_requests": 1, "steps": 1, "train_s": 1.0}
    trained = {"tables": 0.01, "dense": 0.002, "passes": 1}
    same = {"log": "journey", "group": "encoders", "encoder": "longer", "features": True, "length": 200}
    sizes = {"dense_parameters": 1, "table_parameters": 1, "forward_flops": {"flops": 1e6}}
    found = {"test": test, "long_auc_draws": [auc, auc], "trained": trained}
    return {"key": f"{arm}/{seed}", "arm": arm, "seed": seed, **found, **about, **same, **sizes, **more}


@pytest.mark.parametrize("records", sorted(_RESULTS.glob("quality_*.jsonl")), ids=lambda path: path.stem)
def test_a_page_that_is_kept_says_what_its_records_do(records: Path) -> None:
    """`--page-only` makes it anew; only what stands before the tables is written by hand."""
    kept, body = records.with_suffix(".md").read_text(), page(Records(records).read()).partition("\n")[2].strip()
    assert kept.rstrip().endswith(body)
    num_trials, num_arms = re.search(r"are (\d+) trials, .* and (\d+) arms", kept.replace("\n", " ")).groups()
    last = {record.get("key"): record for record in Records(records).read()}  # some may have been trained again
    groups = [record["group"] for record in last.values() if "trained" in record]
    assert (groups.count("tuning"), len(groups) - groups.count("tuning")) == (int(num_trials), int(num_arms))


def test_power_laws_are_found_with_their_fit() -> None:
    x = np.array([20, 50, 100, 500, 2000, 4000.0])
    alpha, beta, gamma, r2 = power_law(x.tolist(), (0.8 - 0.3 * x**-0.4).tolist())
    assert r2 > 0.999
    assert beta == pytest.approx(-0.4, rel=0.05)
    assert alpha == pytest.approx(-0.3, rel=0.1)
    assert gamma == pytest.approx(0.8, abs=0.01)


def test_a_fit_says_what_it_misses_and_what_it_would_have_foretold() -> None:
    """R² alone calls a curve a law that its own last points refute."""
    lengths, bent = (20, 50, 100, 200, 500, 1000, 2000, 4000), []
    for length in lengths:
        value = 0.9 - 0.5 * min(length, 1000) ** -0.3  # no more is gained from 1,000 on
        bent.append(record(f"longer L={length}", 0, value, features=False, length=length, group="lengths"))
    told = next(line for line in page(bent).splitlines() if line.startswith("ids, long histories, by length"))
    miss = float(re.search(r"misses by ([\d.]+)", told).group(1))
    foretold, found = map(float, re.search(r"it gives ([\d.]+) for the last, ([\d.]+)", told).groups())
    assert 0.003 < miss < 0.1
    assert found == pytest.approx(0.9 - 0.5 * 1000**-0.3, abs=1e-4)
    assert foretold > found + 0.01


def test_the_frontier_holds_what_nothing_as_cheap_is_better_than() -> None:
    costs = {"cheap": (1, 0.6), "worse": (2, 0.59), "better": (2, 0.7), "dear": (9, 0.7), "best": (9, 0.71)}
    records = [
        record(arm, 0, value, features=False, forward_flops={"flops": flops * 1e6})
        for arm, (flops, value) in costs.items()
    ]
    assert frontier(by_arm(records), auc) == ["cheap", "better", "best"]
    assert "- on ids: cheap (1: 0.6000); better (2: 0.7000); best (9: 0.7100)" in page(records)


def test_arms_whose_trials_have_found_better_since_are_named() -> None:
    trial = {**record("t", 0, 0.7, group="tuning", trained={"tables": 0.03, "dense": 0.002, "passes": 1})}
    trial["valid"] = {"auc": 0.7}
    assert "to be trained again" in page([record("longer+features", 0, 0.7), trial])
    now = record("longer+features", 0, 0.7, trained=trial["trained"])
    assert "to be trained again" not in page([now, trial])


def test_a_best_rate_at_the_end_of_what_is_tried_is_told() -> None:
    best = {"tables": SEARCH.beyond[1], "dense": 0.002, "passes": 1}
    record = {"group": "tuning", "encoder": "din", "features": False, "trained": best, "valid": {"auc": 0.7}}
    assert trials([record]).endswith("| tables rate |")
    assert trials([record | {"trained": best | {"tables": 0.01}}]).endswith("|  |")


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
