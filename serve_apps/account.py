"""What a replica says of itself, and what all of them together say of the service. No Ray, no torch.

The recent past is each replica's last `KEPT_REQUESTS` score requests that are not older than a minute.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW_S = 60.0
KEPT_REQUESTS = 1_000


class Recent:
    """Milliseconds and state sources of the score requests answered last."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, str]] = deque(maxlen=KEPT_REQUESTS)

    def add(self, latency_ms: float, source: str) -> None:
        self._seen.append((time.monotonic(), latency_ms, source))

    def account(self) -> dict[str, Any]:
        """`latencies_ms`, oldest first, the number of requests by `sources`, and the seconds that they span."""
        now = time.monotonic()
        seen = [one for one in self._seen if now - one[0] <= WINDOW_S]
        is_cut = len(seen) == KEPT_REQUESTS
        return {
            "latencies_ms": [round(ms, 3) for _, ms, _ in seen],
            "sources": dict(Counter(source for _, _, source in seen)),
            "span_s": now - seen[0][0] if is_cut else WINDOW_S,
        }


def service_status(accounts: Sequence[dict[str, Any]], num_silent: int) -> dict[str, Any]:
    """The replicas' accounts, and their sums; `num_silent` replicas did not answer in time."""
    recent = [account["recent"] for account in accounts]
    sources = sum((Counter(one["sources"]) for one in recent), Counter[str]())
    latencies_ms = np.concatenate([one["latencies_ms"] for one in recent])
    p50_ms, p99_ms = np.percentile(latencies_ms, [50, 99]).tolist() if len(latencies_ms) else (None, None)
    num_requests = sources.total()
    cache = sum((Counter(account["cache"]) for account in accounts), Counter[str]())
    lost = sum((Counter(account["lost_affinity"]) for account in accounts), Counter[str]())
    return {
        "recent": {
            "requests": num_requests,
            "requests_per_s": sum(len(one["latencies_ms"]) / max(one["span_s"], 1e-3) for one in recent),
            "shares": {source: count / num_requests for source, count in sorted(sources.items())},
            "p50_ms": p50_ms,
            "p99_ms": p99_ms,
        },
        "model_versions": sorted({account["model_version"] for account in accounts}),
        "cache": {name: cache[name] for name in accounts[0]["cache"]},
        "lost_affinity": {name: lost[name] for name in accounts[0]["lost_affinity"]},
        "replicas": [in_short(account) for account in accounts],
        "silent_replicas": num_silent,
    }


def in_short(account: dict[str, Any]) -> dict[str, Any]:
    """A replica's account without each request's latency."""
    return {**account, "recent": {"sources": account["recent"]["sources"]}}
