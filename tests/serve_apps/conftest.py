"""One Serve for all services of these tests."""

from collections.abc import Iterator

import pytest
from ray import serve
from ray.serve.config import gRPCOptions

from tests.cluster.nodes import free_ports
from tests.serve_apps.services import HOST, Front


@pytest.fixture(scope="package")
def front(local_ray: None) -> Iterator[Front]:
    """Serve's controller and proxy, which take as long to come up as a service; services come and go behind it."""
    started = Front(*free_ports(2))  # Serve shares a port with whoever chose it at the same time: not the same for all
    grpc = gRPCOptions(port=started.rpc_port, grpc_servicer_functions=["serve_apps.grpc_proxy.add_scoring"])
    try:
        serve.start(http_options={"host": HOST, "port": started.port}, grpc_options=grpc)
        yield started
    finally:
        serve.shutdown()
