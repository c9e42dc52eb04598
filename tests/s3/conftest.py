"""An S3 server behind a proxy that can fail."""

import os
from collections.abc import Iterator

import pytest

from longer.s3 import S3
from tests.s3.proxy import Proxy, proxy_before


@pytest.fixture
def faulty_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The bucket s3://tables through a proxy, without faults until a plan is set."""
    with proxy_before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3.clear_instance_cache()
        yield proxy
