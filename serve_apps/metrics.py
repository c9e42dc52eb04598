"""The replica's Prometheus metrics; counters that others keep are exported as increments."""

from collections import Counter as Counts

from ray.serve.metrics import Counter, Gauge, Histogram

from longer.serving.online import OnlineEvents
from longer.serving.store import StateStore

_LATENCY_EDGES_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


class ReplicaMetrics:
    """What one replica did; `record` after every request."""

    def __init__(self, cache: StateStore, online: OnlineEvents, lost_affinity: Counts[str]) -> None:
        self._cache, self._online, self._lost_affinity = cache, online, lost_affinity
        self._exported: Counts[tuple[str, str]] = Counts()
        self._counters = {
            "state": Counter("longer_user_states", "Requests by what the cache held, and states dropped.", ("event",)),
            "online": Counter("longer_online_events", "Events received, known already, dropped, expired.", ("event",)),
            "lost": Counter(
                "longer_lost_affinity", "Requests that came without a session, or for another's.", ("event",)
            ),
        }
        self._requests = Counter("longer_score_requests", "Requests by route and HTTP status.", ("route", "status"))
        self._bytes = Gauge("longer_user_state_bytes", "Bytes of user states held.")
        self._event_bytes = Gauge("longer_online_event_bytes", "Bytes of online events held.")
        self._latency = Histogram(
            "longer_score_latency_ms",
            "Milliseconds in the replica, by route.",
            boundaries=_LATENCY_EDGES_MS,
            tag_keys=("route",),
        )

    def record(self, route: str, latency_ms: float, status: int) -> None:
        self._latency.observe(latency_ms, tags={"route": route})
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._bytes.set(self._cache.num_bytes)
        self._event_bytes.set(self._online.num_bytes)
        sources = {
            "state": self._cache.counters.as_dict(),
            "online": self._online.counters.as_dict(),
            "lost": self._lost_affinity,
        }
        for name, counts in sources.items():
            for event, count in counts.items():
                if (grown := count - self._exported[name, event]) > 0:
                    self._counters[name].inc(grown, tags={"event": event})
                    self._exported[name, event] = count
