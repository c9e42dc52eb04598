"""Ranking and calibration metrics, exact and vectorised. C candidates (rows) of U users."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.integer]


Metrics = dict[str, dict[str, float | None]]
"""By task and name; None where one is not defined, since JSON has no NaN."""


def defined(metrics: dict[str, dict[str, float]]) -> Metrics:
    """The metrics with None for what is not finite."""
    return {
        task: {name: x if math.isfinite(x) else None for name, x in values.items()} for task, values in metrics.items()
    }


def shown(metrics: Mapping[str, float | None]) -> str:
    """One task's, as a line tells them."""
    return ", ".join(f"{name} {'undefined' if x is None else f'{x:.4f}'}" for name, x in metrics.items())


def shown_all(metrics: Metrics) -> str:
    """All tasks', in their order; of several, with their names."""
    if len(metrics) == 1:
        return shown(*metrics.values())
    return "; ".join(f"{task}: {shown(values)}" for task, values in metrics.items())


@dataclass(frozen=True)
class BinaryMetrics:
    """NaN stands for 'not defined': labels of one class only."""

    auc: float
    gauc: float
    logloss: float
    ne: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def binary_metrics(logit_C: npt.NDArray, label_C: npt.NDArray, user_C: Ints) -> BinaryMetrics:
    """AUC, GAUC, log loss and normalized entropy of logits on the same rows."""
    logloss = log_loss(logit_C, label_C)
    return BinaryMetrics(
        auc(logit_C, label_C),
        gauc(logit_C, label_C, user_C),
        logloss,
        normalized_entropy(logloss, float(label_C.mean())),
    )


def auc(score_C: npt.NDArray, label_C: npt.NDArray) -> float:
    """Exact area under the ROC curve, in float64; ties count half."""
    return gauc(score_C, label_C, np.zeros(len(label_C), np.int64))


def gauc(score_C: npt.NDArray, label_C: npt.NDArray, user_C: Ints) -> float:
    """Mean of the users' own AUCs, weighted by their impressions; users with labels of one class are left out."""
    weighted_sum, weight = gauc_sums(score_C, label_C, user_C)
    return weighted_sum / weight if weight else math.nan


def gauc_sums(score_C: npt.NDArray, label_C: npt.NDArray, user_C: Ints) -> tuple[float, int]:
    """The numerator and denominator of `gauc`, which add up over sets of whole users."""
    if not len(label_C):
        return 0.0, 0
    order = np.lexsort((score_C, user_C))
    user, score, positive = user_C[order], score_C[order], label_C[order] > 0
    new_user = np.r_[True, user[1:] != user[:-1]]
    starts_U = np.flatnonzero(new_user)
    size_U = np.diff(np.r_[starts_U, len(user)])
    rank = _mid_ranks(new_user | np.r_[True, score[1:] != score[:-1]]) - np.repeat(starts_U, size_U)
    positives_U = np.add.reduceat(positive, starts_U, dtype=np.int64)
    rank_sum_U = np.add.reduceat(np.where(positive, rank, 0.0), starts_U)
    pairs_U = positives_U * (size_U - positives_U)
    mixed_U = pairs_U > 0
    auc_U = (rank_sum_U - positives_U * (positives_U + 1) / 2)[mixed_U] / pairs_U[mixed_U]  # Mann-Whitney
    return float(auc_U @ size_U[mixed_U]), int(size_U[mixed_U].sum())


def _mid_ranks(tie_starts: npt.NDArray[np.bool_]) -> npt.NDArray:
    """Ranks from 1 over all rows of a sorted order; tied rows share the middle of their ranks."""
    starts = np.flatnonzero(tie_starts)
    sizes = np.diff(np.r_[starts, len(tie_starts)])
    return np.repeat(starts + (sizes + 1) / 2, sizes)


def log_loss(logit_C: npt.NDArray, label_C: npt.NDArray) -> float:
    """Mean binary cross-entropy in nats, from logits in float64: no probability is clipped."""
    logits, labels = torch.from_numpy(logit_C.astype(np.float64)), torch.from_numpy(label_C.astype(np.float64))
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))


def normalized_entropy(logloss: float, base_rate: float) -> float:
    """Log loss over that of always answering the base rate (He et al., ADKDD 2014): below 1 is better than knowing nothing."""
    if not 0 < base_rate < 1:
        return math.nan
    return logloss / -(base_rate * math.log(base_rate) + (1 - base_rate) * math.log(1 - base_rate))
