"""How long the stages of a batch took, for whoever wants to know. No torch, no Ray.

On a GPU a stage ends when its kernels are launched, not when they have run: the wait for them is part of the stage that needs their
values, which is the last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def collected_ms() -> Iterator[dict[str, float]]:
    """Milliseconds by stage of what runs in the block, filled in as stages end; stages that do not occur are not there."""
    stages: dict[str, float] = {}
    token = _collected.set(stages)
    try:
        yield stages
    finally:
        _collected.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the block's time to the stage, if anybody collects."""
    stages, started = _collected.get(), time.perf_counter()
    try:
        yield
    finally:
        if stages is not None:
            stages[name] = stages.get(name, 0.0) + (time.perf_counter() - started) * 1000
