"""States kept in fewer bits: how far that may move a score, and that what is kept is not rounded again by living on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.engine import _with_products_in
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import append, score
from tests.model.generate import encoded, pool_for, random_candidates, random_histories, slots_for, small_model
from tests.model.tolerances import TOLERANCE

MODEL = small_model(dtype=torch.float32)


def test_log_odds_of_rare_clicks_are_told_apart_though_products_are_in_bf16() -> None:
    rng, twin = np.random.default_rng(3), _with_products_in(torch.bfloat16, MODEL)
    pool = pool_for(MODEL, 3, "bf16")
    states = encoded(MODEL, pool, random_histories(rng, [40, 25]))
    candidates, request_ts = random_candidates(rng, [300, 300]), np.full(2, 2_000_000_000_000)
    exact = score(MODEL, pool, states, request_ts, candidates)[:, 0]
    for model in (MODEL, twin):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            outputs = score(model, pool, states, request_ts, candidates)[:, 0]
        assert outputs.dtype == np.float32
        assert len(np.unique(outputs)) > 0.9 * len(np.unique(exact))
        np.testing.assert_allclose(outputs, exact, atol=0.2)


def probabilities(model: Longer, kept: Precision, seed: int) -> np.ndarray:
    """Of candidates of users whose states were encoded halfway, and appended to twice."""
    rng = np.random.default_rng(seed)
    histories = random_histories(rng, [0, 5, 24, 55, 60, 41])
    candidates, request_ts = random_candidates(rng, [20] * 6), np.full(6, 2_000_000_000_000)
    rows, ends, pool = np.arange(6), histories.end_index_B, pool_for(model, 12, kept)
    states = encoded(model, pool, histories.slice_events(rows, rows * 0, ends // 2))
    for begin, end in ((ends // 2, ends - ends // 4), (ends - ends // 4, ends)):
        states = append(model, pool, states, histories.slice_events(rows, begin, end), slots_for(pool, ends))
    return torch.from_numpy(score(model, pool, states, request_ts, candidates)[:, 0]).sigmoid().numpy()


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_shortened_states_stay_within_the_tolerance_stated_for_models_of_many_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {
        "event_width": int(rng.choice([4, 8])),
        "merge_size": int(rng.integers(1, 4)),
        "num_self_layers": int(rng.integers(1, 4)),
    }
    model = small_model(seed, torch.float32, **sizes)
    exact = probabilities(model, "float32", seed)
    for precision, tolerance in TOLERANCE.items():
        assert 0 < np.abs(probabilities(model, precision, seed) - exact).max() <= tolerance, (precision, sizes)


@pytest.mark.parametrize("precision", ["float32", *TOLERANCE])
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=20, deadline=None)
def test_what_is_kept_is_as_close_as_its_bits_allow(precision: Precision, seed: int, scale: float) -> None:
    """bf16 keeps 8 bits, fp8 (e4m3) 4, int8 a 254th of the head's range; and keeping what was kept changes nothing."""
    pool = StatePool(StateLayout.of(MODEL, precision), 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (5, pool.layout.num_heads, pool.layout.head_width)
    key, value = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    rows = torch.tensor([4, 0, 9, 2, 7])
    pool.write_rows(rows, key, value)
    kept = pool.read_rows(rows, torch.float32)
    for x, y in zip((key, value), kept, strict=True):
        if precision == "int8":
            assert ((x - y).abs() <= x.abs().amax(-1, keepdim=True) / 253).all()
        else:
            relative = {"float32": 0.0, "bf16": 2**-8, "fp8": 2**-4}[precision]
            assert ((x - y).abs() <= x.abs() * relative + 2**-10 * (precision == "fp8")).all()
    pool.write_rows(rows, *kept)
    for x, y in zip(kept, pool.read_rows(rows, torch.float32), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_fewer_bits_are_fewer_bytes() -> None:
    sizes = {kept: StateLayout.of(small_model(event_width=32), kept) for kept in ("float32", "bf16", "int8", "fp8")}
    num_bytes = {kept: layout.largest_rows * layout.row_bytes for kept, layout in sizes.items()}
    assert num_bytes["float32"] > 1.7 * num_bytes["bf16"]
    assert num_bytes["bf16"] > num_bytes["int8"] > num_bytes["fp8"]
