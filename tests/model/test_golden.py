"""Golden scores: a change that is not meant to change the model must not change them.

Weights and inputs come from seeded NumPy, whose generators are stable; float64 leaves room for other processors' rounding.
"""

import numpy as np
import torch

from longer.model.inputs import to_tensors
from tests.model.generate import one_request_a_row, random_candidates, random_histories, small_model


def test_scores_have_not_moved() -> None:
    rng = np.random.default_rng(2025)
    model = small_model()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.4, tuple(parameter.shape))))
    histories = random_histories(rng, [0, 5, 50])
    candidates = random_candidates(rng, [1, 2, 1])
    batch = one_request_a_row(model, histories, np.array([1_600_000_000_000] * 3) + 10**12, candidates)
    golden = np.array(GOLDEN)
    np.testing.assert_allclose(model(to_tensors(batch)).detach().numpy(), golden, rtol=1e-9)


GOLDEN = [
    [2.035387975798507, 1.876646134832949],
    [0.6862269587802955, 2.034274125052424],
    [-0.318104317831712, -4.702838480914043],
    [1.40814320811861, 2.1276387135774146],
]
"""Since the first layer turns no pairs of channels (checkpoints' format 3)."""
