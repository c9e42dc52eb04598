"""Growth of states as CUDA graphs: encoding and appending cost one copy to the device and one replay.

A graph serves every growth of up to U users that fits into its `Room`, whose sizes are rounded up to a few; what fills it up is
users without events, whose tails nobody reads.
"""

from typing import Any

import numpy as np
from torch import Tensor

from longer.model.captured_call import Graphs, power_of_two, rounded
from longer.model.grow import carry_out
from longer.model.growth import Growth, Room
from longer.model.inputs import under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.states import computing

_MOST_COARSE = 4_096
_EVENTS_A_USER = 32
"""Room that there is at least: most appends are smaller, and then need no other graph than that of so many users."""


class CapturedGrowth:
    """`grow.grow` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool, memory: Any) -> None:
        self._model, self._pool, self._graphs = model, pool, Graphs(pool.device, memory)

    def grow(self, growth: Growth) -> None:
        """Writes everything that the states after `growth.events` hold into their places; the device is not waited for."""
        numbers = growth.numbers()
        events = {f"event.{name}": values for name, values in growth.event_arrays().items()}
        num_users = power_of_two(len(growth.events))
        size = num_users, room_for(growth, num_users)
        names = list(numbers)
        numbers_AU = np.zeros((len(names), num_users), np.int64)
        numbers_AU[[name.startswith("tail") for name in names]] = self._pool.trash_row  # of users who have nothing
        graph = self._graphs.of(
            size,
            lambda tensors: self._carry_out(names, tensors, size[1]),
            lambda: {"numbers": numbers_AU, **{name: np.zeros(size[1].events, x.dtype) for name, x in events.items()}},
        )
        numbers_AU[:, : len(growth.events)] = list(numbers.values())
        graph({"numbers": numbers_AU, **events})

    def _carry_out(self, names: list[str], tensors: dict[str, Tensor], room: Room) -> None:
        at = dict(zip(names, tensors["numbers"].view(len(names), -1).unbind(), strict=True))
        with computing(self._model, self._pool):
            carry_out(self._model, StagedContext(self._pool, at), at, under("event.", tensors), room)


def room_for(growth: Growth, num_users: int) -> Room:
    """Room for the growth of at most so many users, of one of a few sizes."""
    layout = growth.pool.layout
    is_moving = bool((growth.has_moved_B | growth.is_elsewhere_B).any())
    num_moving = num_users * is_moving  # all of them: how many do would be one more size
    events = max(_coarsely(growth.num_events), num_users * _EVENTS_A_USER)
    groups = events // layout.windows.merge_size
    most_events = int(layout.event_words(np.array(layout.most_groups)))
    return Room(
        events=events,
        groups=groups,
        computed=min(groups, num_users * layout.most_query_groups) + num_moving * layout.most_query_groups,
        copied_rows=num_moving * (layout.most_groups + (layout.num_layers - 1) * layout.most_query_groups),
        copied_vectors=num_moving * layout.most_query_groups,
        kept=most_events if growth.most_kept else 0,
        newest=_coarsely(growth.most_newest),
        moves=is_moving,
    )


def _coarsely(n: int) -> int:
    """Appends are small, and every size is one more graph to capture; whole windows would waste too much by powers of two."""
    return max(64, power_of_two(n)) if n <= _MOST_COARSE else rounded(n)
