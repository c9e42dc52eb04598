"""What the files of a dump hold, and what its JSON says of them (`dumps`). No Ray, no HTTP.

U users of whom there are events.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict

from longer.hashing import stable_keys
from longer.model.state_layout import StateLayout
from longer.serving.cache import StateVersion
from longer.serving.kept_states import KeptState, pack, unpack
from longer.serving.online import OnlineEvents
from longer.serving.store import HeldState, StateStore

DUMP_FORMAT = 4
"""Raise it when a slot's or a file's content changes."""

_FILE_BYTES = 16 << 20
"""Of states in a file: what a replica reads and takes in at once, between two batches of requests."""

_USERS_TOGETHER = 64
"""Of whom events are taken in at once, between two batches of requests."""


Content = tuple[Callable[[], bytes], list[Any]]
"""Of a file: what makes its bytes, and its users."""


class DumpFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    num_bytes: int
    sha256: str
    user_ids: list[int | str]


class Manifest(BaseModel):
    """What a dump is of. `began_s` is when its replica stopped answering, by its clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    version: StateVersion
    layout: dict[str, Any]
    began_s: float
    tables: list[str]
    events: DumpFile | None
    states: list[DumpFile]
    sha256: str = ""
    """Of all the rest."""

    def sealed(self) -> "Manifest":
        """With its checksum."""
        return self.model_copy(update={"sha256": self._checksum()})

    @property
    def is_as_sealed(self) -> bool:
        return self.sha256 == self._checksum()

    def _checksum(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


@dataclass(frozen=True)
class Dump:
    """What is found under a name: files with their sizes; without `manifest` it is torn, as `problem` says."""

    name: str
    sizes: dict[str, int]
    manifest: Manifest | None
    problem: str = ""

    @property
    def began_s(self) -> float:
        return self.manifest.began_s if self.manifest else 0.0


def layout_of(layout: StateLayout) -> dict[str, Any]:
    """What decides how the words of a slot are read, as JSON."""
    return asdict(layout)


def events_content(online: OnlineEvents) -> Content:
    """Of the file of all online events."""
    events = online.all()

    def as_bytes() -> bytes:
        sink = io.BytesIO()
        pq.write_table(events, sink, compression="zstd")
        return sink.getvalue()

    return as_bytes, events["user_id"].unique().to_pylist()


def events_in(data: bytes, user_ids: list[Any], gone: set[int]) -> Iterator[pa.Table]:
    """Of a file's events those of these users, but for those with a key in `gone`, of `_USERS_TOGETHER` users at a time."""
    events = pq.read_table(pa.BufferReader(data))
    events = events.filter(pc.is_in(events["user_id"], pa.array(user_ids, events["user_id"].type)))
    events = events.filter(~np.isin(stable_keys(events["user_id"]), list(gone)))
    first_U = np.flatnonzero(np.diff(stable_keys(events["user_id"]), prepend=0))  # a user's lie together
    bounds = [*first_U[::_USERS_TOGETHER].tolist(), len(events)]
    return (events.slice(begin, end - begin) for begin, end in pairwise(bounds))


def states_contents(
    store: StateStore, online: OnlineEvents, version: StateVersion, tables: list[str]
) -> Iterator[Content]:
    """Of files of about `_FILE_BYTES` of states, the hottest first, as many as a host tier takes; `tables` gets the versions that
    they name."""
    for chunk in _chunks(store, version):
        arrays = pack(chunk, tables, online.revision)
        yield partial(safetensors.numpy.save, arrays), [held.entry.user_id for held, _, _ in chunk]


def states_in(data: bytes, file: DumpFile, tables: list[str], user_ids: set[Any], gone: set[int]) -> list[KeptState]:
    """Of a file's states those of these users, but for those with a key in `gone`."""
    found = unpack(safetensors.numpy.load(data), file.user_ids, tables)
    return [state for state in found if state.user_id in user_ids and state.user_key not in gone]


def _chunks(store: StateStore, version: StateVersion) -> Iterator[list[tuple[HeldState, bool, torch.Tensor]]]:
    """States with their words in runs of about `_FILE_BYTES`."""
    chunk, num_bytes, left_bytes = list[tuple[HeldState, bool, torch.Tensor]](), 0, store.host_budget_bytes
    for held, is_protected in store.hottest(version):
        left_bytes -= held.num_bytes
        if left_bytes < 0:
            break
        chunk.append((held, is_protected, store.words(held)))
        num_bytes += held.num_bytes
        if num_bytes >= _FILE_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
