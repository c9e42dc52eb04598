"""Progress lines from Ray workers to the driver."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from longer.progress import say

_SECONDS_BETWEEN_LOOKS = 0.5


@ray.remote(num_cpus=0)
class Lines:
    """Lines on their way from workers to the driver. Ray's own forwarding would bring every worker's chatter along."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, stage: str, message: str) -> None:
        self._lines.append((stage, message))

    def take(self) -> list[tuple[str, str]]:
        taken, self._lines = self._lines, []
        return taken


@contextmanager
def relayed_lines() -> Iterator[Any]:
    """A handle of `Lines` for workers to `add.remote(stage, message)` to; what they add is said here, until the block ends."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # no other node's end takes it along
    lines, ended = Lines.options(label_selector=here).remote(), threading.Event()  # type: ignore[attr-defined]

    def relay() -> None:
        while True:
            last = ended.wait(_SECONDS_BETWEEN_LOOKS)
            for stage, message in ray.get(lines.take.remote()):
                say(stage, message)
            if last:
                return

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
