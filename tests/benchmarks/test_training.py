"""What the training benchmark compares, and what its last line holds."""

import json
from pathlib import Path

import numpy as np

from benchmarks.model_arms.page import Page, summary
from benchmarks.model_arms.sizes import per_impression, random_batch


def test_impressions_one_a_row_are_of_many_users_as_a_shuffled_log_has_them() -> None:
    batch = random_batch(np.random.default_rng(0), np.arange(1, 65), num_candidates=32)
    few = per_impression(batch, 16)
    assert len(set(few.histories.user_key_B.tolist())) == 16
    assert few.history_end_R.tolist() == [*range(1, 65, 4)]
    first = few.candidates.features["item_id"][1]
    assert first == batch.candidates.features["item_id"][4 * 32]
    assert few.labels["click"][1] == batch.labels["click"][4 * 32]


def test_the_last_line_has_every_ratio_of_every_size() -> None:
    size = {"width": 512, "L": 2000, "lengths": "Zipf", "mfu": 0.2}
    rows = [
        {**size, "arm": arm, "impressions_per_s": rate}
        for arm, rate in (("model step", 300.0), ("shared padded", 100.0), ("per impression", 2.0))
    ]
    speed = {"end to end": 95, "model step": 100}
    end_to_end = {
        "512": {"impressions_per_s": speed, "end_to_end_share": 0.95, "whole_run_share": 0.8, "data_wait_share": 0.001}
    }
    precision = {
        "bf16, recomputed": {"ms_per_step": 10.0, "held_gb": 2.0},
        "float32": {"ms_per_step": 40.0, "held_gb": 4.0},
    }
    found = summary(rows, precision, end_to_end)
    name = "width512_L2000_zipf"
    assert found["impressions_per_s"][name] == {"model step": 300, "shared padded": 100, "per impression": 2}
    assert found["impressions_per_s"]["width512_end_to_end"] == speed
    assert (found["vs_per_impression"][name], found["vs_shared_padded"][name], found["mfu"][name]) == (150.0, 3.0, 0.2)
    assert (found["end_to_end_share"], found["data_wait_share"]) == ({"512": 0.95}, {"512": 0.001})
    assert (found["amp_recompute_speedup"], found["amp_recompute_memory"]) == (4.0, -0.5)


def test_a_run_that_is_cut_leaves_what_it_has_and_names_the_rest(tmp_path: Path) -> None:
    row = {"width": 512, "L": 2000, "lengths": "Zipf", "arm": "model step", "impressions_per_s": 300.0, "mfu": 0.2}
    page = Page(str(tmp_path / "page.md"), ["model step", "precision: float32", "end to end"])
    page.rows.append(row)
    page.done("model step")
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| 512 | 2000 | Zipf | model step | 300 | 0.2 |" in lines
    last = json.loads(lines[-1])
    assert last["left_out"] == ["precision: float32", "end to end"]
    assert last["impressions_per_s"] == {"width512_L2000_zipf": {"model step": 300}}
    assert "amp_recompute_speedup" not in last
