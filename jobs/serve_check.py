"""Serves the current checkpoint for a while and checks its answers: python -m jobs.serve_check --config configs/quickstart.yaml"""

import logging

from ray import serve
from ray.serve.schema import LoggingConfig

from jobs.serve import free_port, scoring_args
from longer.config import Settings
from longer.data.tables import RequestTable
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job
from longer.serving.check import (
    choose_requests,
    find_check,
    logged_features,
    offline_scores,
    publish_check,
    replay,
)
from longer.storage import Table, Version
from longer.training.inputs import Inputs
from serve_apps.scoring import build_app


def run(settings: Settings) -> Version:
    """Latencies, cache counters and the largest difference from the offline scores, published as `serving_check`."""
    table = Table(settings.path("serving_check"))
    inputs = Inputs.served(settings)
    offline = offline_scores(settings, inputs)
    if published := find_check(settings, table, inputs, offline):
        return published
    requests = RequestTable(settings.path("tables", "requests"), settings.event_schema, inputs.requests.id)
    users = choose_requests(requests, "test", settings.serve.check_requests)
    logged = logged_features(requests, "test", users)
    args = scoring_args(settings, inputs).model_copy(update={"sequences_version": inputs.sequences.id})
    if serve.status().applications:
        raise UserError("ray.address: this cluster serves applications already: check on a Ray of its own")
    host = settings.serve.host
    port = free_port(host, settings.serve.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=LoggingConfig(log_level="WARNING"))
        serve.run(build_app(args), name="scoring", route_prefix="/")
        say("serve_check", f"{sum(map(len, users))} requests of {len(users)} users to http://{host}:{port}/v1/score")
        answers = replay(f"http://{host}:{port}", users, logged, args.token())
    finally:
        _stop(settings)
    return publish_check(settings, table, inputs, offline, users, answers)


def _stop(settings: Settings) -> None:
    """A local Ray takes the rest of Serve with it when it ends; on a cluster nothing is left behind."""
    if settings.ray.cluster is None:
        serve.delete("scoring")
    else:
        serve.shutdown()


if __name__ == "__main__":
    run_job(__doc__, run, check=Inputs.served)
