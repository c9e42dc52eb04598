"""What tests share: one local Ray for the whole session, authenticated as the jobs' is, on any machine."""

import os
from collections.abc import Iterator

import pytest

from longer.config import RaySettings
from longer.runner import start_ray
from tests.s3.proxy import Proxy, proxy_before
from tests.s3.server import running_bucket


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--malformed", type=int, default=1000, help="Malformed requests to a service; 10000 is the full size."
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server on a free loopback port, reached over HTTP through the usual environment variables."""
    with running_bucket(monkeypatch) as bucket:
        yield bucket


@pytest.fixture
def faulty_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The bucket s3://tables through a proxy, without faults until a plan is set."""
    from longer.s3 import S3

    with proxy_before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3.clear_instance_cache()
        yield proxy


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    start_ray(RaySettings(num_cpus=4, object_store_bytes=256 << 20))
    yield
    ray.shutdown()
