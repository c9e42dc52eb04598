"""The metrics of `metrics.py` over rows that come in batches and go: no score is kept, and several workers' sums add up.

Log loss, normalized entropy and GAUC are exact, GAUC because a user's rows come one after another. AUC is that of logits
rounded to 1/2048 within -16..16; `auc_error` bounds what that changes. C candidates, T tasks.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from longer.training.metrics import BinaryMetrics, Ints, gauc_sums, normalized_entropy
from longer.training_settings import TaskSettings

_NUM_BINS = 1 << 16
_MOST_LOGIT = 16.0


class BinaryTotals:
    """Sums of one binary task."""

    def __init__(self) -> None:
        self._rows_B, self._positives_B = np.zeros(_NUM_BINS, np.int64), np.zeros(_NUM_BINS, np.int64)
        self._label_sum, self._loss_sum, self._gauc_sum, self._gauc_rows = 0.0, 0.0, 0.0, 0
        self._open: tuple[npt.NDArray, npt.NDArray, Ints] | None = None

    def add(self, logit_C: npt.NDArray, label_C: npt.NDArray, user_C: Ints) -> None:
        """Rows of users in turn: one whose rows are over does not come again."""
        if not len(logit_C):
            return
        within_C = np.clip(np.nan_to_num(logit_C), -_MOST_LOGIT, _MOST_LOGIT)  # of a NaN the log loss tells
        bin_C = np.rint((within_C + _MOST_LOGIT) * ((_NUM_BINS - 1) / (2 * _MOST_LOGIT))).astype(np.int64)
        self._rows_B += np.bincount(bin_C, minlength=_NUM_BINS)
        self._positives_B += np.bincount(bin_C[label_C > 0], minlength=_NUM_BINS)
        logits, labels = torch.from_numpy(logit_C.astype(np.float64)), torch.from_numpy(label_C.astype(np.float64))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        self._label_sum += float(labels.sum())
        self._loss_sum += float(loss)
        rows = (logit_C, label_C, user_C)
        if self._open:
            rows = tuple(np.concatenate(both) for both in zip(self._open, rows, strict=True))  # type: ignore[assignment]
        last = len(rows[2]) - int(np.argmax(rows[2][::-1] != rows[2][-1])) if (rows[2] != rows[2][-1]).any() else 0
        self._count_users(*(part[:last] for part in rows))
        self._open = rows[0][last:], rows[1][last:], rows[2][last:]

    def close(self) -> None:
        """No more rows: the last user's are counted."""
        if self._open:
            self._count_users(*self._open)
        self._open = None

    def merge(self, other: "BinaryTotals") -> None:
        """Adds what another, closed, has of other users."""
        self._rows_B += other._rows_B
        self._positives_B += other._positives_B
        self._label_sum += other._label_sum
        self._loss_sum += other._loss_sum
        self._gauc_sum += other._gauc_sum
        self._gauc_rows += other._gauc_rows

    def metrics(self) -> BinaryMetrics:
        num_rows = int(self._rows_B.sum())
        if not num_rows:
            return BinaryMetrics(math.nan, math.nan, math.nan, math.nan)
        negatives_B = self._rows_B - self._positives_B
        won_B = np.cumsum(negatives_B) - negatives_B / 2
        logloss = self._loss_sum / num_rows
        return BinaryMetrics(
            auc=float(self._positives_B @ won_B) / self._num_pairs if self._num_pairs else math.nan,
            gauc=self._gauc_sum / self._gauc_rows if self._gauc_rows else math.nan,
            logloss=logloss,
            ne=normalized_entropy(logloss, self._label_sum / num_rows),
        )

    @property
    def auc_error(self) -> float:
        """The most that AUC can differ from the exact one: half of the pairs that share a bin."""
        shared = float(self._positives_B @ (self._rows_B - self._positives_B))
        return shared / 2 / self._num_pairs if self._num_pairs else 0.0

    @property
    def _num_pairs(self) -> int:
        num_positives = int(self._positives_B.sum())
        return num_positives * (int(self._rows_B.sum()) - num_positives)

    def _count_users(self, logit_C: npt.NDArray, label_C: npt.NDArray, user_C: Ints) -> None:
        weighted_sum, num_rows = gauc_sums(logit_C, label_C, user_C)
        self._gauc_sum += weighted_sum
        self._gauc_rows += num_rows


class RegressionTotals:
    """Sums of one regression task."""

    def __init__(self) -> None:
        self._error_sum, self._num_rows = 0.0, 0

    def add(self, output_C: npt.NDArray, label_C: npt.NDArray) -> None:
        self._error_sum += float(((output_C.astype(np.float64) - label_C) ** 2).sum())
        self._num_rows += len(output_C)

    def merge(self, other: "RegressionTotals") -> None:
        self._error_sum += other._error_sum
        self._num_rows += other._num_rows

    def metrics(self) -> dict[str, float]:
        return {"mse": self._error_sum / self._num_rows if self._num_rows else math.nan}


class StreamingMetrics:
    """Totals of every task; `metrics` has the form of `steps.task_metrics`."""

    def __init__(self, tasks: Sequence[TaskSettings]) -> None:
        self._totals = {task.name: BinaryTotals() if task.kind == "binary" else RegressionTotals() for task in tasks}

    def add(self, output_CT: npt.NDArray, labels: dict[str, npt.NDArray], user_C: Ints) -> None:
        for t, (name, totals) in enumerate(self._totals.items()):
            if isinstance(totals, BinaryTotals):
                totals.add(output_CT[:, t], labels[name], user_C)
            else:
                totals.add(output_CT[:, t], labels[name])

    def close(self) -> None:
        for totals in self._totals.values():
            if isinstance(totals, BinaryTotals):
                totals.close()

    def merge(self, other: "StreamingMetrics") -> None:
        for name, totals in self._totals.items():
            totals.merge(other._totals[name])  # type: ignore[arg-type]

    def metrics(self) -> dict[str, dict[str, float]]:
        return {
            name: totals.metrics().as_dict() if isinstance(totals, BinaryTotals) else totals.metrics()
            for name, totals in self._totals.items()
        }
