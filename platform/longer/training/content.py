"""What a run trains on, and in which order: a table's training split, epoch after epoch, or the days that have come since.

R requests, P packs, E epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longer.arrays import MS_PER_DAY, Int64
from longer.config import Settings
from longer.data.batches import Packs
from longer.data.events import iso_time
from longer.data.layout import bucket_of_path
from longer.data.tables import RequestTable, SequenceTable
from longer.encoder_settings import UserEmbedding
from longer.errors import UserError
from longer.hashing import hash_int64
from longer.model.layout import Sizes
from longer.training.cursor import DataCursor
from longer.training.loader import (
    Part,
    SplitData,
    check_windows,
    largest_batch,
    read_part,
    read_part_since,
)
from longer.training_settings import TaskSettings

MAX_PACK_REQUESTS = 16
"""Requests of one user in a pack: more share one history, but a step's requests are more alike. 8, 16 and 32 learn alike."""


_SPLITS = ["train", "valid"]
_MOST_LABEL = 1e15
"""The sum of many squares of it is in float32's range."""


@dataclass(frozen=True)
class Job:
    """What the driver tells every worker: settings, pinned table versions, a checkpoint whose weights are the first ones.

    With `since_ms`, the requests from that time on are trained, a day an epoch, and each day is tested before it is trained.
    """

    settings: Settings
    versions: dict[str, str]
    weights: str | None = None
    since_ms: int | None = None

    @property
    def base(self) -> str | None:
        """The checkpoint that it needs whenever it starts: of the first weights, or of the user tower in fresh ones."""
        encoder = self.settings.model.encoder
        return self.weights or (encoder.upstream if isinstance(encoder, UserEmbedding) else None)

    @property
    def trains_days(self) -> bool:
        return self.since_ms is not None


@dataclass(frozen=True)
class Looked:
    """What is found at some requests of a split: how many windows are cut, and the lowest and highest label of each task."""

    num_cut: int
    labels: dict[str, tuple[float, float]]

    @staticmethod
    def at(data: SplitData, tasks: Sequence[TaskSettings]) -> "Looked":
        ranges = {}
        for task in tasks:
            label_C = data.requests.labels[task.name]  # fmin and fmax: whatever is missing
            ranges[task.name] = float(np.fmin.reduce(label_C, initial=0)), float(np.fmax.reduce(label_C, initial=0))
        return Looked(data.num_cut(), ranges)


@dataclass(frozen=True)
class Tables:
    """The tables of a job, whose requests are read from them in parts, on any machine."""

    job: Job
    sequences: SequenceTable
    requests: RequestTable

    @staticmethod
    def of(job: Job) -> "Tables":
        settings, schema, versions = job.settings, job.settings.event_schema, job.versions
        return Tables(
            job,
            SequenceTable(settings.path("tables", "sequences"), schema, versions["sequences"]),
            RequestTable(settings.path("tables", "requests"), schema, versions["requests"]),
        )

    def bucket_bytes(self) -> Int64:
        """What each bucket takes in the tables' files, of which some are of splits that are not read."""
        num_bytes_K = np.zeros(self.requests.num_buckets, np.int64)
        for version in (self.sequences.version, self.requests.version):
            for file in version.data_files():
                num_bytes_K[bucket_of_path(file.path)] += file.num_bytes
        return num_bytes_K

    def read(self, buckets: Sequence[int]) -> Part:
        """All that the job may need of some buckets: of the training split and the one that validates, or of what is new."""
        if self.job.since_ms is not None:
            part = read_part_since(self.sequences, self.requests, self.job.since_ms, buckets)
        else:
            part = read_part(self.sequences, self.requests, _SPLITS, buckets)
        return replace(part, requests=[of_split.without_raw_ids() for of_split in part.requests])

    def look(self, part: Part) -> list[Looked]:
        """At each split of a part."""
        settings = self.job.settings
        return [Looked.at(data, settings.train.tasks) for data in part.splits(settings.model.windows)]

    def check(self, looked: Sequence[list[Looked]]) -> None:
        """A UserError if no run can be made of these parts."""
        names = ["new"] if self.job.trains_days else _SPLITS
        by_split = list(zip(*looked, strict=True))
        for name, parts in zip(names, by_split, strict=True):
            num_cut = sum(part.num_cut for part in parts)
            check_windows(num_cut, self.job.settings.model.windows, self.sequences.version.path, name)
        for parts in by_split:
            for task in self.job.settings.train.tasks:
                lowest, highest = zip(*(part.labels[task.name] for part in parts), strict=True)
                _check_labels(task, min(lowest), max(highest))


def _check_labels(task: TaskSettings, lowest: float, highest: float) -> None:
    if max(-lowest, highest) > _MOST_LABEL:
        raise UserError(
            f"train.tasks: the labels of {task.name} are {lowest:g} to {highest:g}, of which a loss is infinite: look at the "
            "column, and scale or clip it"
        )
    if task.kind == "binary" and (lowest < 0 or highest > 1):
        raise UserError(
            f"train.tasks: the labels of {task.name} are {lowest:g} to {highest:g}, a binary task's are 0 to 1: make it kind: "
            "regression, or scale the column"
        )


class Content:
    """The requests of a job (`Tables.read`), packed, and the cursor over them; few arrays beside them are as long as they are.

    `expected` is the tally of each epoch's requests, and its day where an epoch is one; `valid` are the requests that validate,
    none where days are tested instead.
    """

    def __init__(self, job: Job, part: Part) -> None:
        settings, versions, asked = job.settings, job.versions, job.settings.train
        self.data, *others = part.splits(settings.model.windows)
        self.valid: tuple[SplitData, Packs] | None = None
        if job.since_ms is None:
            self.packs = self.data.packs(MAX_PACK_REQUESTS, self.data.newest(asked.max_requests))
            epochs, self.days = [np.arange(len(self.packs))] * asked.epochs, np.empty(0, np.int64)
            (valid,) = others
            self.valid = valid, valid.packs(MAX_PACK_REQUESTS, valid.spread(asked.max_validation_requests))
        else:
            self.packs, day_P = self.data.packs_by_day(MAX_PACK_REQUESTS)
            self.days = np.unique(day_P)
            epochs = [np.flatnonzero(day_P == day) for day in self.days]
        self.cost_P = self.data.cost(self.packs)
        self.requests_P = np.diff(self.packs.offsets_P1)
        self.candidates_P = self.data.num_candidates(self.packs)
        self._epochs = epochs
        self.expected = [{**self._day_of(epoch), **tally(self._request_ids(epoch))} for epoch in range(len(epochs))]
        self.cursor = DataCursor(f"{versions['requests']}/{settings.seed}", self.cost_P, epochs, asked.tokens_per_step)

    def epoch(self, epoch: int) -> tuple[SplitData, Packs]:
        """The requests of one epoch."""
        return self.data, self.packs.take(self._epochs[epoch])

    def largest_batch(self, num_batches: int) -> Sizes:
        """The most of everything in any of the `num_batches` of any step: with room for it, all steps have the same shapes."""
        plans = (self.cursor.plan(epoch, num_batches) for epoch in range(self.cursor.num_epochs))
        return largest_batch(self.data.sizes(self.packs), plans)

    def _request_ids(self, epoch: int) -> Int64:
        return self.data.requests.request_id_R[self.packs.take(self._epochs[epoch]).order_R]

    def _day_of(self, epoch: int) -> dict[str, Any]:
        return {"day": iso_time(int(self.days[epoch]) * MS_PER_DAY)[:10]} if len(self.days) else {}


def tally(request_id_R: Int64) -> dict[str, Any]:
    """How many requests, and the sum of their hashed ids modulo 2^64: it changes if one is left out, repeated or replaced."""
    return {"num_requests": len(request_id_R), "id_sum": f"{int(hash_int64(request_id_R).sum()):016x}"}


class Trained:
    """The same tally of what steps were taken on, by epoch; several workers' are added up."""

    def __init__(self, num_epochs: int) -> None:
        self.num_requests_E = np.zeros(num_epochs, np.int64)
        self.id_sum_E = np.zeros(num_epochs, np.uint64)

    def add(self, epoch: int, request_id_R: Int64) -> None:
        self.num_requests_E[epoch] += len(request_id_R)
        self.id_sum_E[epoch : epoch + 1] += hash_int64(request_id_R).sum()  # an array's sum wraps without a warning

    def restore(self, epochs: list[dict[str, Any]]) -> None:
        """Starts from a checkpoint's tallies."""
        self.num_requests_E[:] = [epoch["num_requests"] for epoch in epochs]
        self.id_sum_E[:] = [int(epoch["id_sum"], 16) for epoch in epochs]

    def merge(self, other: "Trained") -> None:
        self.num_requests_E += other.num_requests_E
        self.id_sum_E += other.id_sum_E

    def as_dicts(self) -> list[dict[str, Any]]:
        return [
            {"num_requests": int(num), "id_sum": f"{int(ids):016x}"}
            for num, ids in zip(self.num_requests_E, self.id_sum_E, strict=True)
        ]
