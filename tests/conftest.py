"""What tests share: one local Ray for the whole session, authenticated as the jobs' is, on any machine."""

from collections.abc import Iterator

import pytest

from longer.config import RaySettings
from longer.runner import start_ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    start_ray(RaySettings(num_cpus=4, object_store_bytes=256 << 20))
    yield
    ray.shutdown()
