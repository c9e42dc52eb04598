"""A run's requests in one file on the disk of each node with workers, who map it: in memory they are the page cache's, not theirs.

The file has no name, so that nobody finds a part of it, and is there as long as the process that keeps it: however that ends, the
disk has its room back. Workers open it through that process, and one that starts again finds it as it was.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import ray

from longer.errors import UserError
from longer.training.loader import Part

Name = tuple[str | int, ...]
"""Of an array: the fields, numbers and keys that lead to it."""

_ALIGNED_BYTES = 64


def arrays_in(value: Any, name: Name = ()) -> Iterator[tuple[Name, npt.NDArray]]:
    """All NumPy arrays in dataclasses, lists and dictionaries."""
    if isinstance(value, np.ndarray):
        yield name, value
    for key, inner in _inside(value).items():
        yield from arrays_in(inner, (*name, key))


def with_arrays(value: Any, arrays: Mapping[Name, npt.NDArray], name: Name = ()) -> Any:
    """The same with other arrays in the place of its own."""
    if isinstance(value, np.ndarray):
        return arrays[name]
    inside = {key: with_arrays(inner, arrays, (*name, key)) for key, inner in _inside(value).items()}
    if isinstance(value, list):
        return [*inside.values()]
    if isinstance(value, dict):
        return inside
    return replace(value, **inside) if is_dataclass(value) else value  # type: ignore[type-var]


def _inside(value: Any) -> dict[Any, Any]:
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else vars(value) if is_dataclass(value) else {}


@dataclass(frozen=True)
class Mapped:
    """Parts behind one another in a file: of each array in `none`, a part without users, it has so many elements from a byte on."""

    path: str
    none: Part
    spans: dict[Name, tuple[int, int]]

    def open(self) -> Part:
        """All of them as one; its arrays are the file, read-only."""
        with open(self.path, "rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # A step's requests lie all over it: Linux would read twenty times as much around them.
        whole.madvise(mmap.MADV_RANDOM)
        spans = {name: (values.dtype, *self.spans[name]) for name, values in arrays_in(self.none)}
        arrays = {name: np.ndarray(size, dtype, whole, start) for name, (dtype, start, size) in spans.items()}
        part = with_arrays(self.none, arrays)
        return replace(part, requests=[of_split.without_raw_ids() for of_split in part.requests])


def num_bytes(part: Part) -> dict[Name, int]:
    """What each array of a part takes."""
    return {name: values.nbytes for name, values in arrays_in(part)}


def write_parts(
    file: BinaryIO, none: Part, room: Mapping[Name, int], parts: Iterable[Part]
) -> dict[Name, tuple[int, int]]:
    """Writes parts behind one another and gives the `spans` of their arrays, for each of which there is `room` in the file."""
    starts = _starts(room)
    ends, before = dict(starts), np.zeros(2 + len(none.requests), np.int64)
    dtypes = {name: values.dtype for name, values in arrays_in(none)}

    def write(part: Part) -> None:
        for name, values in arrays_in(part):
            assert values.dtype == dtypes[name], (name, values.dtype, dtypes[name])
            file.seek(ends[name])
            ends[name] += file.write(values.data)
            assert ends[name] <= starts[name] + room[name], name

    write(none)  # the offsets' first one
    for part in parts:
        write(_behind(part, before.tolist()))
        candidates = [of_split.candidates.offsets_R1[-1] for of_split in part.requests]
        before += [len(part.histories), len(part.histories.event_ts_E), *candidates]
    file.flush()
    return {name: (start, (ends[name] - start) // dtypes[name].itemsize) for name, start in starts.items()}


def _starts(room: Mapping[Name, int]) -> dict[Name, int]:
    """The byte from which on each array has its room."""
    sizes = [-(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES for size in room.values()]
    return dict(zip(room, accumulate(sizes[:-1], initial=0), strict=True))


def _behind(part: Part, before: list[int]) -> Part:
    """A part with rows and offsets as they are behind so many users, events and candidates of each split; only its own offsets."""
    num_users, num_events, *num_candidates = before
    histories = replace(part.histories, offsets_B1=part.histories.offsets_B1[1:] + num_events)
    requests = []
    for of_split, number in zip(part.requests, num_candidates, strict=True):
        candidates = replace(of_split.candidates, offsets_R1=of_split.candidates.offsets_R1[1:] + number)
        requests.append(replace(of_split, candidates=candidates))
    return Part(histories, requests, [row_R + num_users for row_R in part.rows])


@dataclass(frozen=True)
class ReadParts:
    """Parts in Ray's memory, in order, and the room that they need in a file in `folder`; null: Ray's own folder."""

    parts: list[ray.ObjectRef]
    none: Part
    room: dict[Name, int]
    folder: str | None

    @property
    def num_bytes(self) -> int:
        return sum(self.room.values()) + _ALIGNED_BYTES * len(self.room)

    def in_turn(self) -> Iterator[Part]:
        """One part after the other, while the next is on its way to this node."""
        for number, this in enumerate(self.parts):
            ray.wait(self.parts[number + 1 : number + 2] or [this], timeout=0)
            yield ray.get(this)

    def file(self) -> BinaryIO:
        """A file without a name that has all the room; a UserError if there is none."""
        folder = self.folder or ray.get_runtime_context().get_temp_dir()
        try:
            os.makedirs(folder, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"ray.scratch={folder}: {error.strerror}: name a folder that every node can write to"
            ) from None
        try:
            os.posix_fallocate(file.fileno(), 0, self.num_bytes)
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            disk = os.statvfs(folder)
            raise UserError(
                f"{folder} on {os.uname().nodename}: requests and histories take {self.num_bytes:,} bytes there while they are "
                f"trained, {disk.f_bavail * disk.f_frsize:,} are free: make room, or name a folder of a larger disk by ray.scratch"
            ) from None
        return file

    def laid_out(self) -> tuple[BinaryIO, Mapped]:
        """The file with all parts in it, which is there as long as it is open here, and how any process of this node opens it."""
        file = self.file()
        spans = write_parts(file, self.none, self.room, self.in_turn())
        return file, Mapped(f"/proc/{os.getpid()}/fd/{file.fileno()}", self.none, spans)


@dataclass(frozen=True)
class RequestFiles:
    """A run's requests, for the workers of any node."""

    read: ReadParts
    keepers: Any

    def open(self) -> Part:
        """The requests as this node's file has them, which is written if it is not there."""
        keeper = ray.get(self.keepers.on.remote(ray.get_runtime_context().get_node_id()))
        mapped: Mapped = ray.get(keeper.told.remote(self.read.laid_out))
        return mapped.open()
