"""Growth of states as CUDA graphs: encoding and appending cost one copy to the device and one replay.

A graph serves every growth of up to U users that fits into its `Room`, whose sizes are rounded up to a few; what fills it up is
users without events, whose tails nobody reads.
"""

from typing import Any

import numpy as np
from torch import Tensor

from longer.arrays import power_of_two
from longer.model.captured_call import Graphs
from longer.model.grow import carry_out
from longer.model.growth import Growth, Room
from longer.model.inputs import under
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import StagedContext
from longer.model.state_layout import StateLayout
from longer.model.states import computing

_EVENTS_A_USER, _EVENTS_OF_ONE = 32, 64
"""Room that there is at least, and what one user may have of it: most appends need no other graph than that of so many users."""

_STEP = 4
"""From one room for events to the next."""

_USERS_A_MOVER = 8
"""One of so many moves in most batches at most: with 8 new events a user and a stride of 400, one in 50 does."""


class CapturedGrowth:
    """`grow.grow` on CUDA without a launch a kernel; the same numbers as far as equal shapes give them."""

    def __init__(self, model: Longer, pool: StatePool, memory: Any) -> None:
        self._model, self._pool = model, pool
        self.graphs = Graphs[tuple[int, Room]](pool.device, memory)

    def grow(self, growth: Growth) -> None:
        """Writes everything that the states after `growth.events` hold into their places; the device is not waited for."""
        numbers = growth.numbers()
        events = {f"event.{name}": values for name, values in growth.event_arrays().items()}
        num_users = power_of_two(len(growth.events))
        size = num_users, room_for(growth, num_users)
        names = list(numbers)
        numbers_AU = np.zeros((len(names), num_users), np.int64)
        numbers_AU[[name.startswith("tail") for name in names]] = self._pool.trash_row  # of users who have nothing
        graph = self.graphs.of(
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
    num_moving = _room_for_movers(int((growth.has_moved_B | growth.is_elsewhere_B).sum()), num_users)
    most_events, (*larger, little) = _most_events(layout), rooms_for_events(layout, num_users)
    if growth.num_events <= little and growth.most_newest <= _EVENTS_OF_ONE:
        events, newest = little, _EVENTS_OF_ONE
    else:
        enough = [room for room in larger if room >= growth.num_events]
        events = enough[-1] if enough else power_of_two(growth.num_events)  # some leave the window at once
        newest = min(events, most_events)
    groups = events // layout.windows.merge_size
    return Room(
        events=events,
        groups=groups,
        computed=min(groups, num_users * layout.most_query_groups) + num_moving * layout.most_query_groups,
        copied_rows=num_moving * (layout.most_groups + (layout.num_layers - 1) * layout.most_query_groups),
        copied_vectors=num_moving * layout.most_query_groups,
        kept=most_events if growth.most_kept else 0,
        newest=newest,
        moves=num_moving > 0,
    )


def rooms_for_events(layout: StateLayout, num_users: int) -> list[int]:
    """Whole windows of all users, a quarter of that, and so on; last, a little of each: every size is one more graph to capture."""
    little = num_users * _EVENTS_A_USER
    rooms = [num_users * _most_events(layout)]
    while rooms[-1] // _STEP >= little:
        rooms.append(rooms[-1] // _STEP)
    return [*rooms, little]


def _most_events(layout: StateLayout) -> int:
    """Of one window, and a partial group."""
    return int(layout.event_words(np.array(layout.most_groups)))


def _room_for_movers(num_moving: int, num_users: int) -> int:
    """How many users' windows or slots change: none, the few who do in a batch of users anywhere in their strides, or all."""
    few = -(-num_users // _USERS_A_MOVER)
    return 0 if not num_moving else few if num_moving <= few else num_users
