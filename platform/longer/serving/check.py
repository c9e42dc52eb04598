"""Asks a running service what the test split asks, over real HTTP, and compares its scores with the offline ones.

Whole users in time order, each by one client, which goes straight to the user's replica, several clients at once; every few
requests one is sent again at once. So states are loaded, appended to and hit, as in service.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests

from longer.client import ScoringClient
from longer.config import Settings
from longer.data.batches import Requests
from longer.data.scores import check_difference, read_scores, score_rows
from longer.data.tables import RequestTable
from longer.errors import UserError
from longer.hashing import hash_int64
from longer.progress import say
from longer.ring import session_of
from longer.storage import TABLE_FORMAT, Table, Version, checked_output, fingerprint
from longer.training.checkpoints import read_info
from longer.training.inputs import Inputs
from longer.training.loader import concat_requests

NUM_CLIENTS = 2
REPEAT_EVERY = 4
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Logged:
    """Features of a request, and of each of its candidates."""

    own: dict[str, Any]
    of_candidates: list[dict[str, Any]]


def choose_requests(table: RequestTable, split: str, num_requests: int) -> list[Requests]:
    """Requests of whole users, each user's in time order, users in a fixed random order; the last user may be cut short."""
    users = []
    for bucket in range(table.num_buckets):
        requests = table.read(split, bucket)
        for user_key in np.unique(requests.user_key_R):
            mine = np.flatnonzero(requests.user_key_R == user_key)
            users.append(requests.take(mine[np.argsort(requests.request_ts_R[mine], kind="stable")]))
    if not users:
        raise UserError(f"{table.version.path}: no requests in the {split} split: build requests with a longer log")
    key_U = np.array([user.user_key_R[0] for user in users])
    chosen, missing = [], num_requests
    for u in np.argsort(hash_int64(key_U), kind="stable"):
        take = min(missing, len(users[u]))
        if not take:
            break
        chosen.append(users[u].take(np.arange(take)))
        missing -= take
    return chosen


def logged_features(table: RequestTable, split: str, users: list[Requests]) -> dict[int, Logged]:
    """What was logged with each of these requests, by id, where they are impressions: the catalogue may say something else."""
    if "impressions" not in table.version.manifest["inputs"]:
        return {}
    schema, asked = table.schema, pa.array(np.concatenate([user.request_id_R for user in users]))
    names = {of: schema.features_of(of) for of in ("item", "request")}
    logged: dict[int, Logged] = {}
    for bucket in range(table.num_buckets):
        rows = table.rows(split, bucket)
        for row in rows.filter(pc.is_in(rows["request_id"], asked)).to_pylist():
            own, of_items = ({name: row[name] for name in names[of]} for of in ("request", "item"))
            values = [dict(zip(of_items, one, strict=True)) for one in zip(*of_items.values(), strict=True)]
            logged[row["request_id"]] = Logged(own, values or [{}] * len(row["item_id"]))
    return logged


@dataclass(frozen=True)
class Answer:
    """One response; `scores` by task, in the order of the request's candidates."""

    request_id: int
    latency_ms: float
    source: str
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class Replay:
    """All answers, repeated requests included, and the replicas' cache counters at the end, added up."""

    answers: list[Answer]
    cache: dict[str, int]

    def scores(self, requests: Requests, task: str, first: bool = True) -> np.ndarray:
        """[C] of `requests`, from each one's first answer or from its last."""
        answers = reversed(self.answers) if first else iter(self.answers)
        by_request = {answer.request_id: answer.scores[task] for answer in answers}
        return np.concatenate([np.array(by_request[r], np.float32) for r in requests.request_id_R.tolist()])


def replay(url: str, users: list[Requests], logged: dict[int, Logged], token: str | None = None) -> Replay:
    """Sends every user's requests to the service at `url`, as callers would; raises on the first that has no scores."""
    queue, answers = list(reversed(users)), list[Answer]()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [
            pool.submit(_ask_for, ScoringClient(url, token, _TIMEOUT_S), queue, logged, answers)
            for _ in range(NUM_CLIENTS)
        ]
        for client in clients:
            client.result()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    replicas = {}
    for user in users:
        session = {"x-session-id": session_of(user.user_id_R[0].as_py())}
        stats = requests.get(f"{url}/v1/stats", headers={**headers, **session}, timeout=_TIMEOUT_S).json()
        replicas[stats["replica"]] = stats["cache"]
    return Replay(
        answers, {name: sum(cache[name] for cache in replicas.values()) for name in next(iter(replicas.values()))}
    )


def _ask_for(client: ScoringClient, users: list[Requests], logged: dict[int, Logged], answers: list[Answer]) -> None:
    """Takes users off the common list until it is empty; a user's requests go one after the other."""
    while users:
        for number, (request_id, body) in enumerate(_bodies(users.pop(), logged)):
            for _ in range(2 if number % REPEAT_EVERY == 1 else 1):
                started = time.perf_counter()
                answer = client.score(**body)
                latency_ms = (time.perf_counter() - started) * 1000
                answers.append(Answer(request_id, latency_ms, answer["user_state"]["source"], answer["scores"]))


def _bodies(user: Requests, logged: dict[int, Logged]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each request's id and fields: candidates by id, with the catalogue's features, or with those that were logged."""
    offsets = user.candidates.offsets_R1.tolist()
    ids = user.item_id_C.to_pylist()
    for r, request_id in enumerate(user.request_id_R.tolist()):
        body: dict[str, Any] = {
            "user_id": user.user_id_R[r].as_py(),
            "candidates": ids[offsets[r] : offsets[r + 1]],
            "request_ts": int(user.request_ts_R[r]),
        }
        if about := logged.get(request_id):
            body["request_features"] = about.own
            pairs = zip(body["candidates"], about.of_candidates, strict=True)
            body["candidates"] = [{"id": item, "features": features} for item, features in pairs]
        yield request_id, body


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Requests, and percentiles of the milliseconds that clients waited."""
    latencies_ms = [answer.latency_ms for answer in answers]
    p50, p99 = np.percentile(latencies_ms, [50, 99]).tolist()
    by_source = {
        source: float(np.median([a.latency_ms for a in answers if a.source == source]))
        for source in sorted({answer.source for answer in answers})
    }
    return {
        "requests": len(answers),
        "p50_ms": p50,
        "p99_ms": p99,
        "p50_ms_by_source": by_source,
        "latencies_ms": [round(ms, 3) for ms in latencies_ms],
    }


def offline_scores(settings: Settings, inputs: Inputs) -> Version:
    """The evaluation's scores of the test split by the same checkpoint on the same tables."""
    evaluation = Table(settings.path("evaluation")).require("jobs.evaluate")
    if evaluation.manifest["inputs"] != inputs.ids:
        raise UserError(
            f"{evaluation.path}: scores of another checkpoint or other tables than those served: run `python -m jobs.evaluate`"
        )
    return evaluation


def find_check(settings: Settings, table: Table, inputs: Inputs, offline: Version) -> Version | None:
    """A finished check of the same model, tables and serve settings, if there is one."""
    published = table.reuse(_check_id(settings, inputs, offline))
    if published:
        say("serve_check", f"version {published.id} is already checked, nothing changed")
    return published


def publish_check(
    settings: Settings, table: Table, inputs: Inputs, offline: Version, users: list[Requests], replayed: Replay
) -> Version:
    """Compares every answer with the offline scores; publishes the record, and the online scores as a score table."""
    tasks, schema, asked = read_info(inputs.checkpoint.path).tasks, settings.event_schema, concat_requests(users)
    expected = read_scores(offline, asked.request_id_R)
    worst, compared = 0.0, 0
    for first in (True, False):
        online = score_rows(asked, {task.name: replayed.scores(asked, task.name, first) for task in tasks}, schema)
        diff, compared = check_difference(online, expected, tasks)
        worst = max(worst, diff)
    if compared != len(asked):
        raise ValueError(f"{offline.path} has scores of {compared} of the {len(asked)} requests asked")
    record = {**summary(replayed.answers), "max_abs_diff_vs_offline": worst, "cache": replayed.cache}
    version_id = _check_id(settings, inputs, offline)
    with checked_output(table.begin(version_id), "scores/part-0.parquet") as sink:
        pq.write_table(online, sink, compression="zstd")
    about = {
        "schema_hash": schema.hash(),
        "inputs": inputs.ids,
        "offline": offline.id,
        "model_version": inputs.checkpoint.manifest["model_version"],
        "settings": settings.serve.model_dump(mode="json"),
        "num_rows": len(asked),
    }
    version = table.publish(version_id, {**about, **record}, [sink.data_file])
    counters = ", ".join(f"{replayed.cache[name]} {name}" for name in ("hit", "append", "load", "cold", "evict"))
    say(
        "serve_check",
        f"{record['requests']} requests: p50 {record['p50_ms']:.1f} ms, p99 {record['p99_ms']:.1f} ms; {counters}; "
        f"largest difference from offline scores {worst:.1e}",
    )
    return version


def _check_id(settings: Settings, inputs: Inputs, offline: Version) -> str:
    return fingerprint("serving_check", TABLE_FORMAT, inputs.ids, offline.id, settings.serve.model_dump(mode="json"))
