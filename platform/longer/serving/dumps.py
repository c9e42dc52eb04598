"""What replicas that have stopped knew, for those that run, in a folder, local or S3: states, and events sent online, which nobody
else has before the table does. No Ray, no HTTP.

    FOLDER/REPLICA/events.parquet             all events sent online (`OnlineEvents.all`), of any model
    FOLDER/REPLICA/states-00000.safetensors   states (`kept_states`), the hottest in the first files
    FOLDER/REPLICA/_DUMP.json                 written last: what they are states of, and each file's users, size and checksum
    FOLDER/forgotten/USER_KEY.json            a user of whom no dump may bring anything back (`forgotten`)

A dump without its JSON is unfinished, and one whose files are not as it says is torn; both are left alone, told once and counted.
So are the states of another model, schema, encoding or precision, and the events of another schema. Nothing in a dump is trusted
beyond that: a state that disagrees with the user's history is found out by its fingerprint when it is asked for (`resolver`). One
that was true is so where the very events that go with it are known (`KeptState.knows_events`), and needs no look at the table.

A forgotten user stays out of every dump that had begun by then; their bytes go with the dump, which is removed when a replica that
started after it writes its own.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass

import pyarrow as pa
from pydantic import ValidationError

from longer.model.pool import StateLayout
from longer.serving.cache import StateVersion
from longer.serving.dump_files import (
    DUMP_FORMAT,
    Content,
    Dump,
    DumpFile,
    Manifest,
    events_content,
    events_in,
    layout_of,
    states_contents,
    states_in,
)
from longer.serving.forgotten import FORGOTTEN, ForgottenUsers, may_hold
from longer.serving.kept_states import KeptState
from longer.serving.online import OnlineEvents
from longer.serving.store import StateStore
from longer.storage import file_sizes, read_bytes, remove_tree, write_bytes

_NUM_WRITERS, _WRITES_AHEAD = 4, 8
_DUMP, _EVENTS = "_DUMP.json", "events.parquet"
_logger = logging.getLogger("ray.serve")


@dataclass
class DumpCounters:
    """Since the start: states written, and users whose online events were; states taken in; dumps left alone for what they are of,
    and for what is missing of them."""

    dumped: int = 0
    dumped_event_users: int = 0
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
        self.counters, self.forgotten = DumpCounters(), ForgottenUsers(self._folder)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, store: StateStore, online: OnlineEvents, version: StateVersion, within_s: float) -> int:
        """Dumps all online events, and this version's states, the hottest first, as far as the time and the next host tier go; how
        many states.

        Dumps from before this replica's start go: whoever wanted what they hold has had it since.
        """
        began_s, deadline_s = time.time(), time.monotonic() + within_s
        tables, pool = list[str](), ThreadPoolExecutor(_NUM_WRITERS)
        writes = [pool.submit(self._write_file, _EVENTS, events_content(online))] if len(online) else []
        for number, content in enumerate(states_contents(store, online, version, tables)):
            writes.append(pool.submit(self._write_file, f"states-{number:05d}.safetensors", content))
            wait(writes[:-_WRITES_AHEAD], timeout=max(0.0, deadline_s - time.monotonic()))
            if time.monotonic() >= deadline_s:
                break
        wait(writes, timeout=max(0.0, deadline_s - time.monotonic()))
        pool.shutdown(wait=False, cancel_futures=True)
        files = [write.result() for write in writes if write.done() and not write.exception()]
        if len(files) < len(writes):
            num_missing = len(writes) - len(files)
            _logger.error("state dump: %d of %d files could not be written in time", num_missing, len(writes))
        if not files:
            return 0
        has_events = files[0].path == _EVENTS
        manifest = Manifest(
            format=DUMP_FORMAT,
            version=version,
            layout=layout_of(store.layout),
            began_s=began_s,
            tables=tables,
            events=files.pop(0) if has_events else None,
            states=files,
        )
        write_bytes(f"{self._own}/{_DUMP}", manifest.model_dump_json().encode())
        self.counters.dumped += (num_states := sum(len(file.user_ids) for file in files))
        self.counters.dumped_event_users += len(manifest.events.user_ids) if manifest.events else 0
        self._remove_old()
        return num_states

    @property
    def _own(self) -> str:
        return f"{self._folder}/{self._replica}"

    def _write_file(self, name: str, content: Content) -> DumpFile:
        as_bytes, user_ids = content
        data = as_bytes()
        write_bytes(f"{self._own}/{name}", data)
        return DumpFile(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), user_ids=user_ids)

    def _remove_old(self) -> None:
        """Dumps that were there when this replica started, and marks of users whom no dump can hold any more."""
        first_s = time.time()
        for name, sizes in self._listed().items():
            dump = self._read(name, sizes)
            if dump.began_s < self._started_s and (dump.manifest or name in (self._there_before or ())):
                with suppress(FileNotFoundError):  # others stop at the same time
                    remove_tree(f"{self._folder}/{name}")
            elif dump.manifest:
                first_s = min(first_s, dump.began_s)
        self.forgotten.remove_before(first_s)

    # -- reading ------------------------------------------------------------------------------------------------------

    def names(self) -> frozenset[str]:
        """The dumps that are there and whole as far as their JSON says."""
        there = self._listed()
        whole = frozenset(name for name, sizes in there.items() if _DUMP in sizes and name != self._replica)
        if self._there_before is None:
            self._there_before = frozenset(there) - {self._replica}
        return whole

    def events(self, schema_hash: str, is_wanted: Callable[[int | str], bool]) -> Iterator[tuple[str, pa.Table]]:
        """By dump, the last one first, the online events (`OnlineEvents.all`) of users who are wanted, some users' at a time; of no
        forgotten user."""
        for dump, gone in self._last_first():
            of = dump.manifest
            if of and of.events and (of.format, of.version.schema_hash) == (DUMP_FORMAT, schema_hash):
                wanted = [user_id for user_id in of.events.user_ids if is_wanted(user_id)]
                if wanted and (data := self._bytes_of(dump.name, of, of.events)):
                    yield from ((dump.name, events) for events in events_in(data, wanted, gone))

    def states(
        self, version: StateVersion, layout: StateLayout, is_wanted: Callable[[str, int | str], bool]
    ) -> Iterator[tuple[str, list[KeptState]]]:
        """By dump, the last one first, states that are wanted by dump and user, a file's at a time, the hottest first; of no
        forgotten user."""
        for dump, gone in self._last_first():
            if not self._is_usable(dump, version, layout):
                continue
            assert dump.manifest
            for file in dump.manifest.states:
                wanted = {user_id for user_id in file.user_ids if is_wanted(dump.name, user_id)}
                if wanted and (data := self._bytes_of(dump.name, dump.manifest, file)):
                    yield dump.name, states_in(data, file, dump.manifest.tables, wanted, gone)

    def _last_first(self) -> list[tuple[Dump, set[int]]]:
        """The dumps of others, each with the keys of the users of whom it may bring nothing back."""
        forgotten_s = self.forgotten.times_s()
        dumps = [self._read(name, sizes) for name, sizes in self._listed().items() if name != self._replica]
        return [
            (dump, {key for key, since_s in forgotten_s.items() if may_hold(dump.began_s, since_s)})
            for dump in sorted(dumps, key=lambda dump: -dump.began_s)
        ]

    def _is_usable(self, dump: Dump, version: StateVersion, layout: StateLayout) -> bool:
        if dump.manifest is None:
            self._leave(dump.name, version, "torn", dump.problem)
            return False
        of = dump.manifest.format, dump.manifest.version, dump.manifest.layout
        if of != (DUMP_FORMAT, version, layout_of(layout)):
            self._leave(dump.name, version, "disagreeing", "of another model, schema, encoding, precision or format")
            return False
        return True

    def _bytes_of(self, name: str, manifest: Manifest, file: DumpFile) -> bytes | None:
        """None of a file that is not as the dump says."""
        try:
            data = read_bytes(f"{self._folder}/{name}/{file.path}")
        except FileNotFoundError:  # a successor has just removed the dump
            return None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            self._leave(name, manifest.version, "torn", f"{file.path} is not what it was")
            return None
        return data

    def _leave(self, name: str, version: StateVersion, what: str, why: str) -> None:
        """One line and one count for each dump and model that asks for it."""
        if (name, version) in self._told:
            return
        self._told.add((name, version))
        setattr(self.counters, what, getattr(self.counters, what) + 1)
        _logger.warning("state dump %s/%s is left alone: %s", self._folder, name, why)

    def _listed(self) -> dict[str, dict[str, int]]:
        """The files of each dump with their sizes."""
        dumps: dict[str, dict[str, int]] = {}
        for path, num_bytes in file_sizes(self._folder).items():
            name, _, file = path.partition("/")
            if file and name != FORGOTTEN:
                dumps.setdefault(name, {})[file] = num_bytes
        return dumps

    def _read(self, name: str, sizes: dict[str, int]) -> Dump:
        try:
            manifest = Manifest.model_validate_json(read_bytes(f"{self._folder}/{name}/{_DUMP}"))
        except FileNotFoundError:
            return Dump(name, None, f"unfinished, without {_DUMP}")
        except ValidationError:
            return Dump(name, None, f"{_DUMP} cannot be read")
        files = manifest.states + ([manifest.events] if manifest.events else [])
        missing = [file.path for file in files if sizes.get(file.path) != file.num_bytes]
        return Dump(name, None, f"{missing[0]} is missing or cut") if missing else Dump(name, manifest)
