"""Records of the study by arm, and their means over seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.quality_study.arms import FEATURES

Record = dict[str, Any]
Value = Callable[[Record], float]
MOST_EXPONENT = 3.0


def auc(record: Record) -> float:
    return record["test"]["auc"]


def long_auc(record: Record) -> float:
    """Of requests with long histories only."""
    return record["test"]["long_auc"]


def gauc(record: Record) -> float:
    return record["test"]["gauc"]


def mega_flops(record: Record) -> float:
    return record["forward_flops"]["flops"] / 1e6


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["arm"]].append(record)
    return groups


def mean(records: Sequence[Record], value: Value) -> float:
    return statistics.fmean(map(value, records))


def spread(records: Sequence[Record], value: Value) -> float:
    """Half of the range between seeds."""
    values = [value(record) for record in records]
    return (max(values) - min(values)) / 2


def with_spread(records: Sequence[Record], value: Value) -> str:
    if not records:
        return ""
    around = f" ± {spread(records, value):.4f}" if len(records) > 1 else ""
    return f"{mean(records, value):.4f}{around}"


def curve(mine: Sequence[Record], features: bool, encoder: str = "longer") -> dict[int, list[Record]]:
    """Of an encoder as it is, by length ascending; the whole length is the headline arm."""
    found: dict[int, list[Record]] = defaultdict(list)
    for record in mine:
        headline = record["arm"] in (encoder, encoder + FEATURES)
        of_lengths = record["group"] == "lengths" and record["encoder"] == encoder
        if record["features"] == features and (headline or of_lengths):
            found[record["length"]].append(record)
    return dict(sorted(found.items()))


def frontier(arms: dict[str, list[Record]], value: Value) -> list[str]:
    """Arms that none is better than at no more FLOPs, the cheapest first."""
    found = list[str]()
    for name in sorted(arms, key=lambda name: (mega_flops(arms[name][0]), -mean(arms[name], value))):
        if not found or mean(arms[name], value) > mean(arms[found[-1]], value):
            found.append(name)
    return found


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """alpha, beta, gamma of y = alpha * x^beta + gamma by least squares, and R^2; beta is at most `MOST_EXPONENT` either way."""
    x_N, y_N = np.log(np.asarray(x, float)), np.asarray(y, float)
    x_N -= x_N.mean()  # a scale that alpha takes up
    best = (math.inf, 0.0, 0.0, 0.0)
    for beta in np.concatenate([-np.geomspace(MOST_EXPONENT, 1e-3, 200), np.geomspace(1e-3, MOST_EXPONENT, 200)]):
        design = np.stack([np.exp(beta * x_N), np.ones_like(x_N)], axis=1)
        (alpha, gamma), *_ = np.linalg.lstsq(design, y_N, rcond=None)
        error = float(((design @ [alpha, gamma] - y_N) ** 2).sum())
        best = min(best, (error, float(alpha), float(beta), float(gamma)))
    error, alpha, beta, gamma = best
    alpha *= math.exp(-beta * float(np.log(np.asarray(x, float)).mean()))
    return alpha, beta, gamma, 1 - error / float(((y_N - y_N.mean()) ** 2).sum())
