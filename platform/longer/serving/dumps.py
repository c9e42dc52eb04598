"""States of replicas that have stopped, for those that run: safetensors and JSON in a folder, local or S3. No Ray, no HTTP.

    FOLDER/REPLICA/states-00000.safetensors   states (`kept_states`), the hottest in the first files
    FOLDER/REPLICA/_DUMP.json                 written last: what they are states of, and each file's users, size and checksum
    FOLDER/forgotten/USER_KEY.json            a user whose states no dump may bring back

A dump without its JSON is unfinished, and one whose files are not as it says is torn; both are left alone, told once and counted,
and so is a dump of another model, schema, encoding or precision. Nothing in a dump is trusted beyond that: a state that disagrees
with the user's history is found out by its fingerprint when it is asked for (`resolver`).

A forgotten user stays out of every dump that had begun by then; their bytes go with the dump, which is removed when a replica that
started after it writes its own.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from longer.model.pool import StateLayout
from longer.serving.cache import StateVersion
from longer.serving.kept_states import KeptState, pack, unpack
from longer.serving.store import HeldState, StateStore
from longer.storage import file_sizes, read_bytes, remove_tree, write_bytes

DUMP_FORMAT = 2
"""Raise it when a slot's or a file's content changes."""

_FILE_BYTES = 16 << 20
"""Of states in a file: what a replica reads and takes in at once, between two batches of requests."""

_NUM_WRITERS, _WRITES_AHEAD = 4, 8
_DUMP, _FORGOTTEN = "_DUMP.json", "forgotten"
_CLOCK_SKEW_S = 3600.0
_logger = logging.getLogger("ray.serve")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    num_bytes: int
    sha256: str
    user_ids: list[int | str]


class _Manifest(BaseModel):
    """What a dump is of. `began_s` is when its replica stopped answering, by its clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    version: StateVersion
    layout: dict[str, Any]
    began_s: float
    tables: list[str]
    files: list[_File]


@dataclass
class DumpCounters:
    """Since the start: states written, and taken in; dumps left alone for what they are of, and for what is missing of them."""

    dumped: int = 0
    restored: int = 0
    disagreeing: int = 0
    torn: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class StateDumps:
    """The dumps under one folder, which belongs to one service; `replica` names this one's own."""

    def __init__(self, folder: str, replica: str) -> None:
        self._folder, self._replica = folder.rstrip("/"), replica
        self._started_s = time.time()
        self._there_before: frozenset[str] | None = None
        self._told: set[tuple[str, StateVersion]] = set()
        self.counters = DumpCounters()

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, store: StateStore, version: StateVersion, within_s: float) -> int:
        """Dumps this version's states, the hottest first, as far as the time and the next host tier go; how many.

        Dumps from before this replica's start go: whoever wanted their states has had them since.
        """
        began_s, deadline_s = time.time(), time.monotonic() + within_s
        tables = list[str]()
        pool = ThreadPoolExecutor(_NUM_WRITERS)
        writes: list[Future[_File]] = []
        for number, chunk in enumerate(_chunks(store, version)):
            arrays, user_ids = pack(chunk, tables), [held.entry.user_id for held, _, _ in chunk]
            writes.append(pool.submit(self._write_file, f"states-{number:05d}.safetensors", arrays, user_ids))
            wait(writes[:-_WRITES_AHEAD], timeout=max(0.0, deadline_s - time.monotonic()))
            if time.monotonic() >= deadline_s:
                break
        wait(writes, timeout=max(0.0, deadline_s - time.monotonic()))
        pool.shutdown(wait=False, cancel_futures=True)
        files = [write.result() for write in writes if write.done() and not write.exception()]
        if len(files) < len(writes):
            _logger.error(
                "state dump: %d of %d files could not be written in time", len(writes) - len(files), len(writes)
            )
        if not files:
            return 0
        manifest = _Manifest(
            format=DUMP_FORMAT,
            version=version,
            layout=_layout(store.layout),
            began_s=began_s,
            tables=tables,
            files=files,
        )
        write_bytes(f"{self._own}/{_DUMP}", manifest.model_dump_json().encode())
        self.counters.dumped += (num_states := sum(len(file.user_ids) for file in files))
        self._remove_old()
        return num_states

    @property
    def _own(self) -> str:
        return f"{self._folder}/{self._replica}"

    def _write_file(self, name: str, arrays: dict[str, Any], user_ids: list[Any]) -> _File:
        data = safetensors.numpy.save(arrays)
        write_bytes(f"{self._own}/{name}", data)
        return _File(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), user_ids=user_ids)

    def _remove_old(self) -> None:
        """Dumps that were there when this replica started, and marks of users whom no dump can hold any more."""
        there, began_s, old = self._listed(), [time.time()], []
        for name, sizes in there.dumps.items():
            dump = self._read(name, sizes)
            if dump.began_s < self._started_s and (dump.manifest or name in (self._there_before or ())):
                old.append(f"{self._folder}/{name}")
            elif dump.manifest:
                began_s.append(dump.began_s)
        for path in old + [self._mark(key) for key in there.forgotten]:
            with suppress(FileNotFoundError):  # others stop at the same time
                if path in old or self._forgotten_s(path) < min(began_s) - _CLOCK_SKEW_S:
                    remove_tree(path)

    # -- reading ------------------------------------------------------------------------------------------------------

    def names(self) -> frozenset[str]:
        """The dumps that are there and whole as far as their JSON says."""
        there = self._listed()
        whole = frozenset(name for name, sizes in there.dumps.items() if _DUMP in sizes and name != self._replica)
        if self._there_before is None:
            self._there_before = frozenset(there.dumps) - {self._replica}
        return whole

    def states(
        self, version: StateVersion, layout: StateLayout, is_wanted: Callable[[str, int | str], bool]
    ) -> Iterator[list[KeptState]]:
        """States that are wanted by dump and user, a file's at a time, the last dump and in it the hottest first; of no forgotten
        user."""
        there = self._listed()
        forgotten_s = dict[int, float]()
        for user_key in there.forgotten:
            with suppress(FileNotFoundError):  # with it went the dumps that it was of
                forgotten_s[user_key] = self._forgotten_s(self._mark(user_key))
        dumps = [self._read(name, sizes) for name, sizes in there.dumps.items() if name != self._replica]
        for dump in sorted(dumps, key=lambda dump: -dump.began_s):
            if not self._is_usable(dump, version, layout):
                continue
            assert dump.manifest
            gone = {key for key, since_s in forgotten_s.items() if since_s > dump.began_s - _CLOCK_SKEW_S}
            for file in dump.manifest.files:
                wanted = {user_id for user_id in file.user_ids if is_wanted(dump.name, user_id)}
                if wanted:
                    found = self._states_of(dump, file)
                    yield [state for state in found if state.user_id in wanted and state.user_key not in gone]

    def _is_usable(self, dump: "_Dump", version: StateVersion, layout: StateLayout) -> bool:
        if dump.manifest is None:
            self._leave(dump.name, version, "torn", dump.problem)
            return False
        of = dump.manifest.format, dump.manifest.version, dump.manifest.layout
        if of != (DUMP_FORMAT, version, _layout(layout)):
            self._leave(dump.name, version, "disagreeing", "of another model, schema, encoding, precision or format")
            return False
        return True

    def _states_of(self, dump: "_Dump", file: _File) -> list[KeptState]:
        assert dump.manifest
        try:
            data = read_bytes(f"{self._folder}/{dump.name}/{file.path}")
        except FileNotFoundError:  # a successor has just removed the dump
            return []
        if hashlib.sha256(data).hexdigest() != file.sha256:
            self._leave(dump.name, dump.manifest.version, "torn", f"{file.path} is not what it was")
            return []
        return list(unpack(safetensors.numpy.load(data), file.user_ids, dump.manifest.tables))

    def _leave(self, name: str, version: StateVersion, what: str, why: str) -> None:
        """One line and one count for each dump and model that asks for it."""
        if (name, version) in self._told:
            return
        self._told.add((name, version))
        setattr(self.counters, what, getattr(self.counters, what) + 1)
        _logger.warning("state dump %s/%s is left alone: %s", self._folder, name, why)

    def _listed(self) -> "_Listing":
        dumps: dict[str, dict[str, int]] = {}
        forgotten = []
        for path, num_bytes in file_sizes(self._folder).items():
            name, _, file = path.partition("/")
            if name == _FORGOTTEN:
                forgotten += [int(file.removesuffix(".json"))] if file.endswith(".json") else []
            elif file:
                dumps.setdefault(name, {})[file] = num_bytes
        return _Listing(dumps, forgotten)

    def _read(self, name: str, sizes: dict[str, int]) -> "_Dump":
        try:
            manifest = _Manifest.model_validate_json(read_bytes(f"{self._folder}/{name}/{_DUMP}"))
        except FileNotFoundError:
            return _Dump(name, None, f"unfinished, without {_DUMP}")
        except ValidationError:
            return _Dump(name, None, f"{_DUMP} cannot be read")
        missing = [file.path for file in manifest.files if sizes.get(file.path) != file.num_bytes]
        return _Dump(name, None, f"{missing[0]} is missing or cut") if missing else _Dump(name, manifest)

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, user_key: int) -> None:
        """No dump that has begun by now brings the user back."""
        write_bytes(self._mark(user_key), json.dumps({"forgotten_s": time.time()}).encode())

    def forgotten(self) -> frozenset[int]:
        """Keys of the users who are marked now."""
        return frozenset(self._listed().forgotten)

    @staticmethod
    def _forgotten_s(mark: str) -> float:
        return json.loads(read_bytes(mark))["forgotten_s"]

    def _mark(self, user_key: int) -> str:
        return f"{self._folder}/{_FORGOTTEN}/{user_key}.json"


@dataclass(frozen=True)
class _Listing:
    """The files of each dump with their sizes, and the keys of forgotten users."""

    dumps: dict[str, dict[str, int]]
    forgotten: list[int]


@dataclass(frozen=True)
class _Dump:
    name: str
    manifest: _Manifest | None
    problem: str = ""

    @property
    def began_s(self) -> float:
        return self.manifest.began_s if self.manifest else 0.0


def _layout(layout: StateLayout) -> dict[str, Any]:
    """What decides how the words of a slot are read, as JSON."""
    return asdict(layout)


def _chunks(store: StateStore, version: StateVersion) -> Iterator[list[tuple[HeldState, bool, torch.Tensor]]]:
    """States with their words in runs of about `_FILE_BYTES`, the hottest first, as many as a host tier takes."""
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
