"""The replica's Prometheus metrics, as `ray_longer_...`; counters that others keep are exported as increments.

Latency of a scored batch by stage: `queue` (one request's wait for its batch), `history` (the table is read), `encode` and `append`
(states are made), `score` (all else: candidates looked up, the model, scores). What a caller waits for in the replica, by route, is
`longer_score_latency_ms`.
"""

from collections import Counter as Counts
from collections.abc import Sequence

import torch
from ray.serve.metrics import Counter, Gauge, Histogram

from longer.serving.scorer import Scorer
from serve_apps.batcher import Times
from serve_apps.keeping import StateKeeper

_LATENCY_EDGES_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
_BATCH_EDGES = [1, 2, 4, 8, 16, 32, 64, 128]


class ReplicaMetrics:
    """What one replica did and holds: `record` after every request, `record_batch` after every batch, `export` now and then."""

    def __init__(self, scorer: Scorer, lost_affinity: Counts[str], keeper: StateKeeper) -> None:
        self._scorer, self._lost_affinity, self._keeper = scorer, lost_affinity, keeper
        self._exported: Counts[tuple[str, str]] = Counts()
        self.num_queued = 0
        """Requests that wait for their batch."""
        self.gpu_memory_share = 0.0
        """Of the device's memory, what is in use, by whomever; looked at now and then."""
        self._requests = Counter("longer_score_requests", "Requests by route and HTTP status.", ("route", "status"))
        self._counters = {
            "state": Counter("longer_user_states", "Requests by what the cache held, and states dropped.", ("event",)),
            "online": Counter("longer_online_events", "Events received, known already, dropped, expired.", ("event",)),
            "kept": Counter(
                "longer_kept_states",
                "States dumped, restored and encoded beforehand; dumps left alone as of another model, or torn.",
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
        self._memory = Gauge("longer_memory_bytes", "Bytes allocated, by where and for what.", ("where", "what"))
        self._event_bytes = Gauge("longer_online_event_bytes", "Bytes of online events held.")
        self._gpu_memory = Gauge("longer_gpu_memory_share", "Share of the GPU's memory in use; 0 without a GPU.")
        self._model = Gauge("longer_served_model", "1 for the model version that answers.", ("model_version",))

    def record(self, route: str, latency_ms: float, status: int) -> None:
        self._latency.observe(latency_ms, tags={"route": route})
        self._requests.inc(tags={"route": route, "status": str(status)})

    def record_batch(self, times: Sequence[Times]) -> None:
        """Of one batch, an element a request."""
        self._batch.observe(len(times))
        for one in times:
            self._stages.observe(one.queue_ms, tags={"stage": "queue"})
        for stage, ms in times[0].batch_ms.items():
            self._stages.observe(ms, tags={"stage": stage})

    def export(self) -> None:
        """Brings gauges and increments up to date. Ray drops a gauge's series that is not set again, as that of the last model."""
        cache, online = self._scorer.cache, self._scorer.online
        self._queued.set(self.num_queued)
        self._num_states.set(len(cache))
        for tier, (num_bytes, budget_bytes) in tiers(self._scorer).items():
            self._bytes.set(num_bytes, tags={"tier": tier})
            self._budget.set(budget_bytes, tags={"tier": tier})
        for where, by_use in memory(self._scorer).items():
            for what, num_bytes in by_use.items():
                self._memory.set(num_bytes, tags={"where": where, "what": what})
        self._event_bytes.set(online.num_bytes)
        self._gpu_memory.set(self.gpu_memory_share)
        self._model.set(1, tags={"model_version": self._scorer.info.model_version})
        for name, counts in (
            ("state", cache.counters.as_dict()),
            ("online", online.counters.as_dict()),
            ("kept", self._keeper.counters),
            ("lost", self._lost_affinity),
        ):
            for event, count in counts.items():
                if (grown := count - self._exported[name, event]) > 0:
                    self._counters[name].inc(grown, tags={"event": event})
                    self._exported[name, event] = count


def tiers(scorer: Scorer) -> dict[str, tuple[int, int]]:
    """Bytes held of user states and the most that may be, by where they are."""
    store = scorer.cache
    return {
        "device": (store.num_bytes, store.budget_bytes),
        "host": (store.host_bytes, store.host_budget_bytes),
    }


def memory(scorer: Scorer) -> dict[str, dict[str, int]]:
    """Bytes allocated on the device and in host memory. `states` are whole pools, whatever is in them: the budget, and on the
    device room for a batch beside it. `work` is what else torch has there: graphs, their buffers, and tensors in use."""
    store = scorer.cache
    device_bytes, host_bytes = store.reserved_bytes
    model_bytes = sum(weights.nbytes for weights in scorer.model.parameters())
    on_device = {"model": model_bytes, "states": device_bytes}
    if store.pool.device.type == "cuda":
        on_device["work"] = max(0, torch.cuda.memory_allocated() - model_bytes - device_bytes)
    return {
        "device": on_device,
        "host": {"states": host_bytes, "index": store.index_bytes, "events": scorer.online.num_bytes},
    }


def _milliseconds(name: str, description: str, tag: str) -> Histogram:
    return Histogram(name, description, boundaries=_LATENCY_EDGES_MS, tag_keys=(tag,))
