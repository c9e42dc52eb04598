"""Continuous training: the served checkpoint goes on with the days that have come since it was trained.

A checkpoint's manifest says up to which request time each of its runs has trained which log (`trained`). Every request of the
served table from where that ends, whatever its split, is trained once, a day after the other and shuffled within a day; each
day is tested just before its first step, so that these metrics are of requests that no weight has seen. A request that comes into
the table later than the training has passed its time is left out.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longer.config import Settings
from longer.data.events import iso_ms, iso_time
from longer.data.parquet import read_columns
from longer.errors import UserError
from longer.progress import say
from longer.schema import TIMESTAMP
from longer.storage import Table, Version, fingerprint
from longer.training.checkpoints import FORMAT_VERSION, check_start
from longer.training.content import Job
from longer.training.lineage import finished, later, may_be_seen, trained_of_log
from longer.training.run import chosen_settings, fit, of_skipped, pin_tables, publish
from longer.training.trainer_state import TRAINER_VERSION, read_trainer_state


def train_new_days(settings: Settings) -> Version:
    """A published checkpoint that has trained all requests since its base was; its manifest lists every day of every run.

    Without new requests nothing changes. An interrupted run goes on from its last checkpoint.
    """
    requests, versions = pin_tables(settings)
    table = Table(settings.path("checkpoints"))
    base = table.require("jobs.train")
    if "trained_until" not in base.manifest:
        raise UserError(
            f"{base.path}: says not until when it was trained: run `python -m jobs.train` without --continue"
        )
    since, until = trained_of_log(base, requests), requests_end(requests)
    chosen = chosen_settings(settings)
    run_id = fingerprint("continued", FORMAT_VERSION, TRAINER_VERSION, base.id, versions, chosen)
    if published := finished(table, run_id):
        return published
    check_start(base.path, settings)  # a mistake is told here once, not by every worker
    if not _num_requests_since(requests, since):
        say("train", f"no requests since {since} in {requests.path}: {base.id} has seen all, nothing changed")
        return base
    is_leaking = may_be_seen(base.path, base.manifest, since)
    table.claim()
    last = fit(Job(settings, versions, base.path, iso_ms(since)), run_id)
    state = read_trainer_state(last)
    tested = {record["day"]: record["tested"] for record in state.history if "tested" in record}
    days: list[dict[str, Any]] = [{**day, "tested": tested[day["day"]]} for day in state.epochs]
    about = {
        "inputs": versions,
        "settings": chosen,
        "continues": base.id,
        "step": state.checkpoints[-1]["step"],
        "validation": days[-1]["tested"],
        "validation_may_be_seen": is_leaking,
        "trained": [*base.manifest["trained"], {"requests": requests.id, "from": since, "until": until, "days": days}],
        "trained_until": later(base.manifest["trained_until"], until),
        "upstream": base.manifest.get("upstream"),
    }
    version = publish(settings, table, run_id, last, state, about)
    num_requests = sum(day["num_requests"] for day in days)
    of_days = f"{num_requests} requests of {len(days)} days until {until}{of_skipped(state)}"
    say("train", f"run {run_id}: continued {base.id} with {of_days}")
    return version


def requests_end(requests: Version) -> str:
    """The moment from which on requests are not known yet: of impressions that is earlier than the newest event, if they lag."""
    stated = requests.manifest
    return iso_time(iso_ms(stated.get("requests_until", stated["watermark"])) + 1)


def _num_requests_since(requests: Version, since: str) -> int:
    first = pa.scalar(iso_ms(since), pa.int64()).cast(TIMESTAMP)
    times = (read_columns(path, ["request_ts"])["request_ts"] for path in requests.files())
    return sum(pc.sum(pc.greater_equal(part, first)).as_py() or 0 for part in times)
