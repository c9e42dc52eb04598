"""Progress from Ray workers to the driver."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from longer.progress import Bar, say

_SECONDS_BETWEEN_LOOKS = 0.5


@ray.remote(num_cpus=0)
class Lines:
    """Lines on their way from workers to the driver. Ray's own forwarding would bring every worker's chatter along."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []
        self._shown: list[tuple[str, int, int, str]] = []

    def add(self, stage: str, message: str) -> None:
        self._lines.append((stage, message))

    def show(self, stage: str, done: int, total: int, note: str) -> None:
        """How many steps are done, and a note; of several between two looks the last one is of use."""
        self._shown = [(stage, done, total, note)]

    def take(self) -> tuple[list[tuple[str, str]], list[tuple[str, int, int, str]]]:
        taken, self._lines, self._shown = (self._lines, self._shown), [], []
        return taken


@contextmanager
def relayed_lines() -> Iterator[Any]:
    """A handle of `Lines` for workers to `add.remote` and `show.remote` to; it is said and shown here, until the block ends."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # no other node's end takes it along
    lines, ended, bar = Lines.options(label_selector=here).remote(), threading.Event(), Bar("step")  # type: ignore[attr-defined]

    def relay() -> None:
        while True:
            last = ended.wait(_SECONDS_BETWEEN_LOOKS)
            said, shown = ray.get(lines.take.remote())
            for progress in shown:
                bar.show(*progress)
            for stage, message in said:
                say(stage, message)
            if last:
                bar.close()
                return

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
