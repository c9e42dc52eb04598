"""What the jobs and the service ask Ray for, and whether some kind of node has it."""

from dataclasses import dataclass

from ray.train import ScalingConfig

from longer.config import Settings
from serve_apps.scoring import ScoringArgs

Resources = dict[str, float]


@dataclass(frozen=True)
class Request:
    """Resources and labels that one task, actor or worker asks for."""

    resources: Resources
    labels: dict[str, str]


@dataclass(frozen=True)
class NodeType:
    """Resources and labels that a node of a kind has; `most` is how many there may be."""

    resources: Resources
    labels: dict[str, str]
    most: int

    def holds(self, request: Request) -> int:
        """How many such requests all nodes of this kind hold."""
        if any(self.labels.get(name) != value for name, value in request.labels.items()):
            return 0
        wanted = {name: amount for name, amount in request.resources.items() if amount}
        return self.most * int(min(self.resources.get(name, 0) // amount for name, amount in wanted.items()))


def requests_of(settings: Settings) -> dict[str, tuple[Request, int]]:
    """By kind of work: what one asks for, and how many run at a time at least."""
    asked, place = settings.train, settings.ray.place
    scaling = ScalingConfig(num_workers=asked.num_workers, use_gpu=asked.use_gpu)
    num_gpus = settings.batch_score.num_gpus_per_scorer
    return {
        "a bucket of a table": (Request({"CPU": 1}, place(0)), 1),
        "a training worker": (Request(scaling._resources_per_worker_not_none, place(asked.use_gpu)), asked.num_workers),
        "a scorer": (Request({"CPU": 1, "GPU": num_gpus}, place(num_gpus)), settings.batch_score.concurrency[0]),
    }


def request_of_replicas(args: ScoringArgs) -> tuple[Request, int]:
    """The same for the scoring service."""
    place = Settings.model_validate({"ray": {"pool_label": args.pool_label}}).ray.place
    return Request({"CPU": args.num_cpus, "GPU": args.num_gpus}, place(args.num_gpus)), args.max_replicas
