"""Jagged rows as padded ones of similar length: what plain torch needs where no kernel of ours computes.

N rows of any kind, T slots of the longest.
"""

from collections.abc import Iterator

import numpy as np

from longer.arrays import Int64

_SHORTEST_CLASS = 16
LANES = 8
"""Slots are multiples of this: some attention kernels fail on odd numbers of keys."""


def length_classes(length_N: Int64, max_slots: int) -> Iterator[Int64]:
    """Every row once, in parts whose longest is at most twice as long as their shortest (or very short), and which hold
    `max_slots` slots at most when padded, or one row."""
    by_length = np.argsort(length_N, kind="stable")
    class_N = np.ceil(np.log2(np.maximum(length_N[by_length], _SHORTEST_CLASS))).astype(np.int64)
    for rows in np.split(by_length, np.flatnonzero(np.diff(class_N)) + 1):
        if len(rows):
            size = max(1, max_slots // max(1, int(length_N[rows[-1]])))
            yield from (rows[begin : begin + size] for begin in range(0, len(rows), size))


def pad_ranges(begin_N: Int64, end_N: Int64, multiple: int = 1, plus: int = 0) -> tuple[Int64, np.ndarray]:
    """[N, T] numbers begin, begin + 1, ... of each row, and which of them exist; T + `plus` is a multiple of `multiple`."""
    longest = int((end_N - begin_N).max(initial=0))
    slots = -(-(longest + plus) // multiple) * multiple - plus
    number_NT = begin_N[:, None] + np.arange(slots)
    return number_NT, number_NT < end_N[:, None]
