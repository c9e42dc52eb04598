"""How many replicas there should be: by requests, and by states that have to go although they are still warm.

    requests   as Serve's own policy: ongoing requests over `target_ongoing_requests`; those that came straight to a replica, of
               which Serve knows nothing, among them.
    states     A full cache evicts what was not asked for longest. How long that is follows from what it holds and what it evicts:
               age = states / evictions a second. Below `warm_s` one more replica is wanted, and none goes while with one fewer
               the age would be below twice that. Evictions of older states, and a cache that is merely full, are as it should be.
    memory     None goes while a GPU's memory is about as full as `gpu_memory_share`: what it holds would have to fit elsewhere. It
               asks for no more: what a replica has allocated, another one does not take from it.

States ask for one more at a time: each change moves the states of 1/N of the users. Serve applies bounds and delays.

The controller runs this, pickled by value: nothing of this repository can be imported here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

_FULL = 0.9
"""Share of its budget that a cache holds when evictions are for lack of room, and not because one state is too large; or what
leaves no room for another state of mean size, if that is less."""

_KEEP_TIMES = 2.0
"""Times `warm_s` that the age must still be with one replica fewer."""

_MEMORY_SLACK = 0.05


@dataclass(frozen=True)
class ReplicaLoad:
    """A replica's means over the look-back period, as `ScoringService.record_autoscaling_stats` tells them."""

    num_states: float
    cache_share: float
    evictions_per_s: float
    gpu_memory_share: float
    direct_requests: float


@dataclass(frozen=True)
class Rule:
    """From when on states are worth another replica, and memory."""

    warm_s: float
    gpu_memory_share: float


def wanted_replicas(
    num_replicas: int, num_requests: float, target_requests: float, loads: Sequence[ReplicaLoad], rule: Rule
) -> float:
    """Replicas wanted for so many ongoing requests, of which each replica should have `target_requests`, and these loads."""
    by_requests = num_requests / target_requests
    return max(by_requests, _for_states(num_replicas, loads, rule), _for_memory(num_replicas, loads, rule))


def eviction_age_s(loads: Sequence[ReplicaLoad]) -> float:
    """About how long ago the states that full caches evict were last asked for; infinite if they evict none."""
    full = [load for load in loads if load.cache_share >= min(_FULL, load.num_states / (load.num_states + 1))]
    evictions_per_s = sum(load.evictions_per_s for load in full)
    return sum(load.num_states for load in full) / evictions_per_s if evictions_per_s > 0 else math.inf


def _for_states(num_replicas: int, loads: Sequence[ReplicaLoad], rule: Rule) -> int:
    age_s = eviction_age_s(loads)
    if age_s < rule.warm_s:
        return num_replicas + 1
    return num_replicas if age_s * (num_replicas - 1) / num_replicas < _KEEP_TIMES * rule.warm_s else 0


def _for_memory(num_replicas: int, loads: Sequence[ReplicaLoad], rule: Rule) -> int:
    fullest = max((load.gpu_memory_share for load in loads), default=0.0)
    return num_replicas if fullest > rule.gpu_memory_share - _MEMORY_SLACK else 0


class ReplicaPolicy:
    """The deployment's autoscaling policy, as Serve calls it."""

    def __init__(self, warm_s: float, gpu_memory_share: float) -> None:
        self._rule = Rule(warm_s, gpu_memory_share)

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict]:
        told = context.aggregated_metrics or {}
        names = ReplicaLoad.__dataclass_fields__
        replicas = set.intersection(*(set(told.get(name, {})) for name in names))
        loads = [ReplicaLoad(**{name: told[name][replica] for name in names}) for replica in replicas]
        assert context.config
        num_replicas, target = context.current_num_replicas, context.config.get_target_ongoing_requests()
        if num_replicas == 0:
            return context.target_num_replicas, {}
        num_requests = context.total_num_requests + sum(load.direct_requests for load in loads)
        return wanted_replicas(num_replicas, num_requests, target, loads, self._rule), {}
