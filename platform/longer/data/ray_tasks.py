"""One Ray task an argument: what the table jobs run on, a task a block of the log or a bucket of users."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from longer.progress import track


def each(function: Callable[[Any], Any], arguments: Sequence[Any], stage: str, unit: str) -> list[Any]:
    """The results in the order of the arguments. A task whose worker or node dies runs again, on another node if need be."""
    task: Any = ray.remote(lambda argument: function(argument)).options(
        scheduling_strategy="SPREAD"
    )  # methods are refused
    pending = {task.remote(argument): place for place, argument in enumerate(arguments)}
    results: list[Any] = [None] * len(arguments)

    def finished() -> Iterator[Any]:
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            results[pending.pop(done)] = ray.get(done)
            yield done

    for _ in track(finished(), len(arguments), stage, unit):
        pass
    return results
