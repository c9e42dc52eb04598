"""What a verification found: violations by kind, all of them counted and the first few in words. No Ray, no torch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_INT64 = np.iinfo(np.int64)

KINDS = {
    "missing_file": "a file that the manifest lists is not there",
    "file_size": "a file has another size than the manifest says",
    "checksum": "a file has another checksum than the manifest says",
    "unreadable": "a file is damaged inside",
    "row_count": "the manifest counts other rows than the files hold",
    "manifest": "the manifest says what its rows, its settings or the other table contradict",
    "statistics": "a row group does not say which users it holds, which point reads need",
    "unmerged": "rows and their news, one of them wrong, are not merged, so what only the merge shows is not checked",
    "sequence_version": "the requests were made from another version of the sequences",
    "null": "a value that must be there is null",
    "list_length": "the list columns of a row differ in length",
    "wrong_bucket": "a row lies in another bucket than its user's",
    "user_order": "users do not ascend",
    "duplicate_user": "a user has two rows",
    "time_order": "event times of a sequence descend",
    "tie_order": "events of one time are not in the order of the other columns",
    "first_index": "first_index is negative or no multiple of the stride in events",
    "length": "first_index + length is not num_events_total",
    "num_older": "news count less than no older events",
    "keep_events": "the row does not hold the events that keep_events promises",
    "prev_event_ts": "prev_event_ts is null past index 0, or given at index 0",
    "prev_event_order": "prev_event_ts is after the first event kept",
    "duplicate_request": "a request id occurs twice",
    "unknown_user": "a request's user has no sequence",
    "impressions_version": "the impressions that the requests were made from are not there, so candidates are not checked",
    "unknown_request": "a request is of no impressions",
    "lost_request": "impressions up to the newest event, their history not cut, are no request",
    "request_feature": "the user, the time or a feature of a request is not that of its earliest impression that has it",
    "candidates": "a request's candidates are not the items of its impressions, once each, in their order",
    "candidate_feature": "a candidate's feature is neither that of its impressions nor the catalogue's",
    "label": "a candidate's label is not the largest of its impressions",
    "wrong_split": "a request lies in another split than its time's",
    "history_range": "history_end is negative or more than the user's events",
    "future_event": "a history holds an event at or after its request_ts",
    "stale_history": "a history leaves out events strictly before its request_ts",
    "cut_window": "a history window starts before the first event kept",
}
"""Every kind of violation, in the words of its summary."""


@dataclass
class Findings:
    """Violations by kind: how many, and at most `max_shown` of each in words."""

    max_shown: int
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_violations(self) -> int:
        return self.counts.total()

    def add(self, kind: str, is_found_N: npt.NDArray[np.bool_], describe: Callable[[int], str]) -> None:
        """A violation for each true row; `describe` is asked only for those that are shown."""
        rows = np.flatnonzero(is_found_N)
        if len(rows):
            self._put(kind, len(rows), [describe(int(row)) for row in rows[: self.max_shown]])

    def add_one(self, kind: str, text: str) -> None:
        self._put(kind, 1, [text])

    def merge(self, other: "Findings") -> None:
        """Takes in what another part of the tables showed."""
        for kind, count in other.counts.items():
            self._put(kind, count, other.shown[kind])

    def _put(self, kind: str, count: int, texts: list[str]) -> None:
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind] += count
        shown = self.shown.setdefault(kind, [])
        shown += texts[: self.max_shown - len(shown)]


@dataclass
class BucketReport:
    """What was checked in a bucket or in several, what is wrong, and what is only counted; the span of all event times."""

    found: Findings
    noted: Findings
    checked: Counter[str] = field(default_factory=Counter)
    oldest_ms: int = int(_INT64.max)
    newest_ms: int = int(_INT64.min)

    def merge(self, other: "BucketReport") -> None:
        self.found.merge(other.found)
        self.noted.merge(other.noted)
        self.checked += other.checked
        self.oldest_ms = min(self.oldest_ms, other.oldest_ms)
        self.newest_ms = max(self.newest_ms, other.newest_ms)
