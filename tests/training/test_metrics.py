"""Metrics against their definitions: pairs compared one by one, and cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.training.metrics import auc, binary_metrics, gauc, log_loss, normalized_entropy

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 4)), min_size=1, max_size=60)


def auc_by_pairs(scores: np.ndarray, labels: np.ndarray) -> float:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels > 0] for n in scores[labels == 0]]
    return float(np.mean(wins)) if wins else math.nan


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_auc_and_gauc_equal_counting_pairs_with_ties_as_half(rows: list) -> None:
    scores, labels, users = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    assert auc(scores, labels) == pytest.approx(auc_by_pairs(scores, labels), nan_ok=True)
    parts = [(users == user, auc_by_pairs(scores[users == user], labels[users == user])) for user in set(users)]
    mixed = [(mask.sum(), value) for mask, value in parts if not math.isnan(value)]
    expected = sum(n * v for n, v in mixed) / sum(n for n, _ in mixed) if mixed else math.nan
    assert gauc(scores, labels, users.astype(np.int64)) == pytest.approx(expected, nan_ok=True)


def test_auc_equals_torchmetrics_on_probabilities() -> None:
    import torch
    from torchmetrics.functional.classification import binary_auroc

    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 50, 5000) / 50, rng.integers(0, 2, 5000)
    expected = binary_auroc(torch.from_numpy(scores), torch.from_numpy(labels)).item()
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-6)


def test_auc_keeps_apart_scores_that_a_sigmoid_would_round_together() -> None:
    assert auc(np.array([40.0, 41.0, 42.0, 43.0]), np.array([0, 0, 1, 1])) == 1.0


def test_gauc_weights_users_by_impressions_and_leaves_out_users_of_one_class() -> None:
    scores = np.array([1, 0, 3, 2, 1, 0, 9, 9.0])
    labels = np.array([1, 0, 0, 1, 1, 1, 0, 0.0])  # user 0: AUC 1 of 2 rows; user 1: AUC 0 of 4; user 2: no positive
    assert gauc(scores, labels, np.array([0, 0, 1, 1, 1, 1, 2, 2])) == pytest.approx(1 * 2 / 6)


def test_log_loss_of_a_certain_mistake_is_finite_and_not_clipped() -> None:
    assert log_loss(np.array([100.0], np.float32), np.array([0.0])) == pytest.approx(100.0)
    assert log_loss(np.array([0.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(math.log(2))


def test_normalized_entropy_of_the_base_rate_is_one_and_undefined_for_one_class() -> None:
    labels = np.array([1, 0, 0, 0.0])
    metrics = binary_metrics(np.full(4, math.log(1 / 3)), labels, np.zeros(4, np.int64))
    assert metrics.ne == pytest.approx(1.0)
    assert math.isnan(normalized_entropy(0.1, 0.0))
