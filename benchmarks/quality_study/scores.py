"""Scores of the test rows, kept beside the results, and what a difference of two arms' AUC is worth.

S seeds, C rows (candidates), V distinct scores.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality_study.arms import Arm
from benchmarks.quality_study.data import Log
from benchmarks.quality_study.rows import Record
from longer.model_settings import ModelSettings

_NUM_DRAWS = 200


def keep_rows(results: Path, log: Log, test_requests: int, long_from: int) -> None:
    """Label, user, and whether the history is long, of the log's test rows."""
    data = log.split("test", ModelSettings().windows).spread(test_requests)
    requests = data.requests
    is_long = np.repeat(requests.history_end_R, np.diff(requests.candidates.offsets_R1)) >= long_from
    results.with_suffix(".scores").mkdir(exist_ok=True)
    np.savez(_file(results, f"{log.name}_rows"), label=requests.labels["label"] > 0, user=data.row_C, is_long=is_long)


def keep_scores(results: Path, arm: Arm, score_C: np.ndarray) -> None:
    results.with_suffix(".scores").mkdir(exist_ok=True)
    np.savez(_file(results, arm.key), score=score_C.astype(np.float16))


def lead(
    results: Path | None, log: str, ours: Sequence[Record], theirs: Sequence[Record], only_long: bool
) -> tuple[float, float] | None:
    """95% interval of the difference of mean AUC, drawing users with replacement, the same for both; None without scores."""
    files = [_file(results, record["key"]) for record in (*ours, *theirs)] if results else []
    if results is None or not all(file.exists() for file in files):
        return None
    rows = np.load(_file(results, f"{log}_rows"))
    chosen = rows["is_long"] if only_long else np.ones(len(rows["label"]), bool)
    label_C, (_, user_C) = rows["label"][chosen], np.unique(rows["user"][chosen], return_inverse=True)
    rng, num_users = np.random.default_rng(0), int(user_C.max()) + 1
    weight_DC = rng.multinomial(num_users, np.full(num_users, 1 / num_users), _NUM_DRAWS)[:, user_C]
    auc_SD = [weighted_auc(np.load(file)["score"][chosen], label_C, weight_DC) for file in files]
    difference_D = np.mean(auc_SD[: len(ours)], axis=0) - np.mean(auc_SD[len(ours) :], axis=0)
    low, high = np.quantile(difference_D, [0.025, 0.975])
    return float(low), float(high)


def weighted_auc(score_C: np.ndarray, label_C: np.ndarray, weight_DC: np.ndarray) -> np.ndarray:
    """[D]: for each draw's weights of rows, the AUC; ties count half."""
    _, place_C = np.unique(score_C, return_inverse=True)
    found = []
    for weight_C in weight_DC:
        negative_V = np.bincount(place_C, weight_C * ~label_C)
        positive_V = np.bincount(place_C, weight_C * label_C)
        below_V = np.cumsum(negative_V) - negative_V / 2
        found.append((positive_V @ below_V) / (positive_V.sum() * negative_V.sum()))
    return np.array(found)


def _file(results: Path, key: str) -> Path:
    return results.with_suffix(".scores") / f"{key.replace('/', '_').replace(' ', '_')}.npz"
