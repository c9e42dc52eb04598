"""One Ray task an argument: what the table jobs run on, a task a block of the log or a bucket of users."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray
from ray.data import DataContext

from longer.progress import track

_MOST_IN_FLIGHT = 256  # waiting costs time for each


def task_options() -> dict[str, Any]:
    """Ray's options of a task on tables: it asks for what Ray Data's do, on the nodes that `runner.start_ray` chose for them."""
    return {"num_cpus": 1, "label_selector": DataContext.get_current().execution_options.label_selector}


def as_they_finish(tasks: Iterable[ray.ObjectRef]) -> Iterator[ray.ObjectRef]:
    """Each of these as its task is done."""
    left = list(tasks)
    while left:
        (done,), left = ray.wait(left, num_returns=1)
        yield done


def each(function: Callable[[Any], Any], arguments: Iterable[Any], total: int, stage: str, unit: str) -> list[Any]:
    """The results in the order of the arguments. A task whose worker or node dies runs again, on another node if need be.

    Arguments are made as tasks are submitted, so a long list of large ones need never exist.
    """
    task: Any = ray.remote(lambda argument: function(argument)).options(  # no bound methods
        scheduling_strategy="SPREAD", **task_options()
    )
    waiting = iter(enumerate(arguments))
    pending: dict[Any, int] = {}
    results: list[Any] = [None] * total

    def finished() -> Iterator[int]:
        while True:
            for place, argument in islice(waiting, _MOST_IN_FLIGHT - len(pending)):
                pending[task.remote(argument)] = place
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            place = pending.pop(done)
            results[place] = ray.get(done)
            yield place

    for _ in track(finished(), total, stage, unit):
        pass
    return results
