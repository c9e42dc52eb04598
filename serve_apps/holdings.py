"""What a replica holds, as its scorer's thread last told: the event loop reads only this, as a roll-out may rebuild the rest."""

import asyncio
from dataclasses import dataclass

import torch

from longer.serving.scorer import Scorer
from serve_apps.keeping import InWorker


@dataclass(frozen=True)
class Holdings:
    """Counters since the start, and what is there now; bytes by tier are of user states."""

    cache_counters: dict[str, int]
    online_counters: dict[str, int]
    num_states: int
    num_online_users: int
    tier_bytes: dict[str, int]
    tier_budget_bytes: dict[str, int]
    memory_bytes: dict[str, dict[str, int]]
    """Allocated on the device and in host memory. `states` are whole pools, whatever is in them: the budget, and on the device
    room for a batch beside it. `work` is what else torch has there: graphs, their buffers, and tensors in use."""

    @classmethod
    def of(cls, scorer: Scorer) -> "Holdings":
        """In the scorer's thread."""
        store, online = scorer.cache, scorer.online
        device_bytes, host_bytes = store.reserved_bytes
        model_bytes = sum(weights.nbytes for weights in scorer.model.parameters())
        on_device = {"model": model_bytes, "states": device_bytes}
        if store.pool.device.type == "cuda":
            on_device["work"] = max(0, torch.cuda.memory_allocated() - model_bytes - device_bytes)
        return cls(
            store.counters.as_dict(),
            online.counters.as_dict(),
            len(store),
            len(online),
            {"device": store.num_bytes, "host": store.host_bytes},
            {"device": store.budget_bytes, "host": store.host_budget_bytes},
            {
                "device": on_device,
                "host": {"states": host_bytes, "index": store.index_bytes, "events": online.num_bytes},
            },
        )

    @property
    def device_share(self) -> float:
        """Of the budget on the device, what is held."""
        budget_bytes = self.tier_budget_bytes["device"]
        return self.tier_bytes["device"] / budget_bytes if budget_bytes else 0.0


class Ledger:
    """The last `Holdings`, asked for anew by whoever looks; while the scorer's thread has long work, those before it."""

    def __init__(self, scorer: Scorer, in_worker: InWorker) -> None:
        self._scorer, self._in_worker = scorer, in_worker
        self.last = Holdings.of(scorer)
        self._looking: asyncio.Future[Holdings] | None = None

    async def look(self, within_s: float) -> Holdings:
        """After all that the caller has seen done, unless the scorer's thread needs longer than so many seconds."""
        looking = self._looking = self._looking or asyncio.ensure_future(self._see())
        done, _ = await asyncio.wait({looking}, timeout=within_s)
        return looking.result() if done else self.last

    async def _see(self) -> Holdings:
        try:
            self.last = await self._in_worker(Holdings.of, self._scorer)
        finally:
            self._looking = None  # whoever waited for it may have given up
        return self.last
