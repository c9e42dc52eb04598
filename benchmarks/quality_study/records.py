"""The study's results as a file that several processes of one machine add to, and who makes which record."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Records:
    """JSON lines, one an arm or trial. No record is made twice, whoever else makes some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._num_earlier = len(self.read())

    def read(self) -> list[dict[str, Any]]:
        """Those whose lines are whole."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def append(self, record: dict[str, Any]) -> None:
        """In one write, so that lines of several processes do not mix."""
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(record).encode() + b"\n")

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may make the record: it is not there, and nobody else makes it. A claim ends with its process."""
        folder = self.path.with_suffix(".claims")
        folder.mkdir(exist_ok=True)
        with (folder / hashlib.sha256(key.encode()).hexdigest()[:24]).open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            records = self.read()
            yield key not in {record.get("key") for record in records} | self.left_out(records)

    def left_out(self, records: list[dict[str, Any]]) -> set[str]:
        """By this run; what an earlier one left out is tried again."""
        return {record["left_out"] for record in records[self._num_earlier :] if "left_out" in record}
