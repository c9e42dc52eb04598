"""What the workers of a node share in a run, kept by a process of its own there. Few imports: such processes do nothing else."""

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1)
class Keeper:
    """Of one node."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] | None = None

    def told(self, make: Callable[[], tuple[Any, Any]]) -> Any:
        """Of what it keeps and what it tells of it, the latter; whoever asks first has both made."""
        self._kept = self._kept or make()
        return self._kept[1]


@ray.remote(num_cpus=0)
class Keepers:
    """The keepers of a run. It owns them, so that they end when it does; and it does when the driver ends, however that ends."""

    def __init__(self) -> None:
        self._of_nodes: dict[str, Any] = {}

    def on(self, node: str) -> Any:
        if node not in self._of_nodes:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            self._of_nodes[node] = Keeper.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        return self._of_nodes[node]
