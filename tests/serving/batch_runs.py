"""What tests of offline runs share: how to ask, to write without Ray, and what the model says of each user."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longer.arrays import Candidates, Histories
from longer.batch_settings import BatchSettings
from longer.config import Settings
from longer.data.items import ItemTable, items_version
from longer.data.parquet import read_columns
from longer.data.records import Record
from longer.data.tables import SequenceTable
from longer.hashing import stable_keys
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model.sweep import Sweep
from longer.serving.batch import spooled_buckets
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan
from longer.serving.batch_scorer import BucketScorer
from longer.serving.questions import Questions
from longer.storage import Table, Version
from longer.training.checkpoints import load_model
from tests.serving.tables import build_world, checkpoint_path, publish_requests
from tests.serving.test_offline import forward


def world_with_requests(root: Path, **other: object) -> Settings:
    """A small world with requests to score."""
    settings = build_world(root, **other)
    publish_requests(settings, Table(settings.path("tables", "sequences")).require("jobs.build_sequences"))
    return settings


def asking(world: Settings, **chosen: object) -> Settings:
    return world.model_copy(update={"batch_score": BatchSettings(**chosen)})


def ids_file(folder: Path, **column: list | pa.Array) -> str:
    path = folder / f"{next(iter(column))}.parquet"
    pq.write_table(pa.table(column), path)
    return str(path)


def rows_of(version: Version) -> pa.Table:
    return pa.concat_tables([read_columns(file) for file in version.files()]).sort_by("user_id")


def written_here(plan: Plan, folder: Path) -> pa.Table:
    """The rows of all buckets, written in this process, without Ray."""
    run = Run(str(folder))
    buckets = spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    files = [record["file"]["path"] for bucket in buckets for record in scorer.write_bucket(bucket)]
    return pa.concat_tables([read_columns(f"{folder}/{file}") for file in files]).sort_by("user_id")


def score_here(plan: Plan, _pool: object, _where: object, run: Run, buckets: dict[int, int], _job: str) -> list[Record]:
    """In the place of Ray's actors."""
    scorer = BucketScorer(plan, run)
    return [record for bucket in buckets for record in scorer.write_bucket(bucket)]


def questions_of(world: Settings, users: list[int], request_ts: int) -> Questions:
    histories = SequenceTable(world.path("tables", "sequences"), world.event_schema).get(users)
    ends = [
        int(first + (histories.event_ts_E[begin:end] < request_ts).sum())
        for first, begin, end in zip(
            histories.first_index_B, histories.offsets_B1[:-1], histories.offsets_B1[1:], strict=True
        )
    ]
    return Questions(histories, np.arange(len(users)), np.array(ends), np.full(len(users), request_ts))


def vector_of(model: Ranker, histories: Histories, row: int, history_end: int) -> np.ndarray:
    """[1, D]: one user's vector of a sweep of its own."""
    assert isinstance(model, Longer)
    end = np.array([history_end])
    start = model.windows.history_start(end) * model.windows.merge_size
    sweep = Sweep(model, histories.slice_events(np.array([row]), start, end))
    sweep.advance(end)
    return sweep.ask(np.zeros(1, np.int64), end, np.zeros(1, np.int64)).user_vectors_RD.numpy()


def expected_scores(world: Settings, users: list[int], items: list[str], request_ts: int) -> np.ndarray:
    """[users, items] of the training forward pass, item features from the catalogue."""
    model, _ = load_model(checkpoint_path(world))
    keys, schema = stable_keys(pa.array(items * len(users))), world.event_schema
    sequences = Table(world.path("tables", "sequences")).require("jobs.build_sequences").id
    features = ItemTable(world.path("tables", "items"), schema, items_version(sequences, schema)).lookup(keys)
    candidates = Candidates(np.arange(len(users) + 1) * len(items), {"item_id": keys, **features})
    outputs = forward(model, questions_of(world, users, request_ts), candidates)[:, 0]
    return torch.from_numpy(outputs).sigmoid().numpy().reshape(len(users), len(items))
