"""A node that comes in the midst of training is made use of, and the result is as exact."""

import re
from pathlib import Path

import numpy as np
import pytest

from longer.config import Settings
from longer.data.tables import RequestTable
from longer.storage import Table
from longer.training.content import tally
from tests.cluster.nodes import running_head
from tests.cluster.test_node_loss import finish, start
from tests.data.test_build_on_ray import run_all, settings_of
from tests.training.commits import wait_for_commit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.slow]
EVERY, NUM_EPOCHS = 8, 6


def test_training_with_room_for_more_workers_takes_them_and_trains_every_request_once(tmp_path: Path) -> None:
    """Slow: a cluster comes up, and a second node while a lone worker trains, for half a minute without it."""
    built = settings_of(tmp_path, requests={"validation_days_share": 0.1})
    run_all(built)
    elastic = {"num_workers": (1, 2), "tokens_per_step": 320, "epochs": NUM_EPOCHS, "validate_every_steps": EVERY}
    small = {**built.model.model_dump(), "item_rows": 211, "user_rows": 31, "event_width": 8, "num_heads": 2}
    settings = Settings(**{**built.model_dump(), "model": small, "train": elastic})
    with running_head("--num-cpus=0") as head:
        head.add_node("--num-cpus=1")
        quick = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        job = start(head, "tests.cluster.training_that_can_grow", settings, tmp_path, **quick)
        wait_for_commit(Path(settings.root), EVERY, within_s=150)
        head.add_node("--num-cpus=1")
        starts = re.findall(r"(\d+) steps, starting at step (\d+) with (\d) workers", finish(job))
    (num_steps, first, first_workers), (_, second, second_workers) = starts
    assert (first, first_workers, second_workers) == ("0", "1", "2")
    assert 0 < int(second) < int(num_steps), "it did not grow in its midst"
    (trained,) = Table(settings.path("checkpoints")).require("jobs.train").manifest["trained"]
    table = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    ids = np.concatenate([table.read("train", bucket).request_id_R for bucket in range(table.num_buckets)])
    assert trained["epochs"] == [tally(ids)] * NUM_EPOCHS
