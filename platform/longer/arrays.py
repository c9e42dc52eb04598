"""What passes between the rooms: histories and requests as flat NumPy arrays, jagged by offsets. No Ray, no torch.

B histories, E events in all of them, R requests, C candidates in all of them. Ids and categories are keys (`longer.hashing`),
times are int64 milliseconds since 1970 UTC, numeric features are float32. Nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

NO_EVENT_TS = np.int64(-(2**63))
"""Stands for 'no event before': the time before a user's event 0."""

MS_PER_HOUR = 3_600_000
MS_PER_DAY = 24 * MS_PER_HOUR


def offsets_of(lengths_N: npt.NDArray) -> Int64:
    """[N + 1]: where each of N stretches of these lengths begins, laid end to end, and where the last one ends."""
    return np.append(np.int64(0), np.cumsum(lengths_N, dtype=np.int64))


def ranges(starts_N: Int64, ends_N: Int64) -> tuple[Int64, Int64]:
    """`offsets_of` the N ranges [start, end), and all numbers in them, one range after the other."""
    lengths_N = ends_N - starts_N
    offsets_N1 = offsets_of(lengths_N)
    return offsets_N1, np.repeat(starts_N - offsets_N1[:-1], lengths_N) + np.arange(offsets_N1[-1])


def power_of_two(n: int) -> int:
    """The next one, from n on."""
    return 1 << (max(1, n) - 1).bit_length()


def changes(*keys: npt.NDArray) -> npt.NDArray[np.bool_]:
    """True where a row differs from the one before in any key, and for the first row."""
    changed = np.zeros(len(keys[0]), bool)
    changed[:1] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return changed


@dataclass(frozen=True)
class Histories:
    """Consecutive events of B users, oldest to newest; a user may have none.

    `features` holds, in this order of names, keys of "item_id", "action" and every categorical feature, and the float32 values
    of every numeric one; each is [E].
    """

    user_key_B: Int64
    offsets_B1: Int64
    first_index_B: Int64
    prev_event_ts_B: Int64
    event_ts_E: Int64
    features: dict[str, npt.NDArray]

    def __len__(self) -> int:
        return len(self.user_key_B)

    @property
    def end_index_B(self) -> Int64:
        """Absolute index after the last event of each history."""
        return self.first_index_B + np.diff(self.offsets_B1)

    def slice_events(self, rows_N: Int64, starts_N: Int64, ends_N: Int64) -> "Histories":
        """N histories: of row `rows_N[i]`, the events with absolute index in [starts_N[i], ends_N[i]), which the row must hold."""
        base_N = self.offsets_B1[rows_N] - self.first_index_B[rows_N]
        if (starts_N < self.first_index_B[rows_N]).any() or (base_N + ends_N > self.offsets_B1[rows_N + 1]).any():
            raise IndexError("events outside the rows: another user's would be read")
        offsets, events = ranges(base_N + starts_N, base_N + ends_N)
        before_N = base_N + starts_N - 1
        at_row_start = starts_N == self.first_index_B[rows_N]
        prev = np.where(
            at_row_start,
            self.prev_event_ts_B[rows_N],
            self.event_ts_E[np.maximum(before_N, 0)] if len(self.event_ts_E) else NO_EVENT_TS,
        )
        return Histories(
            user_key_B=self.user_key_B[rows_N],
            offsets_B1=offsets,
            first_index_B=starts_N,
            prev_event_ts_B=prev,
            event_ts_E=self.event_ts_E[events],
            features={name: values[events] for name, values in self.features.items()},
        )

    def of_row(self, row: int, start: int, end: int) -> "Histories":
        """The same of one row alone; the arrays are views of these."""
        first = int(self.first_index_B[row])
        row_begin, row_end = int(self.offsets_B1[row]), int(self.offsets_B1[row + 1])
        begin, stop = row_begin + start - first, row_begin + end - first
        if start < first or stop > row_end:
            raise IndexError("events outside the row: another user's would be read")
        prev = self.prev_event_ts_B[row : row + 1] if start == first else self.event_ts_E[begin - 1 : begin]
        return Histories(
            user_key_B=self.user_key_B[row : row + 1],
            offsets_B1=np.array([0, stop - begin], np.int64),
            first_index_B=np.array([start], np.int64),
            prev_event_ts_B=prev,
            event_ts_E=self.event_ts_E[begin:stop],
            features={name: values[begin:stop] for name, values in self.features.items()},
        )

    def copied(self) -> "Histories":
        """The same in memory of its own, so that nothing else is held on to."""
        return Histories(
            user_key_B=self.user_key_B.copy(),
            offsets_B1=self.offsets_B1.copy(),
            first_index_B=self.first_index_B.copy(),
            prev_event_ts_B=self.prev_event_ts_B.copy(),
            event_ts_E=self.event_ts_E.copy(),
            features={name: values.copy() for name, values in self.features.items()},
        )

    def split(self) -> "list[Histories]":
        """Each user alone, in memory of her own: she may be forgotten while others are not."""
        spans = zip(self.first_index_B.tolist(), self.end_index_B.tolist(), strict=True)
        return [self.of_row(row, first, end).copied() for row, (first, end) in enumerate(spans)]

    def followed_by(self, newer: "Histories") -> "Histories":
        """The same B users with `newer`'s events after their own; `newer` starts where each of these ends."""
        lengths_B, newer_lengths_B = np.diff(self.offsets_B1), np.diff(newer.offsets_B1)
        offsets = offsets_of(lengths_B + newer_lengths_B)
        own_E = np.arange(len(self.event_ts_E)) + np.repeat(offsets[:-1] - self.offsets_B1[:-1], lengths_B)
        newer_E = np.arange(len(newer.event_ts_E)) + np.repeat(
            offsets[:-1] + lengths_B - newer.offsets_B1[:-1], newer_lengths_B
        )

        def both(own: npt.NDArray, new: npt.NDArray) -> npt.NDArray:
            out = np.empty(int(offsets[-1]), own.dtype)
            out[own_E], out[newer_E] = own, new
            return out

        return Histories(
            user_key_B=self.user_key_B,
            offsets_B1=offsets,
            first_index_B=self.first_index_B,
            prev_event_ts_B=self.prev_event_ts_B,
            event_ts_E=both(self.event_ts_E, newer.event_ts_E),
            features={name: both(values, newer.features[name]) for name, values in self.features.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence["Histories"]) -> "Histories":
        """All users of all parts, in order."""
        lengths_B = np.concatenate([part.offsets_B1[1:] - part.offsets_B1[:-1] for part in parts])
        return Histories(
            user_key_B=np.concatenate([part.user_key_B for part in parts]),
            offsets_B1=offsets_of(lengths_B),
            first_index_B=np.concatenate([part.first_index_B for part in parts]),
            prev_event_ts_B=np.concatenate([part.prev_event_ts_B for part in parts]),
            event_ts_E=np.concatenate([part.event_ts_E for part in parts]),
            features={name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        )


@dataclass(frozen=True)
class Candidates:
    """C candidates of R requests, by offsets. `features` holds keys of "item_id" and of the categorical features of items and
    requests, and float32 values of their numeric ones; each is [C]: what is known of a request each of its candidates has."""

    offsets_R1: Int64
    features: dict[str, npt.NDArray]


@dataclass(frozen=True)
class RequestBatch:
    """R requests against B histories: request r reads the events of history `row_R[r]` before absolute index `history_end_R[r]`.

    Requests that share a history must agree on both window starts (`longer.windows`), and the history's `first_index_B` is that
    history window's first event; `longer.data.batches` packs them so. Rows of one history are consecutive in `row_R`.
    """

    histories: Histories
    row_R: Int64
    history_end_R: Int64
    request_ts_R: Int64
    candidates: Candidates
    request_id_R: Int64
    labels: dict[str, Float32] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return len(self.row_R)
