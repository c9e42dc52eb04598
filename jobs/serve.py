"""Serves the current checkpoint over HTTP until interrupted: python -m jobs.serve --config configs/quickstart.yaml"""

import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import ray
from ray import serve

from longer.config import Settings
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job, start_ray
from longer.training.inputs import Inputs
from serve_apps.scoring import ScoringArgs, build_app

PROXY_MARGIN_S = 5.0
"""How much longer than a request may take in a replica it may be in Serve, waiting for one included."""


def free_port(host: str, preferred: int) -> int:
    """The preferred port if nobody listens there, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise UserError(f"serve.host={host}: cannot listen there: use an address of this machine")


def direct_host(settings: Settings) -> str | None:
    """Where replicas listen themselves: as the proxy does, but on a cluster at no address that is one machine's."""
    host = socket.gethostbyname(settings.serve.host)
    return host if settings.ray.cluster is None or ip_address(host).is_unspecified else None


def scoring_args(settings: Settings, inputs: Inputs) -> ScoringArgs:
    """The application's arguments for these tables."""
    asked, schema = settings.serve, settings.event_schema
    if asked.num_replicas > asked.max_replicas:
        raise UserError(
            f"serve.num_replicas={asked.num_replicas} exceeds serve.max_replicas={asked.max_replicas}: raise the latter"
        )
    return ScoringArgs(
        checkpoint=inputs.checkpoint.path,
        sequences=settings.path("tables", "sequences"),
        items=settings.path("tables", "items") if schema.features_of("item") else None,
        pool_label=settings.ray.pool_label,
        direct_host=direct_host(settings),
        **asked.model_dump(exclude={"host", "port", "check_requests"}),
    )


def where_to_look() -> str:
    """Where this node's Ray gives metrics and keeps the access log: `session_latest` moves on with every Ray of the machine."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    logs = Path(node["RayletSocketName"]).parents[1] / "logs" / "serve"
    return f"metrics at http://127.0.0.1:{node['MetricsExportPort']}/metrics, access log in {logs}/access_*.jsonl"


def run(settings: Settings) -> None:
    """Blocks until interrupted."""
    host, port = settings.serve.host, settings.serve.port
    if free_port(host, port) != port:
        raise UserError(f"serve.port={port}: another process listens there: choose another port")
    args = scoring_args(settings, Inputs.served(settings))
    start_ray(settings.ray)  # mistakes are told before
    request_timeout_s = args.timeout_s + PROXY_MARGIN_S
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": request_timeout_s})
    say("serve", f"POST http://{host}:{port}/v1/score; interrupt to stop")
    say("serve", where_to_look())
    with suppress(KeyboardInterrupt):
        serve.run(build_app(args), name="scoring", route_prefix="/", blocking=True)


if __name__ == "__main__":
    run_job(__doc__, run, needs_ray=False)
