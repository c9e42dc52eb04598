"""Tables by the platform's own jobs, models of random weights, and the requests that are sent."""

import argparse
import json
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.serving_arms.load import Body
from jobs import build_sequences, generate_events
from longer.config import Settings, load_settings
from longer.data.tables import SequenceTable
from longer.model.longer import Longer
from longer.model_settings import ModelSettings
from longer.storage import Table, fingerprint
from longer.training.checkpoints import save_weights, weights_of

NUM_DAYS = 60


@dataclass(frozen=True)
class World:
    """Where all is, and what to ask: `hits` once for each user at one time, `trace` as of the log's last events, in their order."""

    settings: Settings
    checkpoint: str
    checkpoint_without_sequence: str
    hits: list[Body]
    trace: list[Body]


def build_world(settings: Settings, asked: argparse.Namespace) -> World:
    generate_events.run(settings)
    build_sequences.run(settings)
    model = settings.model
    # The same embeddings, globals, candidate layer and head; of the history one group in one layer: nothing grows with L.
    without = {"history_events": model.merge_size, "query_groups": 1, "stride_groups": 1, "num_self_layers": 0}
    without |= {"inner_transformer": False, "interactions": False}
    small = ModelSettings(**{**model.model_dump(), **without})
    checkpoint = _publish(settings, model, "checkpoints", asked.seed)
    other = _publish(settings, small, "checkpoints_without_sequence", asked.seed)
    hits, trace = _bodies(settings, asked)
    return World(settings, checkpoint, other, hits, trace)


def settings_of(asked: argparse.Namespace) -> Settings:
    events_per_user = (
        asked.history_events + 10 * asked.trace_per_user
    )  # the mean user's window is full before the trace
    sizes = {name: getattr(asked, name) for name in ("history_events", "merge_size", "query_groups", "event_width")}
    model = {**sizes, "stride_groups": asked.query_groups // 2, "num_self_layers": asked.self_layers}
    return load_settings(
        overrides={
            "root": f"{asked.data}/{fingerprint(model, asked.users, asked.trace_per_user, asked.items, asked.seed)}",
            "seed": asked.seed,
            "event_schema": {"features": [{"name": "category", "kind": "categorical", "of": "item"}]},
            "generate": {
                "num_users": asked.users,
                "num_events": asked.users * events_per_user,
                "num_items": asked.items,
                "num_days": NUM_DAYS,
                "user_zipf_exponent": 0.8,
            },
            "sequences": {"keep_events": 2 * events_per_user, "num_buckets": 8},
            "model": model,
            "ray": {"num_cpus": asked.logical_cpus},
        }
    )


def _publish(settings: Settings, model: ModelSettings, name: str, seed: int) -> str:
    torch.manual_seed(seed)
    network = Longer(model, settings.event_schema, settings.train.tasks)
    table, version_id = Table(settings.path(name)), fingerprint("random", seed)
    if (published := table.reuse(version_id)) is None:
        model_version = save_weights(
            table.begin(version_id), weights_of(network), model, settings.event_schema, settings.train.tasks
        )
        about = {"schema_hash": settings.event_schema.hash(), "model_version": model_version}
        published = table.publish(version_id, about)
    return published.path


def _bodies(settings: Settings, asked: argparse.Namespace) -> tuple[list[Body], list[Body]]:
    """As `jobs.build_requests` makes them of events, whose table of a million to train on nobody needs here."""
    table = SequenceTable(settings.path("tables", "sequences"), settings.event_schema)
    buckets = [table.read_bucket(bucket) for bucket in table.buckets]
    user_E = np.concatenate([np.repeat(ids.to_numpy(), np.diff(rows.offsets_B1)) for ids, rows in buckets])
    event_ts_E = np.concatenate([rows.event_ts_E for _, rows in buckets])
    rng = np.random.default_rng(asked.seed)

    def body(user: int, request_ts: int) -> Body:
        candidates = rng.integers(1, asked.items + 1, asked.candidates).tolist()
        return str(user), json.dumps({"user_id": user, "candidates": candidates, "request_ts": request_ts}).encode()

    hits = [body(user, int(event_ts_E.max())) for user in np.unique(user_E).tolist()]
    newest = np.argsort(event_ts_E, kind="stable")[-asked.trace_per_user * asked.users :]
    return hits, [body(*of) for of in zip(user_E[newest].tolist(), event_ts_E[newest].tolist(), strict=True)]
