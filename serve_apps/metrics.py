"""The replica's Prometheus metrics, as `ray_longer_...`; counters that others keep are exported as increments.

Latency of a scored batch by stage: `queue` (one request's wait for its batch), `history` (one request's wait for the table, of
those that it was read for), `encode` and `append` (states are made), `score` (all else: candidates looked up, the model, scores).
What a caller waits for in the replica, by route, is `longer_score_latency_ms`.

A call to Ray's metrics costs 5 to 20 microseconds: requests are counted here, and told with the rest; times are told by the
scorer's thread, not by the event loop, but where so many are refused between two batches that telling them at once would stop it.
"""

from collections import Counter as Counts
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ray.serve.metrics import Counter, Gauge, Histogram

from serve_apps.batcher import Times
from serve_apps.holdings import Holdings

_LATENCY_EDGES_MS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
_MOST_UNTOLD = 100
"""Latencies that may wait for the next batch or export."""
_BATCH_EDGES = [1.0, 2, 4, 8, 16, 32, 64, 128]


@dataclass(frozen=True)
class Replica:
    """What is told of a replica now and then; `gpu_memory_share` of the device's memory is in use, by whomever, and `num_queued`
    requests wait for their batch."""

    held: Holdings
    model_version: str
    is_rollout_refused: bool
    kept_states: Mapping[str, int]
    lost_affinity: Mapping[str, int]
    num_queued: int
    gpu_memory_share: float


class ReplicaMetrics:
    """What one replica did and holds: `record` after every request, `record_batch` after every batch, `export` now and then."""

    def __init__(self) -> None:
        self._exported: Counts[tuple[str, ...]] = Counts()
        self._answered: Counts[tuple[str, str]] = Counts()
        self._latencies = deque[tuple[str, float]]()
        by = ("route", "status")
        self._requests = Counter("longer_score_requests", "Requests by route and HTTP status.", by)  # type: ignore[arg-type]
        self._counters = {
            "state": Counter(
                "longer_user_states", "Requests scored, by what the cache held, and states dropped.", ("event",)
            ),
            "online": Counter(
                "longer_online_events", "Events received, known already, dropped, expired, restored.", ("event",)
            ),
            "kept": Counter(
                "longer_kept_states",
                "States dumped, restored and encoded beforehand; users whose events were dumped; dumps left alone as of "
                "another model, or torn.",
                ("event",),
            ),
            "lost": Counter(
                "longer_lost_affinity", "Requests that came without a session, or for another's.", ("event",)
            ),
        }
        self._latency = _milliseconds("longer_score_latency_ms", "Milliseconds in the replica, by route.", "route")
        self._stages = _milliseconds("longer_stage_latency_ms", "Milliseconds of a scored batch, by stage.", "stage")
        self._batch = Histogram("longer_batch_requests", "Requests scored together.", boundaries=_BATCH_EDGES)
        self._queued = Gauge("longer_queued_requests", "Requests that wait for their batch.")
        self._num_states = Gauge("longer_held_user_states", "User states held.")
        self._bytes = Gauge("longer_user_state_bytes", "Bytes of user states held, by tier.", ("tier",))
        self._budget = Gauge("longer_user_state_budget_bytes", "Most bytes of user states, by tier.", ("tier",))
        by = ("where", "what")
        self._memory = Gauge("longer_memory_bytes", "Bytes allocated, by where and for what.", by)  # type: ignore[arg-type]
        self._event_bytes = Gauge("longer_online_event_bytes", "Bytes of online events held.")
        self._gpu_memory = Gauge("longer_gpu_memory_share", "Share of the GPU's memory in use; 0 without a GPU.")
        self._model = Gauge("longer_served_model", "1 for the model version that answers.", ("model_version",))
        self._refused = Gauge("longer_refused_rollout", "1 while the checkpoint asked for last cannot serve.")

    def record(self, route: str, latency_ms: float, status: int) -> None:
        self._latencies.append((route, latency_ms))
        self._answered[route, str(status)] += 1
        if len(self._latencies) > _MOST_UNTOLD:
            self._observe_latencies(1)

    def record_batch(self, times: Sequence[Times]) -> None:
        """Of one batch, an element a request, and the latencies of the requests answered before it."""
        self._batch.observe(len(times))
        for one in times:
            self._stages.observe(one.queue_ms, tags={"stage": "queue"})
            if one.aside_ms:
                self._stages.observe(one.aside_ms, tags={"stage": "history"})
        for stage, ms in times[0].batch_ms.items():
            self._stages.observe(ms, tags={"stage": stage})
        self._observe_latencies(len(self._latencies))

    def _observe_latencies(self, most: int) -> None:
        with suppress(IndexError):  # another thread may take the last one
            for _ in range(most):
                route, latency_ms = self._latencies.popleft()
                self._latency.observe(latency_ms, tags={"route": route})

    def export(self, now: "Replica") -> None:
        """Brings gauges and increments up to date. Ray drops a gauge's series that is not set again, as that of the last model."""
        held = now.held
        self._queued.set(now.num_queued)
        self._num_states.set(held.num_states)
        for tier, num_bytes in held.tier_bytes.items():
            self._bytes.set(num_bytes, tags={"tier": tier})
            self._budget.set(held.tier_budget_bytes[tier], tags={"tier": tier})
        for where, by_use in held.memory_bytes.items():
            for what, num_bytes in by_use.items():
                self._memory.set(num_bytes, tags={"where": where, "what": what})
        self._event_bytes.set(held.memory_bytes["host"]["events"])
        self._gpu_memory.set(now.gpu_memory_share)
        self._model.set(1, tags={"model_version": now.model_version})
        self._refused.set(float(now.is_rollout_refused))
        for name, counts in (
            ("state", held.cache_counters),
            ("online", held.online_counters),
            ("kept", now.kept_states),
            ("lost", now.lost_affinity),
        ):
            for event, count in counts.items():
                self._increase(self._counters[name], (name, event), count, {"event": event})
        for (route, status), count in list(self._answered.items()):
            self._increase(self._requests, (route, status), count, {"route": route, "status": status})
        self._observe_latencies(len(self._latencies))

    def _increase(self, counter: Counter, key: tuple[str, ...], count: int, tags: dict[str, str]) -> None:
        if (grown := count - self._exported[key]) > 0:
            counter.inc(grown, tags=tags)
            self._exported[key] = count


def _milliseconds(name: str, description: str, tag: str) -> Histogram:
    return Histogram(name, description, boundaries=_LATENCY_EDGES_MS, tag_keys=(tag,))
