"""What a replica tells of itself: to the other replicas, to Prometheus, and to Serve's autoscaling."""

import os
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from longer.serving.scorer import Scorer
from serve_apps.access_log import AccessLog
from serve_apps.account import Recent
from serve_apps.affinity import Affinity
from serve_apps.arguments import ScoringArgs
from serve_apps.holdings import Ledger
from serve_apps.keeping import StateKeeper
from serve_apps.metrics import Replica, ReplicaMetrics
from serve_apps.rollout import Rollouts

_LOOK_WITHIN_S, _GLANCE_WITHIN_S = 2.0, 0.1
"""How long who asks for the replica's account, or Serve's autoscaling, waits for a scorer that is busy."""


class Teller:
    """Of the event loop. `recent` is told of every answered call of one user, and of no call of several."""

    def __init__(
        self,
        args: ScoringArgs,
        replica: str,
        scorer: Scorer,
        ledger: Ledger,
        metrics: ReplicaMetrics,
        access_log: AccessLog | None,
        affinity: Affinity,
        keeper: StateKeeper,
        rollouts: Rollouts,
        num_queued: Callable[[], int],
        num_direct: Callable[[], int],
    ) -> None:
        self._args, self._replica, self._scorer, self._ledger = args, replica, scorer, ledger
        self._metrics, self._access_log, self._affinity = metrics, access_log, affinity
        self._keeper, self._rollouts = keeper, rollouts
        self._num_queued, self._num_direct = num_queued, num_direct
        self._evicted, self._gpu_memory_share = (time.monotonic(), 0), 0.0
        self.recent = Recent()

    def about_model(self) -> dict[str, Any]:
        """The model that answers, and what it reads."""
        info = self._scorer.info
        return {
            "model_version": info.model_version,
            "refused_rollout": self._rollouts.is_refused,
            "schema_hash": info.schema.hash(),
            "encoding": info.model.encoding,
            "tasks": [task.model_dump(include={"name", "kind"}) for task in info.tasks],
            "item_features": list(info.schema.features_of("item")),
            "request_features": list(info.schema.features_of("request")),
            "event_fields": [field.name for field in info.schema.event_fields()],
            "history_events": info.model.history_events,
            "sequences_version": self._scorer.history.version_id,
        }

    async def account(self) -> dict[str, Any]:
        """What this replica holds, and what it has done since it started and lately."""
        held = await self._ledger.look(_LOOK_WITHIN_S)
        states = {
            "states": held.num_states,
            "bytes": held.tier_bytes["device"],
            "budget_bytes": held.tier_budget_bytes["device"],
        }
        events = {
            "users": held.num_online_users,
            "bytes": held.memory_bytes["host"]["events"],
            "budget_bytes": self._args.events_bytes,
        }
        return {
            "replica": self._replica,
            "process_id": os.getpid(),
            "model_version": self._scorer.info.model_version,
            "sequences_version": self._scorer.history.version_id,
            "refused_rollout": self._rollouts.is_refused,
            "cache": {**held.cache_counters, **states},
            "kept_states": self._keeper.counters,
            "online_events": {**held.online_counters, **events},
            "lost_affinity": dict(self._affinity.lost),
            "queued_requests": self._num_queued(),
            "recent": self.recent.account(),
            "memory_bytes": held.memory_bytes,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    async def load(self) -> dict[str, float]:
        """A `longer.autoscaling.ReplicaLoad` since the last call."""
        num_direct = self._num_direct()  # before the wait, which ends just when a batch has been answered
        held, now_s = await self._ledger.look(_GLANCE_WITHIN_S), time.monotonic()
        num_evicted = held.cache_counters["evict"]
        (since_s, before), self._evicted = self._evicted, (now_s, num_evicted)
        self._gpu_memory_share = self._gpu_memory()
        self.tell()
        return {
            "num_states": held.num_states,
            "cache_share": held.device_share,
            "evictions_per_s": (num_evicted - before) / max(now_s - since_s, 1e-3),
            "gpu_memory_share": self._gpu_memory_share,
            "direct_requests": num_direct,
        }

    def _gpu_memory(self) -> float:
        """Share in use, by whomever, but for what torch keeps here for its next tensors."""
        if not self._args.num_gpus:
            return 0.0
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        idle_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return 1 - (free_bytes + idle_bytes) / total_bytes

    def tell(self) -> None:
        """Brings metrics and the access log up to date."""
        self._metrics.export(
            Replica(
                self._ledger.last,
                self._scorer.info.model_version,
                self._rollouts.is_refused,
                self._keeper.counters,
                self._affinity.lost,
                self._num_queued(),
                self._gpu_memory_share,
            )
        )
        if self._access_log:
            self._access_log.flush()
