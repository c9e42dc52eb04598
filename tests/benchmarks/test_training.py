"""What the training benchmark compares, and what its last line holds."""

import numpy as np

from benchmarks.model_arms.sizes import per_impression, random_batch
from benchmarks.training import summary


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
    found = summary(rows, {"amp_recompute_speedup": 4.0, "amp_recompute_memory": -0.5}, end_to_end)
    name = "width512_L2000_zipf"
    assert found["impressions_per_s"][name] == {"model step": 300, "shared padded": 100, "per impression": 2}
    assert found["impressions_per_s"]["width512_end_to_end"] == speed
    assert (found["vs_per_impression"][name], found["vs_shared_padded"][name], found["mfu"][name]) == (150.0, 3.0, 0.2)
    assert (found["end_to_end_share"], found["data_wait_share"]) == ({"512": 0.95}, {"512": 0.001})
    assert (found["amp_recompute_speedup"], found["amp_recompute_memory"]) == (4.0, -0.5)
