"""What tests share: one local Ray for the whole session, authenticated as the jobs' is, on any machine."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here and in what tests start: with tensors this small, threads that wait for each other cost fifty
# times what they compute once other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray makes its workers nicer than all else by 15: where anything else runs, they would get next to nothing.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray Train looks every two seconds otherwise: at the end of each run, and after each checkpoint, which the next one waits for.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

from longer.config import RaySettings
from longer.runner import start_ray
from tests.s3.proxy import Proxy, proxy_before
from tests.s3.server import running_bucket

# Ctrl-C counts in what tests start, also where a shell has put all of them into the background, with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says more of what else the machine does.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--malformed", type=int, default=1000, help="Malformed requests to a service; 10000 is the full size."
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast files first: without Ray, then with one of their own, then those on the Ray of the session, idle for none before.

    Of these the ones with most tests first: a long one that begins last would run alone, where two processes share the files.
    """
    num_tests = Counter(item.path for item in items)
    rank = dict.fromkeys(num_tests, 0)
    for item in items:
        here = 2 if "local_ray" in getattr(item, "fixturenames", ()) else 1 if item.get_closest_marker("ray") else 0
        rank[item.path] = max(rank[item.path], here)
    items.sort(key=lambda item: (rank[item.path], -num_tests[item.path] if rank[item.path] else 0))


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
