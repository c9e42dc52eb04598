"""Growth of states as CUDA graphs: encoding and appending cost one copy to the device and one replay.

A graph serves every growth of up to U users that fits into its `Room`, whose sizes are rounded up to a few; what fills it up is
users without events, whose tails nobody reads.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longer.model.captured_call import Graphs, power_of_two, rounded
from longer.model.grow import carry_out
from longer.model.growth import Growth, Room
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.states import computing


class CapturedGrowth:
    """`grow.grow` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool, memory: Any) -> None:
        self._model, self._pool, self._graphs = model, pool, Graphs(pool.device, memory)

    def grow(self, growth: Growth) -> None:
        """Writes everything that the states after `growth.events` hold into their places; the device is not waited for."""
        num_users = power_of_two(len(growth.events))
        room = room_for(growth, num_users)
        arrays = growth.arrays()
        fillers = {name: self._filler(name) for name in arrays}
        graph = self._graphs.of(
            (num_users, room),
            lambda tensors: self._carry_out(tensors, room),
            lambda: {
                name: np.full(room.events if name.startswith("event.") else num_users, fillers[name], array.dtype)
                for name, array in arrays.items()
            },
        )
        graph(
            {
                name: array if name.startswith("event.") else _filled(array, num_users, fillers[name])
                for name, array in arrays.items()
            }
        )

    def _filler(self, name: str) -> int:
        """A user who has nothing, and whose tail goes where nobody reads."""
        return self._pool.trash_row if name.startswith("tail") else 0

    def _carry_out(self, tensors: dict[str, Tensor], room: Room) -> None:
        with computing(self._model, self._pool):
            carry_out(self._model, StagedContext(self._pool, tensors), tensors, room)


def room_for(growth: Growth, num_users: int) -> Room:
    """Room for the growth of at most so many users, of one of a few sizes."""
    exact, layout = growth.room(), growth.pool.layout
    num_moving = int((growth.has_moved_B | growth.is_elsewhere_B).sum())
    num_moving = power_of_two(num_moving) if num_moving else 0
    events = rounded(exact.events)
    groups = events // layout.windows.merge_size
    most_events = int(layout.event_words(np.array(layout.most_groups)))
    return Room(
        events=events,
        groups=groups,
        computed=min(groups, num_users * layout.most_query_groups) + num_moving * layout.most_query_groups,
        copied_rows=num_moving * (layout.most_groups + (layout.num_layers - 1) * layout.most_query_groups),
        copied_vectors=num_moving * layout.most_query_groups,
        kept=most_events if exact.kept else 0,
        newest=rounded(exact.newest),
        moves=num_moving > 0,
    )


def _filled(array: npt.NDArray, size: int, filler: int) -> npt.NDArray:
    return np.append(array, np.full(size - len(array), filler, array.dtype))
