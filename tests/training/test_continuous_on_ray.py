"""Continuous training on a real local Ray: every new day tested, then trained, once, though a worker is killed on the way."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import ray.train.collective

from jobs import evaluate, train
from longer.arrays import MS_PER_DAY
from longer.config import Settings
from longer.data.events import iso_ms
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.storage import Table, Version
from longer.training.checkpoints import load_model, save_weights, weights_of
from longer.training.content import tally
from longer.training.cursor import Position
from longer.training.lineage import finished, past_of
from longer.training.loader import read_part_since, score_split
from longer.training.loop import Run, train_worker
from longer.training.metrics import defined
from longer.training.steps import task_metrics
from tests.data.test_build_on_ray import run_all, settings_of
from tests.training.commits import wait_for_commit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def publish_base(settings: Settings, **manifest: Any) -> Version:
    """A served checkpoint of fresh weights that says it was trained until the validation split starts."""
    schema, tasks = settings.event_schema, settings.train.tasks
    requests = RequestTable(settings.path("tables", "requests"), schema).version
    table = Table(settings.path("checkpoints"))
    model = Longer(settings.model, schema, tasks)
    version = save_weights(table.begin("base"), weights_of(model), settings.model, schema, tasks)
    until = requests.manifest["valid_from"]
    about = {"trained": [{"requests": "earlier", "until": until}], "trained_until": until}
    return table.publish("base", {"schema_hash": schema.hash(), "model_version": version, **about, **manifest})


def worker_killed_in_the_second_day(config: dict[str, Any]) -> None:
    """The worker function, but once, rank 1 dies before the last step of the second day; `starts` gets where each starts."""
    root, rank = Path(config["job"].settings.root), ray.train.get_context().get_world_rank()
    first = not (root / "starts").exists()
    ray.train.collective.barrier()
    take_step, train_all = Run._step, Run.train

    def step(run: Run, work: Any) -> Any:
        if first and rank == 1 and work.position == Position(1, run.cursor.steps_of(1) - 1):
            wait_for_commit(root, run.cursor.steps_of(0))
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(run, work)

    def train_from_here(run: Run) -> None:
        if rank == 0:
            with (root / "starts").open("a") as starts:
                starts.write(json.dumps([run.num_workers, run.state.position.epoch, run.state.position.step]) + "\n")
        train_all(run)

    Run._step, Run.train = step, train_from_here  # type: ignore[method-assign]
    train_worker(config)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Version, Version]:
    """Settings, the checkpoint that was served, and what continuous training made of it."""
    built = settings_of(tmp_path_factory.mktemp("continued"), requests={"validation_days_share": 0.1})
    run_all(built)
    model = {**built.model.model_dump(), "item_rows": 211, "user_rows": 31, "event_width": 8, "num_heads": 2}
    asked = {"tokens_per_step": 160, "num_workers": (1, 2), "max_failures": 1}
    settings = Settings(**{**built.model_dump(), "model": model, "train": asked})
    base = publish_base(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longer.training.run.train_worker", worker_killed_in_the_second_day)
        return settings, base, train.run(settings, continue_=True)


def test_every_new_day_is_trained_once_in_order_though_a_worker_was_killed(
    continued: tuple[Settings, Version, Version],
) -> None:
    settings, base, version = continued
    starts = [json.loads(line) for line in (Path(settings.root) / "starts").read_text().splitlines()]
    assert starts == [[2, 0, 0], [2, 1, 0]]
    requests = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    new = [requests.read(split, bucket) for split in ("valid", "test") for bucket in range(requests.num_buckets)]
    ids, times = (np.concatenate([getattr(part, name) for part in new]) for name in ("request_id_R", "request_ts_R"))
    earlier, now = version.manifest["trained"]
    assert earlier == base.manifest["trained"][0]
    assert (now["requests"], now["from"]) == (requests.version.id, base.manifest["trained_until"])
    for day, number in zip(now["days"], np.unique(times // MS_PER_DAY), strict=True):
        assert day["day"] == str(np.datetime64(int(number), "D"))
        assert {key: day[key] for key in ("num_requests", "id_sum")} == tally(ids[times // MS_PER_DAY == number])
    assert version.manifest["trained_until"] == now["until"]
    assert iso_ms(now["until"]) == times.max() + timedelta(milliseconds=1) / timedelta(milliseconds=1)
    assert version.manifest["continues"] == base.id
    assert version.manifest["model_version"] != base.manifest["model_version"]


def test_a_day_is_tested_before_it_is_trained(continued: tuple[Settings, Version, Version]) -> None:
    settings, base, version = continued
    schema, tasks = settings.event_schema, settings.train.tasks
    since_ms = iso_ms(base.manifest["trained_until"])
    sequences = SequenceTable(settings.path("tables", "sequences"), schema)
    requests = RequestTable(settings.path("tables", "requests"), schema)
    part = read_part_since(sequences, requests, since_ms, range(requests.num_buckets))
    (data,) = part.splits(settings.model.windows)
    first_day = data.take(np.flatnonzero(data.requests.request_ts_R < since_ms + MS_PER_DAY))
    model = load_model(base.path)[0]
    outputs = score_split(first_day, lambda batch: model(to_tensors(batch)).detach().numpy(), len(tasks))
    expected = defined(task_metrics(outputs, first_day.requests.labels, first_day.row_C, tasks))["label"]
    tested = version.manifest["trained"][-1]["days"][0]["tested"]["label"]
    assert tested == pytest.approx(expected, abs=1e-3)
    assert tested["logloss"] == pytest.approx(expected["logloss"], abs=1e-6)


def test_without_new_days_it_says_so_and_changes_nothing(
    continued: tuple[Settings, Version, Version], capsys: pytest.CaptureFixture
) -> None:
    settings, _, version = continued
    before = {path: path.stat().st_mtime_ns for path in Path(settings.root).rglob("*") if path.is_file()}
    assert train.run(settings, continue_=True).id == version.id
    assert "has seen all, nothing changed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_first_runs_command_does_not_roll_a_continued_model_back(
    continued: tuple[Settings, Version, Version], capsys: pytest.CaptureFixture
) -> None:
    settings, base, version = continued
    table = Table(settings.path("checkpoints"))
    found = finished(table, base.id)
    assert found
    assert found.id == base.id
    assert f"{version.id}, which comes from it, is served" in capsys.readouterr().err
    served = table.current()
    assert served
    assert served.id == version.id


def test_weights_of_a_continued_model_keep_until_when_they_were_trained(
    continued: tuple[Settings, Version, Version],
) -> None:
    _, base, version = continued
    past = past_of(version.path, None, base.manifest["trained_until"])
    assert past.until == version.manifest["trained_until"] > base.manifest["trained_until"]
    assert past.trained == version.manifest["trained"]
    assert past.is_leaking


def test_a_test_split_that_was_trained_is_not_evaluated(continued: tuple[Settings, Version, Version]) -> None:
    with pytest.raises(UserError, match=r"has trained requests until .*, the test split starts at"):
        evaluate.run(continued[0])


def test_it_cannot_start_from_elsewhere(continued: tuple[Settings, Version, Version]) -> None:
    with pytest.raises(UserError, match="drop one of them"):
        train.run(continued[0], from_="elsewhere", continue_=True)
