"""Serves the current checkpoint over HTTP until interrupted: python -m jobs.serve --config configs/quickstart.yaml"""

from contextlib import suppress

from ray import serve

from longer.config import Settings
from longer.data.items import publish_items
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job
from longer.serving.batch import Inputs
from longer.serving.check import free_port
from serve_apps.scoring import ScoringArgs, build_app


def scoring_args(settings: Settings, inputs: Inputs) -> ScoringArgs:
    """The application's arguments for these tables; builds the item catalogue if items have features and it is not there."""
    asked, schema = settings.serve, settings.event_schema
    if asked.num_replicas > asked.max_replicas:
        raise UserError(
            f"serve.num_replicas={asked.num_replicas} exceeds serve.max_replicas={asked.max_replicas}: raise the latter"
        )
    items = settings.path("tables", "items")
    if schema.features_of("item"):
        publish_items(items, inputs.sequences, schema)
    return ScoringArgs(
        checkpoint=inputs.checkpoint.path,
        sequences=settings.path("tables", "sequences"),
        items=items if schema.features_of("item") else None,
        **asked.model_dump(exclude={"host", "port", "check_requests"}),
    )


def run(settings: Settings) -> None:
    """Blocks until interrupted."""
    host, port = settings.serve.host, settings.serve.port
    if free_port(host, port) != port:
        raise UserError(f"serve.port={port}: another process listens there: choose another port")
    args = scoring_args(settings, Inputs.served(settings))
    serve.start(http_options={"host": host, "port": port})
    say("serve", f"POST http://{host}:{port}/v1/score; interrupt to stop")
    with suppress(KeyboardInterrupt):
        serve.run(build_app(args), name="scoring", route_prefix="/", blocking=True)


if __name__ == "__main__":
    run_job(__doc__, run)
