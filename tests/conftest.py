"""What tests share: one local Ray for the whole session, authenticated as the jobs' is, on any machine."""

import os
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest

from longer.config import RaySettings
from longer.runner import start_ray
from tests.s3.proxy import Proxy, proxy_before


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server on a free loopback port, reached over HTTP through the usual environment variables."""
    import boto3
    from moto.server import ThreadedMotoServer

    from longer.s3 import S3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    reset = Request(f"http://{host}:{port}/moto-api/reset", method="POST")  # servers of one process share their objects
    urlopen(reset).close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="tables")
    S3.clear_instance_cache()
    yield "s3://tables"
    S3.clear_instance_cache()
    server.stop()


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
