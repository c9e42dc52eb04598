"""Scores by CUDA graphs against those of launched kernels, whatever graph a batch falls into and whatever was scored before."""

import numpy as np
import pytest
import torch

from longer.model.captured_scores import CapturedScores, _rounded
from longer.model.pool import Precision
from longer.model.states import append, score
from tests.model.generate import encoded, pool_for, random_candidates, random_histories, slots_for, small_model


def test_sizes_of_graphs_are_few_and_waste_little() -> None:
    sizes = {_rounded(n) for n in range(1, 20_000)}
    assert len(sizes) < 40
    assert all(n <= _rounded(n) <= max(n + 64, 1.25 * n) for n in range(1, 20_000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replayed_scores_are_those_of_launched_kernels_for_any_batch(precision: Precision) -> None:
    model = small_model(dtype=torch.float32).cuda()
    rng = np.random.default_rng(3)
    pool = pool_for(model, 20, precision)
    tolerance = 1e-5 if precision == "float32" else 3e-2
    with torch.compiler.set_stance("force_eager"):
        captured = CapturedScores(model, pool)
        for lengths in ([0, 5, 24, 55], [60, 41, 1], [7], [0], [33] * 7):
            histories = random_histories(rng, lengths)
            states = encoded(model, pool, histories)
            for counts in (rng.integers(0, 90, len(lengths)), np.full(len(lengths), 300)):
                candidates = random_candidates(rng, [*counts[:-1].tolist(), int(counts[-1]) + 1])
                request_ts = np.full(len(lengths), 2_000_000_000_000)
                wanted = score(model, pool, states, request_ts, candidates)
                np.testing.assert_allclose(
                    captured.score(states, request_ts, candidates), wanted, rtol=tolerance, atol=tolerance
                )
            ends = histories.end_index_B
            longer = random_histories(rng, [n + 9 for n in lengths])
            grown = longer.slice_events(np.arange(len(lengths)), ends, ends + 9)
            states = append(model, pool, states, grown, slots_for(pool, ends + 9))
            candidates = random_candidates(rng, [40] * len(lengths))
            np.testing.assert_allclose(
                captured.score(states, request_ts, candidates),
                score(model, pool, states, request_ts, candidates),
                rtol=tolerance, atol=tolerance,
            )  # fmt: skip
