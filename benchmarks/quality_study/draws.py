"""What a difference of two arms' AUC is worth: AUC of the same draws of users for every arm, kept in its record.

C rows (candidates), D draws, V distinct scores.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.quality_study.rows import Record
from longer.arrays import Int64

_NUM_DRAWS = 200


def auc_of_draws(score_C: np.ndarray, label_C: np.ndarray, user_C: Int64) -> list[float]:
    """AUC of each draw of users with replacement; equal rows in equal order are drawn alike."""
    _, user_C = np.unique(user_C, return_inverse=True)
    rng, num_users = np.random.default_rng(0), int(user_C.max()) + 1
    draws = (rng.multinomial(num_users, np.full(num_users, 1 / num_users)) for _ in range(_NUM_DRAWS))
    _, place_C = np.unique(score_C, return_inverse=True)
    return [round(_weighted_auc(place_C, label_C > 0, times_U[user_C]), 6) for times_U in draws]


def lead(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float]:
    """95% interval of the difference of mean AUC on long histories."""
    ours_D, theirs_D = (np.mean([record["long_auc_draws"] for record in records], axis=0) for records in (ours, theirs))
    low, high = np.quantile(ours_D - theirs_D, [0.025, 0.975])
    return float(low), float(high)


def _weighted_auc(place_C: np.ndarray, label_C: np.ndarray, weight_C: np.ndarray) -> float:
    """Of rows that count `weight_C` times, by the rank of their scores; ties count half."""
    negative_V, positive_V = np.bincount(place_C, weight_C * ~label_C), np.bincount(place_C, weight_C * label_C)
    below_V = np.cumsum(negative_V) - negative_V / 2
    return float(positive_V @ below_V / (positive_V.sum() * negative_V.sum()))
