"""Where the time of a step goes: phases measured by the host's clock, or on a GPU by its own, without waiting for it."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_MAX_PENDING = 4096
"""CUDA event pairs kept before they are read: enough for hundreds of steps."""


class PhaseTimer:
    """Seconds spent in named phases since the last `take`.

    A phase of the device is timed by CUDA events in the current stream, which are read at `take`, so that no step waits for the
    GPU; one of the host, and every phase without a GPU, by `perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Work of the device, as `forward` or `optimizer`."""
        if not self._on_gpu:
            with self.host_phase(name):
                yield
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._pending.append((name, began, ended))
        if len(self._pending) > _MAX_PENDING:
            self._read()

    @contextmanager
    def host_phase(self, name: str) -> Iterator[None]:
        """Time of the host, as that which it waits for data."""
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began

    def waits(self, items: Iterable[T], name: str) -> Iterator[T]:
        """The items; waiting for each is a phase of the host."""
        iterator = iter(items)
        while True:
            with self.host_phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for what the GPU still has to do."""
        self._read()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _read(self) -> None:
        if self._pending:
            self._pending[-1][2].synchronize()
        for name, began, ended in self._pending:
            self._seconds[name] += began.elapsed_time(ended) / 1000
        self._pending.clear()
