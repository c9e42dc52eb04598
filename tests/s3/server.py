"""An S3 server of the tests' own, on a free loopback port, reached as any store is: through the usual environment variables."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def running_bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; the variables that lead to it are set through `patch`."""
    import boto3
    from moto.server import ThreadedMotoServer

    from longer.s3 import S3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    reset = Request(f"http://{host}:{port}/moto-api/reset", method="POST")  # servers of one process share their objects
    urlopen(reset).close()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="tables")
    S3.clear_instance_cache()
    yield "s3://tables"
    S3.clear_instance_cache()
    server.stop()
