"""Streaming metrics: what comes in batches and over workers is what all rows at once give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.training.metrics import auc, binary_metrics
from longer.training.streaming import BinaryTotals, StreamingMetrics
from longer.training_settings import TaskSettings


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(1, 30), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_batches_of_users_in_turn_on_any_number_of_workers_give_the_metrics_of_all_rows(
    seed: int, num_rows: int, num_users: int, batch: int, num_workers: int
) -> None:
    rng = np.random.default_rng(seed)
    user = rng.permutation(num_users)[np.sort(rng.integers(0, num_users, num_rows))]  # each one's rows together
    logit = rng.normal(0, 3, num_rows).round(1).astype(np.float32)
    label = rng.integers(0, 2, num_rows).astype(np.float32)
    workers = [BinaryTotals() for _ in range(num_workers)]
    for rank, totals in enumerate(workers):
        mine = np.flatnonzero(user % num_workers == rank)
        for first in range(0, len(mine), batch):
            rows = mine[first : first + batch]
            totals.add(logit[rows], label[rows], user[rows])
        totals.close()
    for other in workers[1:]:
        workers[0].merge(other)
    found, expected = workers[0].metrics(), binary_metrics(logit, label, user)
    for name in ("gauc", "logloss", "ne"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True)
    assert found.auc == pytest.approx(expected.auc, abs=workers[0].auc_error + 1e-12, nan_ok=True)


def test_the_base_rate_of_fractional_labels_is_their_mean_not_the_share_above_zero() -> None:
    rng = np.random.default_rng(0)
    logit, user = rng.normal(0, 1, 200), np.zeros(200, np.int64)
    label = rng.uniform(0, 1, 200) * rng.integers(0, 2, 200)  # a share of a video that was watched
    halves = [BinaryTotals(), BinaryTotals()]
    for totals, rows in zip(halves, (slice(0, 100), slice(100, 200)), strict=True):
        totals.add(logit[rows], label[rows], user[rows])
        totals.close()
    halves[0].merge(halves[1])
    assert halves[0].metrics().ne == pytest.approx(binary_metrics(logit, label, user).ne, rel=1e-12)


def test_the_rounding_of_auc_is_bounded_and_small() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 100_000).astype(np.float32)
    logit = (rng.normal(-1, 1.5, len(label)) + label).astype(np.float32)
    totals = BinaryTotals()
    totals.add(logit, label, np.zeros(len(label), np.int64))
    difference = abs(totals.metrics().auc - auc(logit, label))
    assert difference <= totals.auc_error <= 1e-4
    assert difference <= 1e-6


def test_scores_beyond_the_bins_are_told_apart_by_nothing_and_the_bound_says_so() -> None:
    totals = BinaryTotals()
    totals.add(np.array([40.0, 41.0]), np.array([0.0, 1.0]), np.zeros(2, np.int64))
    assert totals.metrics().auc == 0.5
    assert totals.auc_error == 0.5


def test_a_diverged_model_shows_in_its_log_loss() -> None:
    totals = BinaryTotals()
    totals.add(np.array([np.nan, 1.0]), np.array([0.0, 1.0]), np.zeros(2, np.int64))
    assert np.isnan(totals.metrics().logloss)


def test_each_task_has_its_own_metrics() -> None:
    totals = StreamingMetrics((TaskSettings(name="click"), TaskSettings(name="watch", kind="regression")))
    outputs = np.array([[1.0, 2.0], [-1.0, 4.0]], np.float32)
    totals.add(outputs, {"click": np.array([1.0, 0.0]), "watch": np.array([2.0, 1.0])}, np.zeros(2, np.int64))
    totals.close()
    assert totals.metrics()["click"]["auc"] == 1.0
    assert totals.metrics()["watch"] == {"mse": 4.5}
