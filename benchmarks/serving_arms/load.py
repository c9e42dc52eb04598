"""Load on an HTTP service from processes of their own, in a closed loop (clients that wait) or an open one (constant arrival).

In the open loop a request's time counts from when it was due, so that a service that falls behind is seen to.
"""

import asyncio
import math
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle

import aiohttp
import numpy as np

from longer.ring import Ring

_SOURCE = re.compile(rb'"source": ?"(\w+)"')
BODY_MS_HEADER = "x-body-ms"
_TIMEOUT_S = 30
_MOST_OPEN = 2_000

Body = tuple[str, bytes]
"""A session, and the JSON sent for it."""


@dataclass(frozen=True)
class Place:
    """A service at `url`, whose replicas, if `urls` tells them, are sent the sessions that are theirs, as `longer.client` does."""

    url: str
    urls: dict[str, str] = field(default_factory=dict)

    def of(self) -> Callable[[str], str]:
        """Where each session is sent."""
        ring = Ring(self.urls) if self.urls else None
        return lambda session: self.urls[ring.owner(session)] if ring else self.url


@dataclass
class Sample:
    """Milliseconds of the requests answered with 200, and of reading their bodies where the server says so; the states they came
    from, and how often there was another status."""

    latencies_ms: list[float] = field(default_factory=list)
    body_ms: list[float] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @classmethod
    def together(cls, parts: "Sequence[Sample]") -> "Sample":
        """Of windows that came one after the other."""
        whole = cls(seconds=sum(part.seconds for part in parts))
        for part in parts:
            whole.add(part)
        return whole

    def add(self, part: "Sample") -> None:
        """All but the time that it took."""
        self.latencies_ms += part.latencies_ms
        self.body_ms += part.body_ms
        self.sources += part.sources
        self.failed += part.failed

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_ms, percent)) if self.latencies_ms else math.nan

    @property
    def rps(self) -> float:
        return len(self.latencies_ms) / self.seconds

    @property
    def warm_share(self) -> float:
        """Requests whose state was there, or was only appended to."""
        return (self.sources["hit"] + self.sources["append"]) / max(self.sources.total(), 1)


class Load:
    """`num_processes` that send; each has its part of the clients, of the rate and of the bodies."""

    def __init__(self, num_processes: int) -> None:
        self._num = num_processes
        self._pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"))
        for _ in range(num_processes):  # which start now, while servers do, and not in the first window
            self._pool.submit(int)

    def once(self, place: Place, bodies: Sequence[Body], num_clients: int = 8) -> Sample:
        """Each body once."""
        return self._run(place, bodies, num_clients, math.inf, None, again=False)

    def closed(
        self, place: Place, bodies: Sequence[Body], num_clients: int, seconds: float, again: bool = True
    ) -> Sample:
        """Clients that send the next body when they have an answer; the bodies once only if not `again`."""
        return self._run(place, bodies, num_clients, seconds, None, again)

    def open(self, place: Place, bodies: Sequence[Body], rate: float, seconds: float) -> Sample:
        """`rate` requests a second, whatever becomes of them."""
        return self._run(place, bodies, 0, seconds, rate, again=True)

    def _run(
        self, place: Place, bodies: Sequence[Body], num_clients: int, seconds: float, rate: float | None, again: bool
    ) -> Sample:
        num = min(self._num, num_clients or self._num, len(bodies))
        shares = [num_clients // num + (i < num_clients % num) for i in range(num)]
        calls = [
            self._pool.submit(_send, place, list(bodies[i::num]), shares[i], seconds, rate and rate / num, again)
            for i in range(num)
        ]
        whole = Sample()
        for call in calls:
            part = call.result()
            whole.add(part)
            whole.seconds = max(whole.seconds, part.seconds)
        return whole


def _send(
    place: Place, bodies: list[Body], num_clients: int, seconds: float, rate: float | None, again: bool
) -> Sample:
    return asyncio.run(_sending(place, bodies, num_clients, seconds, rate, again))


async def _sending(
    place: Place, bodies: list[Body], num_clients: int, seconds: float, rate: float | None, again: bool
) -> Sample:
    sample, where, queue = Sample(), place.of(), iter(cycle(bodies) if again else bodies)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:

        async def ask(body: Body, due_s: float) -> None:
            headers = {"x-session-id": body[0], "content-type": "application/json"}
            try:
                async with http.post(f"{where(body[0])}/v1/score", data=body[1], headers=headers) as answer:
                    content = await answer.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                sample.failed[type(error).__name__] += 1
                return
            if answer.status != 200:
                sample.failed[str(answer.status)] += 1
                return
            sample.latencies_ms.append((time.perf_counter() - due_s) * 1000)
            if BODY_MS_HEADER in answer.headers:
                sample.body_ms.append(float(answer.headers[BODY_MS_HEADER]))
            if found := _SOURCE.search(content):
                sample.sources[found[1].decode()] += 1

        started_s = time.perf_counter()
        ends_s = started_s + seconds
        if rate is None:

            async def client() -> None:
                for body in queue:
                    if time.perf_counter() >= ends_s:
                        return
                    await ask(body, time.perf_counter())

            await asyncio.gather(*(client() for _ in range(num_clients)))
        else:
            await _arrive(ask, queue, rate, started_s, ends_s, sample)
        sample.seconds = time.perf_counter() - started_s
    return sample


async def _arrive(
    ask: Callable[[Body, float], Awaitable[None]],
    queue: Iterator[Body],
    rate: float,
    started_s: float,
    ends_s: float,
    sample: Sample,
) -> None:
    asked: set[asyncio.Future[None]] = set()
    due_s = started_s
    while due_s < ends_s:
        if (early_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        if len(asked) < _MOST_OPEN:
            task = asyncio.ensure_future(ask(next(queue), due_s))
            asked.add(task)
            task.add_done_callback(asked.discard)
        else:
            sample.failed["not sent, too many open"] += 1
        due_s += 1 / rate
    await asyncio.gather(*asked)
