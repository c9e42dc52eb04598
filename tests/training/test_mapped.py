"""What workers map is, to an element, what was read; a node writes it once, and what is left half-written is found by nobody."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from longer.arrays import Candidates, Histories, Int64
from longer.data.batches import Requests
from longer.errors import UserError
from longer.training.content import Job, Tables
from longer.training.keepers import Keepers
from longer.training.loader import Part, concat_requests
from longer.training.mapped import Mapped, ReadParts, RequestFiles, num_bytes
from longer.training.reading import request_files
from tests.serving.tables import NUM_BUCKETS
from tests.training.test_reading import job, laid_out, same  # noqa: F401

_WITHIN_S = 60


def part_of(events: list[int], asked: list[list[tuple[int, int]]], rng: np.random.Generator) -> Part:
    """Users with so many events; requests of each of two splits, each with a user's number and how many candidates."""
    if not events:
        asked = [[], []]
    requests, rows = [], []
    for of_split in asked:
        row_R = np.array([user % len(events) for user, _ in of_split], np.int64)
        requests.append(requests_of(row_R, np.array([number for _, number in of_split], np.int64), rng))
        rows.append(row_R)
    size, num_users = sum(events), len(events)
    histories = Histories(
        user_key_B=rng.integers(-(2**63), 2**63, num_users),
        offsets_B1=np.append(0, np.cumsum(events, dtype=np.int64)),
        first_index_B=rng.integers(0, 9, num_users),
        prev_event_ts_B=rng.integers(0, 9, num_users),
        event_ts_E=rng.integers(0, 10**12, size),
        features={"item_id": rng.integers(-(2**63), 2**63, size), "price": rng.random(size, np.float32)},
    )
    return Part(histories, requests, rows)


def requests_of(row_R: Int64, length_R: Int64, rng: np.random.Generator) -> Requests:
    size, num_candidates = len(row_R), int(length_R.sum())
    requests = Requests(
        request_id_R=rng.integers(0, 2**62, size),
        user_id_R=pa.array([f"user {row}" for row in row_R], pa.string()),
        user_key_R=rng.integers(0, 2**62, size),
        request_ts_R=rng.integers(0, 2**62, size),
        history_end_R=rng.integers(0, 99, size),
        candidates=Candidates(
            np.append(0, np.cumsum(length_R)), {"offsets_R1": rng.integers(0, 2**62, num_candidates)}
        ),  # a name that stands for something else elsewhere
        item_id_C=pa.array(rng.integers(0, 9, num_candidates)),
        labels={"label": rng.random(num_candidates, np.float32)},
    )
    return requests.without_raw_ids()


def together(parts: list[Part]) -> Part:
    """The same in memory."""
    num_before = np.cumsum([0] + [len(part.histories) for part in parts])
    rows = [[row_R + n for row_R in part.rows] for part, n in zip(parts, num_before, strict=False)]
    return Part(
        Histories.concatenate([part.histories for part in parts]),
        [concat_requests(list(of_parts)) for of_parts in zip(*(part.requests for part in parts), strict=True)],
        [np.concatenate(of_parts) for of_parts in zip(*rows, strict=True)],
    )


_ASKED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6)
_PARTS = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.tuples(_ASKED, _ASKED)), min_size=1, max_size=5)


@given(_PARTS, st.integers(0, 2**32))
def test_what_is_mapped_is_what_was_read_whatever_parts_are_empty(
    tmp_path_factory: pytest.TempPathFactory, given_parts: list[Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parts = [part_of(events, list(asked), rng) for events, asked in given_parts]
    mapped = laid_out(parts, tmp_path_factory.getbasetemp())
    assert same(together(parts), mapped)
    with pytest.raises(ValueError, match="read-only"):
        mapped.histories.offsets_B1[:] = 1


def test_a_disk_without_room_is_told_with_the_bytes_that_are_needed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    part = part_of([3], [[(0, 2)], []], np.random.default_rng(0))
    read = ReadParts([], part.none(), num_bytes(part), str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"{tmp_path} on .* take {read.num_bytes:,} bytes .* by ray.scratch"):
        read.file()
    assert not [*tmp_path.iterdir()]


class Noted(ReadParts):
    """Notes each time that it is laid out."""

    def laid_out(self) -> tuple[BinaryIO, Mapped]:
        (Path(str(self.folder)).parent / f"by-{os.getpid()}").touch()
        return super().laid_out()


class KilledInTheMidst(ReadParts):
    """The first time, whoever lays it out is killed with a part in the file and others missing."""

    def in_turn(self) -> Iterator[Part]:
        flag = Path(str(self.folder)).parent / "killed"
        for part in super().in_turn():
            yield part
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(num_cpus=0)
def opened(files: RequestFiles) -> tuple[Part, str]:
    """A worker's requests, and the file that they lie in."""
    keeper = ray.get(files.keepers.on.remote(ray.get_runtime_context().get_node_id()))
    part = files.open()
    return part, ray.get(keeper.told.remote(files.read.laid_out)).path


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_workers_of_a_node_lay_out_once_and_later_ones_find_it_until_the_run_ends(job: Job, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "scratch").mkdir()
    with request_files(job) as files:
        noted = RequestFiles(Noted(**{**vars(files.read), "folder": str(tmp_path / "scratch")}), files.keepers)
        at_once = ray.get([opened.remote(noted) for _ in range(3)])
        later = ray.get(opened.remote(noted))
        assert len({path for _, path in [*at_once, later]}) == len([*tmp_path.glob("by-*")]) == 1
        whole = Tables.of(job).read(range(NUM_BUCKETS))
        assert all(same(whole, part) for part, _ in [*at_once, later])
        assert not [*(tmp_path / "scratch").iterdir()], "no kill can leave a file without a name behind"
        assert os.path.exists(later[1])
    ended = time.monotonic() + _WITHIN_S
    while os.path.exists(later[1]):
        assert time.monotonic() < ended, "the file is kept after the run"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_file_that_a_kill_has_left_half_written_is_read_by_nobody(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = [part_of([3, 0], [[(0, 2), (1, 1)], [(1, 3)]], rng) for _ in range(3)]
    room = {name: 3 * size for name, size in num_bytes(parts[0]).items()}
    (tmp_path / "scratch").mkdir()
    read = KilledInTheMidst([ray.put(part) for part in parts], parts[0].none(), room, str(tmp_path / "scratch"))
    keepers = Keepers.remote()  # type: ignore[attr-defined]
    again = RequestFiles(read, keepers).open()
    assert (tmp_path / "killed").exists()
    assert not [*(tmp_path / "scratch").iterdir()]
    assert same(together(parts), again)
    ray.kill(keepers)
