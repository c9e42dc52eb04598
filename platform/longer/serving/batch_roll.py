"""Which actors a batch run has, so that none outlives it.

Ray Data lets go of a failed run's actors only when nobody holds the error that it raised, and those that it starts anew meanwhile
keep their CPUs from the next run too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle


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
    """Ends all actors that have signed it; those that would sign it later fail to start."""
    make: Any = ray.remote(num_cpus=0)(_Roll)
    opened = make.remote()
    try:
        yield opened
    finally:
        for actor in ray.get(opened.close.remote()):
            ray.kill(actor)


def sign(opened: ActorHandle) -> None:
    """By an actor, before all else. An error if the run is over."""
    if not ray.get(opened.sign.remote(ray.get_runtime_context().current_actor)):
        raise RuntimeError("the run that this actor was started for is over")
