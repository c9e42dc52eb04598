"""Which events a state was made from, in a few numbers that grow and slide with it. No torch.

Each event has a mark, which tells it, its absolute index and its gap from any other; a run of events has the sum of their marks
modulo 2^64. Sums can be continued at the end and, kept at each place where a window may start, cut at the front. Two runs that
differ anywhere agree with probability 2^-64.

B users, E events of all of them, S strides of a window.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longer.arrays import Histories
from longer.hashing import hash_int64

Sums = npt.NDArray[np.uint64]


def event_marks(events: Histories) -> Sums:
    """[E]: a number for each event of each user's history."""
    length_B = np.diff(events.offsets_B1)
    begin_B = events.offsets_B1[:-1]
    previous_E = np.roll(events.event_ts_E, 1)
    previous_E[begin_B[length_B > 0]] = events.prev_event_ts_B[length_B > 0]
    marks_E = hash_int64(previous_E) ^ hash_int64(hash_int64(events.event_ts_E).view(np.int64))
    for values in events.features.values():
        bits_E = values if values.dtype == np.int64 else values.view(np.int32).astype(np.int64)
        marks_E = hash_int64(marks_E.view(np.int64)) ^ hash_int64(bits_E)
    index_E = np.arange(len(marks_E)) + np.repeat(events.first_index_B - begin_B, length_B)
    return hash_int64((marks_E ^ hash_int64(index_E)).view(np.int64))


@dataclass(frozen=True)
class EventPrint:
    """The events `first_index` to `end_index` of a user: `sums_S[i]` is that of the marks before `first_index + i * stride`.

    `total` is that of all marks; sums count from where the run once began, and only their differences mean anything.
    """

    first_index: int
    end_index: int
    sums_S: Sums
    total: np.uint64

    @staticmethod
    def from_start(first_index: int) -> "EventPrint":
        """Of no event, before the first one, which is on a stride."""
        return EventPrint(first_index, first_index, np.zeros(1, np.uint64), np.uint64(0))

    def followed_by(self, marks_E: Sums, stride: int) -> "EventPrint":
        """With the user's next events, which start where these end, by their marks."""
        running = np.cumsum(marks_E, dtype=np.uint64) + self.total
        end_index = self.end_index + len(running)
        new_S = np.arange(len(self.sums_S), (end_index - self.first_index) // stride + 1)
        sums_S = running[self.first_index + new_S * stride - self.end_index - 1]
        total = running[-1] if len(running) else self.total
        return EventPrint(self.first_index, end_index, np.concatenate([self.sums_S, sums_S]), total)

    def from_index(self, first_index: int, stride: int) -> "EventPrint":
        """Of the same events from `first_index` on, which lies a number of strides after where these start."""
        num_dropped = (first_index - self.first_index) // stride
        return EventPrint(first_index, self.end_index, self.sums_S[num_dropped:].copy(), self.total)

    @property
    def value(self) -> int:
        """One number for the run: equal for the same events, however they came together."""
        return (int(self.total) - int(self.sums_S[0])) % 2**64

    def agrees_with(self, events: Histories) -> bool:
        """Whether these are the events of one user's history that spans the same indices."""
        return int(event_marks(events).sum(dtype=np.uint64)) == self.value
