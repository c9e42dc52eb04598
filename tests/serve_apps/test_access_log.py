"""The access log while its disk stalls."""

import json
import threading
from pathlib import Path

import pytest

from serve_apps import access_log
from serve_apps.access_log import AccessLog, Call

MOST = 50


def test_lines_do_not_pile_up_while_the_disk_stalls_and_those_left_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_MOST_WAITING", MOST)
    log, may_write = AccessLog(str(tmp_path), "me"), threading.Event()
    log._writer.submit(may_write.wait, 10)
    for _ in range(3 * MOST):
        log.note(Call("score"), 200, 1.0)
        log.flush()
    assert log._writer._work_queue.qsize() == 1
    may_write.set()
    log.close()
    *written, last = map(json.loads, (tmp_path / "access_me.jsonl").read_text().splitlines())
    assert len(written) == MOST
    assert last["left_out"] == 2 * MOST
