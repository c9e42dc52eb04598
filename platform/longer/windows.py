"""Where a user's history window and query window start: the arithmetic that makes states appendable.

A user's events are numbered 0, 1, 2, ... over all time; event n belongs to group n // K for ever. With g groups seen so far,
the partial one included, the history window starts at group s * floor(max(0, g - W) / s) and the query window at
s * floor(max(0, g - k) / s): both move together, once in s groups, and between moves a window only grows at its end.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WindowRule:
    """Sizes in groups, but for `merge_size` in events. Every function takes ints, NumPy arrays or tensors alike.

    `history_groups` (W) and `query_groups` (k) are multiples of `stride_groups` (s); the settings check it.
    """

    merge_size: int
    history_groups: int
    query_groups: int
    stride_groups: int

    @property
    def stride_events(self) -> int:
        return self.stride_groups * self.merge_size

    @property
    def max_history_events(self) -> int:
        """Room for the events of any history window: W + s groups, one more than the longest holds."""
        return (self.history_groups + self.stride_groups) * self.merge_size

    def num_groups(self, num_events: Any) -> Any:
        """Groups after `num_events` events, the partial newest one included."""
        return (num_events + self.merge_size - 1) // self.merge_size

    def history_start(self, num_events: Any) -> Any:
        """Absolute index of the first group of the history window of a user with `num_events` events."""
        return self._start(self.num_groups(num_events), self.history_groups)

    def query_start(self, num_events: Any) -> Any:
        """Absolute index of the first group of the query window of a user with `num_events` events."""
        return self._start(self.num_groups(num_events), self.query_groups)

    def _start(self, num_groups: Any, window: int) -> Any:
        beyond = num_groups - window
        return beyond * (beyond > 0) // self.stride_groups * self.stride_groups
