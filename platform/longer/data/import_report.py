"""What became of a part of a log: counts, times, files written."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longer.files import remove_tree
from longer.storage import DataFile

_FILES = pa.list_(pa.struct([("path", pa.string()), ("num_bytes", pa.int64()), ("sha256", pa.string())]))
REPORT_SCHEMA = pa.schema(
    [
        *(("content_id", pa.string()), ("name", pa.string()), ("number", pa.int64()), ("problem", pa.string())),
        *(("num_rows", pa.int64()), ("first_ts", pa.int64()), ("last_ts", pa.int64())),
        ("reasons", pa.list_(pa.struct([("reason", pa.string()), ("count", pa.int64())]))),
        *(("events", _FILES), ("quarantine", _FILES)),
    ]
)
"""Of `PartReport.to_row`."""


@dataclass
class PartReport:
    """Events of a part, its unfit rows by reason, and its files; or the problem for which it was skipped."""

    content_id: str
    name: str
    number: int
    problem: str | None = None
    num_rows: int = 0
    first_ts: int | None = None
    last_ts: int | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    events: list[DataFile] = field(default_factory=list)
    quarantine: list[DataFile] = field(default_factory=list)

    def count(self, good: pa.Table, bad: pa.Table) -> None:
        """Adds the rows of one batch."""
        self.num_rows += len(good)
        for pair in pc.value_counts(bad["reason"]).to_pylist():
            self.reasons[pair["values"]] += pair["counts"]
        if len(good):
            times = pc.min_max(good["event_ts"].cast(pa.int64())).as_py()
            self.first_ts = times["min"] if self.first_ts is None else min(self.first_ts, times["min"])
            self.last_ts = times["max"] if self.last_ts is None else max(self.last_ts, times["max"])

    def remove_files(self, events_path: str, quarantine_path: str) -> None:
        """Removes what the part has written."""
        for path, files in ((events_path, self.events), (quarantine_path, self.quarantine)):
            for file in files:
                remove_tree(f"{path}/{file.path}")

    def to_row(self) -> dict[str, Any]:
        reasons = [{"reason": reason, "count": count} for reason, count in self.reasons.items()]
        files = {name: [vars(file) for file in getattr(self, name)] for name in ("events", "quarantine")}
        return {**vars(self), **files, "reasons": reasons}

    @staticmethod
    def from_row(row: dict[str, Any]) -> "PartReport":
        reasons = Counter({pair["reason"]: pair["count"] for pair in row["reasons"]})
        files = {name: [DataFile(**file) for file in row[name]] for name in ("events", "quarantine")}
        return PartReport(**{**row, **files, "reasons": reasons})
