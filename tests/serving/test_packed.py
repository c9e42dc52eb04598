"""Packs in one flat pass against the CPU's sweep in float64; without a GPU, in Triton's interpreter where it is installed."""

import os

import numpy as np
import pytest
import torch

from longer.model.longer import Longer
from longer.serving import packed
from longer.serving.offline import score_lists
from longer.serving.packed import Packed, score_packed
from longer.serving.questions import Budget, Questions
from tests.model.generate import random_candidates, random_histories, small_model

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the kernels need Triton: CUDA builds of PyTorch bring it")
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = pytest.mark.kernels


def models() -> tuple[Longer, Longer]:
    """Of equal weights: in float64 on a CPU, and in float32 where kernels are."""
    made = [small_model(3, torch.float32) for _ in range(2)]
    for model in made:
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    return made[0].double(), made[1].to(DEVICE)


@pytest.mark.parametrize("lengths", [[80, 3, 33], [1], [0, 0], [0, 25, 2]], ids=str)
@pytest.mark.parametrize("most", [1, 1 << 30], ids=["a pack a pass", "one pass"])
def test_filled_up_passes_give_what_a_sweep_gives(
    lengths: list[int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of users without a full group, or without an event at all, and where there is one of everything."""
    monkeypatch.setattr(packed, "has_kernels", lambda _: True)
    exact, model = models()
    rng = np.random.default_rng(len(lengths))
    num_requests = 7 if len(lengths) > 1 else 1
    row_R = rng.integers(0, len(lengths), num_requests)
    end_R = rng.integers(0, np.array(lengths)[row_R] + 1)
    questions = Questions(random_histories(rng, lengths), row_R, end_R, np.full(num_requests, 2 * 10**12))
    candidates = random_candidates(rng, [1, *rng.integers(0, 5, num_requests - 1)])
    swept = score_lists(questions, candidates, Budget(exact, 1 << 30))
    in_packs = Packed.of(model, questions, candidates, 3)
    found = np.full_like(swept, np.nan)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        score_packed(in_packs, in_packs.num_candidates_P, most, found)
    np.testing.assert_allclose(found, swept, rtol=1e-4, atol=1e-5)
