"""What a GPU's graphs compute for user states, without graphs: the kernels in Triton's interpreter, filling included."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longer.model import captured_call, fuse
from longer.model.captured_growth import CapturedGrowth
from longer.model.captured_scores import CapturedScores
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision
from longer.model.states import UserState, append, encode, score
from tests.model.generate import encoded, pool_for, random_candidates, random_histories, slots_for, small_model
from tests.model.tolerances import OF_TESTED_MODELS

if torch.cuda.is_available():
    pytest.skip("tests/model/test_growth.py has the graphs themselves", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the kernels need Triton: CUDA builds of PyTorch bring it")
pytestmark = pytest.mark.kernels

LENGTHS = [0, 1, 11, 12, 13, 24, 25, 30, 31, 60]
REQUEST_TS = 2_000_000_000_000
EXAMPLES: list[tuple[dict[str, np.ndarray], Tensor]] = []
"""With which graphs would have been captured, and what came out."""


class Called:
    """A `CapturedCall` that calls its function each time; what a shorter call leaves of the one before stands behind it too."""

    def __init__(self, function: Callable[[dict[str, Tensor]], Any], example: dict[str, np.ndarray], *_: Any) -> None:
        self._function = function
        self._tensors = {name: torch.from_numpy(array.reshape(-1).copy()) for name, array in example.items()}
        EXAMPLES.append((example, function(self._tensors)))

    def __call__(self, arrays: dict[str, np.ndarray]) -> Any:
        for name, array in arrays.items():
            self._tensors[name][: array.size] = torch.from_numpy(array.reshape(-1))
        return self._function(self._tensors)


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fuse.has_kernels
    for module in [module for name, module in sys.modules.items() if name.startswith("longer.")]:
        if getattr(module, "has_kernels", None) is real:
            monkeypatch.setattr(module, "has_kernels", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(captured_call, "CapturedCall", Called)
    EXAMPLES.clear()


def graphs_of(model: Longer, pool: StatePool) -> tuple[CapturedGrowth, CapturedScores]:
    return CapturedGrowth(model, pool, None), CapturedScores(model, pool, None)


@pytest.mark.parametrize("precision", ["float32", "int8", "fp8"])
def test_states_that_graphs_grow_and_score_are_those_of_the_reference(precision: Precision) -> None:
    """Encoded halfway, appended to, and asked by fewer users and candidates than there is room for."""
    rng, rows = np.random.default_rng(0), np.arange(len(LENGTHS))
    exact, model = small_model(), small_model(dtype=torch.float32)
    histories, request_ts = random_histories(rng, LENGTHS), np.full(len(LENGTHS), REQUEST_TS)
    candidates, ends = random_candidates(rng, rng.integers(0, 40, len(LENGTHS)).tolist()), histories.end_index_B
    pool, exact_pool = pool_for(model, 2 * len(LENGTHS), precision), pool_for(exact, len(LENGTHS))
    growth, scores = graphs_of(model, pool)
    with torch.compiler.set_stance("force_eager"):
        before = histories.slice_events(rows, ends * 0, ends // 2)
        states = encode(model, pool, before, slots_for(pool, ends), growth.grow)
        slots = [state.slot for state in states]
        states = append(model, pool, states, histories.slice_events(rows, ends // 2, ends), slots, growth.grow)
        found = scores.score(states, request_ts, candidates)
    wanted = score(exact, exact_pool, encoded(exact, exact_pool, histories), request_ts, candidates)
    if precision == "float32":
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        probabilities = (torch.from_numpy(x[:, 0]).double().sigmoid() for x in (found, wanted))
        np.testing.assert_allclose(*probabilities, rtol=0, atol=OF_TESTED_MODELS[precision])


def test_what_fills_a_batch_up_reads_nothing_of_anyone() -> None:
    """What a graph makes of its filling stays in its memory until the next replay, whoever is forgotten."""
    rng, model = np.random.default_rng(0), small_model(dtype=torch.float32)
    pool, histories = pool_for(model, 4), random_histories(rng, [25, 60])
    _, scores = graphs_of(model, pool)
    with torch.compiler.set_stance("force_eager"):
        states: list[UserState] = encoded(model, pool, histories)
        pool.words_NI[: pool.trash_row] = -1  # NaN in every float
        assert np.isnan(scores.score(states, np.full(2, REQUEST_TS), random_candidates(rng, [3, 4]))).all()
    [(filling, outputs)] = EXAMPLES
    assert torch.isfinite(outputs).all()
    assert set(filling["numbers"].flatten()) == {0, pool.trash_row, pool.trash_word}  # words of numbers have no NaN
