"""The study's results as a file that several processes of one machine add to, and who makes which record."""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.quality_study.rows import Record


class Records:
    """JSON lines, one an arm or trial. No record is made twice, whoever else makes some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._num_earlier = len(self.read())

    def read(self) -> list[Record]:
        """Those whose lines are whole: a copy of a file that was written to may end within one."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def append(self, record: Record) -> None:
        """In one write, so that lines of several processes do not mix, and behind what may be there of a line."""
        with self.path.open("a+b", buffering=0) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(record).encode() + b"\n")

    @contextmanager
    def claim(
        self, key: str, stands: Callable[[Record, list[Record]], bool] = lambda record, records: True
    ) -> Iterator[bool]:
        """Whether this process may make the record: none is there that `stands` among the others, and nobody else makes it. A claim
        ends with its process."""
        folder = self.path.with_suffix(".claims")
        folder.mkdir(exist_ok=True)
        with (folder / hashlib.sha256(key.encode()).hexdigest()[:24]).open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            records = self.read()
            last = {record.get("key"): record for record in records}.get(key)
            yield key not in self.left_out(records) and (last is None or not stands(last, records))

    def left_out(self, records: list[Record], times: int = 2) -> set[str]:
        """So many times by this run; what an earlier one left out is tried again."""
        found = Counter(record["left_out"] for record in records[self._num_earlier :] if "left_out" in record)
        return {key for key, number in found.items() if number >= times}
