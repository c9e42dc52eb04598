"""Training that starts from another run's weights (`jobs.train --from`), on a real local Ray."""

from typing import Any

import pytest
import safetensors.torch
import torch

from longer.storage import Table
from longer.training import checkpoints
from longer.training.checkpoints import load_model
from longer.training.content import Job
from longer.training.loop import train_worker
from longer.training.run import fit
from tests.serving.tables import build_world, checkpoint_path, publish_requests

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def worker_that_reads_no_whole_checkpoint(config: dict[str, Any]) -> None:
    def whole(*_: Any, **__: Any) -> Any:
        raise AssertionError("a worker reads the whole checkpoint")

    checkpoints.load_model = safetensors.torch.load = safetensors.torch.load_file = whole
    train_worker(config)


def test_a_worker_that_starts_from_a_checkpoint_reads_its_own_rows_of_it_and_not_every_table(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of nearly nothing the last weights are the first ones: those of the checkpoint, all rows of all workers."""
    world = build_world(tmp_path)
    sequences = Table(world.path("tables", "sequences")).require("")
    versions = {"sequences": sequences.id, "requests": publish_requests(world, sequences).id}
    rates = {"learning_rate": 1e-12, "embedding_learning_rate": 1e-12}
    train = {"num_workers": 2, "table_sharding": "rows", "max_requests": 40, "tokens_per_step": 1 << 16, **rates}
    settings = world.model_copy(update={"train": world.train.model_copy(update=train)})
    monkeypatch.setattr("longer.training.run.train_worker", worker_that_reads_no_whole_checkpoint)
    last = fit(Job(settings, versions, checkpoint_path(world)), "run")
    start = load_model(checkpoint_path(world))[0].state_dict()
    for name, tensor in load_model(last)[0].state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-6, atol=1e-9)
