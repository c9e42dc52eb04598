"""Which actors a batch run has, so that none outlives it.

Ray Data lets go of a failed run's actors only when nobody holds the error that it raised, and those that it starts anew meanwhile
keep their CPUs from the next run too.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _Roll:
    def __init__(self) -> None:
        self._actors: list[ActorHandle] = []
        self._is_closed = False

    def sign(self, actor: ActorHandle) -> bool:
        if not self._is_closed:
            self._actors.append(actor)
        return not self._is_closed

    def close(self) -> list[ActorHandle]:
        self._is_closed = True
        return self._actors


@contextmanager
def roll() -> Iterator[ActorHandle]:
    """Ends all actors that have signed it; those that would sign it later fail to start.

    It lies where the run's driver is, so that it is lost with it only; if it is, a run that is done otherwise does not fail of it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    make: Any = ray.remote(**options)(_Roll)
    opened, actors = make.remote(), list[ActorHandle]()
    try:
        yield opened
    finally:
        with suppress(RayError):
            actors = ray.get(opened.close.remote())
        for actor in actors:
            with suppress(RayError):  # it has died before
                ray.kill(actor)


def sign(opened: ActorHandle) -> None:
    """By an actor, before all else. An error if the run is over; none if the roll is lost, which says nothing of the run."""
    try:
        is_open: Any = ray.get(opened.sign.remote(ray.get_runtime_context().current_actor))
    except RayError:
        return
    if not is_open:
        raise RuntimeError("the run that this actor was started for is over")
