"""What replicas ask of each other, on a real Serve."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.serve_apps.services import Front, running
from tests.serving.tables import build_world


@pytest.mark.ray
def test_a_silent_replica_keeps_nobody_from_hearing_the_others(front: Front, tmp_path: Path) -> None:
    """Slow: three replicas come, and one keeps silent for as long as the others wait for it."""
    with running(front, build_world(tmp_path), num_replicas=3, max_replicas=3) as url:
        deadline = time.monotonic() + 60
        while len(replicas := httpx.get(f"{url}/v1/status", timeout=30).json()["replicas"]) < 3:
            assert time.monotonic() < deadline
        asked = httpx.Client(base_url=url, timeout=30, headers={"x-session-id": "1"})
        own = asked.get("/v1/stats").json()["replica"]
        silent = next(one for one in replicas if one["replica"] != own)
        os.kill(silent["process_id"], signal.SIGSTOP)
        try:
            told = asked.get("/v1/status").json()
        finally:
            os.kill(silent["process_id"], signal.SIGCONT)
        assert {one["replica"] for one in told["replicas"]} == {one["replica"] for one in replicas} - {
            silent["replica"]
        }
        assert told["silent_replicas"] == 1
