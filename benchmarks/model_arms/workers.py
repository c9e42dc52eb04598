"""Processes that compile side by side and measure in turn: what one has compiled it need not load or trace again."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")

_COMPILE_THREADS = 4
"""Of each process; there are about seven."""


def exit_at_sigterm() -> None:
    """SIGTERM ends this process as an exception does, once: `timeout` sends it twice."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)


class Workers:
    """A process a key. Each does what it is told in order; `end` kills those that still do something."""

    def __init__(self) -> None:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(_COMPILE_THREADS)
        self._pools: dict[Hashable, ProcessPoolExecutor] = {}
        self._preparing: list[Future[Any]] = []

    def prepare(self, key: Hashable, function: Callable[..., Any], *args: Any) -> None:
        """Begins something that nobody waits for but `ready`; what fails there is made up for when the key is asked."""
        self._preparing.append(self._pool(key).submit(function, *args))

    def ready(self, within_s: float) -> None:
        """Waits for all that is being prepared."""
        started = time.perf_counter()
        done, running = wait(self._preparing, within_s)
        for error in filter(None, (one.exception() for one in done)):
            print(f"not compiled ahead: {error!r}", file=sys.stderr)
        spent_s = time.perf_counter() - started
        print(f"compiled ahead in {spent_s:.0f} s; {len(running)} are not ready", file=sys.stderr, flush=True)

    def ask(self, key: Hashable, function: Callable[..., T], *args: Any) -> T:
        return self._pool(key).submit(function, *args).result()

    def end(self) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    def _pool(self, key: Hashable) -> ProcessPoolExecutor:
        if key not in self._pools:
            self._pools[key] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self._pools[key]
