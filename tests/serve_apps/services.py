"""Running services for tests, each on a port of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from jobs.serve import free_port
from longer.config import Settings
from serve_apps.scoring import ScoringArgs, build_app


@contextmanager
def running(world: Settings, **arguments: Any) -> Iterator[str]:
    """The URL of a service of this world's tables; it ends with the block."""
    args = ScoringArgs(
        checkpoint=world.path("checkpoints"),
        sequences=world.path("tables", "sequences"),
        items=world.path("tables", "items"),
        num_cpus=0.5,
        **arguments,
    )
    port = free_port("127.0.0.1", 8399)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(args), name="scoring", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
