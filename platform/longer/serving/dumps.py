"""What replicas that have stopped knew, for those that run, in a folder, local or S3: states, and events sent online, which nobody
else has before the table does. No Ray, no HTTP.

    FOLDER/REPLICA/events.parquet             all events sent online (`OnlineEvents.all`), of any model
    FOLDER/REPLICA/states-00000.safetensors   states (`kept_states`), the hottest in the first files
    FOLDER/REPLICA/_DUMP.json                 written last: what they are states of, all users, and checksums of all files
    FOLDER/forgotten/USER_KEY-MILLISECONDS    a user of whom no dump may bring anything back (`forgotten`)

A dump without its JSON is unfinished, and what is not as its checksum says is torn; both are left alone, told once and counted. So
are the states of another model, schema, encoding or precision, and the events of another schema. A state that disagrees with the
user's history is found out by its fingerprint when it is asked for (`resolver`), unless it is of the table version that is read and
of the very events that go with it (`KeptState.knows_events`): then it needs no look at the table. So checksums find accidents;
whoever can write to the folder decides what is answered.

A forgotten user stays out of every dump that had begun by then; their bytes go with the dump. That is removed by a replica that
has taken in what was its own of it, and has known it as it is for so long that the others have too: their events are nowhere else.
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

from longer.files import file_sizes, read_bytes, remove_tree, write_bytes
from longer.model.state_layout import StateLayout
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
from longer.serving.forgotten import FORGOTTEN, ForgottenUsers, marked_s, may_hold
from longer.serving.kept_states import KeptState
from longer.serving.online import OnlineEvents
from longer.serving.store import StateStore

_NUM_WRITERS, _WRITES_AHEAD = 4, 8
_READ_BY_ALL_S = 600.0
"""By when all replicas have read a dump that no longer changes, or its replica will never write it to the end."""

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


@dataclass(frozen=True)
class Listing:
    """What lay in the folder at one moment: by dump of another replica, its files with their sizes; by key of a forgotten user,
    when that was."""

    dumps: dict[str, dict[str, int]]
    forgotten_s: dict[int, float]

    @property
    def names(self) -> frozenset[str]:
        """The dumps that are whole as far as their JSON says."""
        return frozenset(name for name, sizes in self.dumps.items() if _DUMP in sizes)


class StateDumps:
    """The dumps under one folder, which belongs to one service; `replica` names this one's own."""

    def __init__(self, folder: str, replica: str) -> None:
        self._folder, self._replica = folder.rstrip("/"), replica
        self._seen: dict[str, tuple[dict[str, int], float]] = {}
        self._done = Listing({}, {})
        self._told: set[tuple[str, StateVersion]] = set()
        self.counters, self.forgotten = DumpCounters(), ForgottenUsers(self._folder)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, store: StateStore, online: OnlineEvents, version: StateVersion, within_s: float) -> int:
        """Dumps all online events, and this version's states, the hottest first, as far as the time and the next host tier go; how
        many states."""
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
        done = (write for write in writes if write.done() and not write.cancelled())
        files = [write.result() for write in done if not write.exception()]
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
        write_bytes(f"{self._own}/{_DUMP}", manifest.sealed().model_dump_json().encode())
        self.counters.dumped += (num_states := sum(len(file.user_ids) for file in files))
        self.counters.dumped_event_users += len(manifest.events.user_ids) if manifest.events else 0
        return num_states

    @property
    def _own(self) -> str:
        return f"{self._folder}/{self._replica}"

    def _write_file(self, name: str, content: Content) -> DumpFile:
        as_bytes, user_ids = content
        data = as_bytes()
        write_bytes(f"{self._own}/{name}", data)
        return DumpFile(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), user_ids=user_ids)

    # -- reading ------------------------------------------------------------------------------------------------------

    def listed(self) -> Listing:
        """What is there now."""
        dumps: dict[str, dict[str, int]] = {}
        for path, num_bytes in file_sizes(self._folder).items():
            name, _, file = path.partition("/")
            if file and name != self._replica:
                dumps.setdefault(name, {})[file] = num_bytes
        listing = Listing(dumps, marked_s(dumps.pop(FORGOTTEN, {})))
        seen, now_s = self._seen, time.monotonic()
        self._seen = {
            name: seen[name] if name in seen and seen[name][0] == sizes else (sizes, now_s)
            for name, sizes in dumps.items()
        }
        return listing

    def done(self, listing: Listing) -> None:
        """Of all that was listed, this replica has what is its own: it needs none of it any more."""
        self._done = listing

    def remove_old(self, listing: Listing) -> None:
        """Removes dumps that all replicas have brought, and marks of users whom no dump can hold any more."""
        known_since_s = time.monotonic() - _READ_BY_ALL_S
        stay = dict[str, dict[str, int]]()
        for name, sizes in listing.dumps.items():
            if self._done.dumps.get(name) == sizes and self._seen[name][1] <= known_since_s:
                for path in (f"{name}/{_DUMP}", name):  # so that its JSON is never there with half of the files
                    with suppress(FileNotFoundError):  # others remove it at the same time
                        remove_tree(f"{self._folder}/{path}")
            else:
                stay[name] = sizes
        now_s = time.time()
        if all(may_hold(now_s, forgotten_s) for forgotten_s in listing.forgotten_s.values()):
            return  # all marks are too young to go
        began_s = [manifest.began_s for name in stay if (manifest := self._read(name, stay[name]).manifest)]
        self.forgotten.remove_before(min([now_s, *began_s]))

    def events(
        self, listing: Listing, schema_hash: str, is_wanted: Callable[[int | str], bool]
    ) -> Iterator[tuple[str, pa.Table]]:
        """By dump, the last one first, the online events (`OnlineEvents.all`) of users who are wanted, some users' at a time; of no
        forgotten user. A FileNotFoundError is of a dump that has gone, or is going: another listing tells."""
        for dump, gone in self._last_first(listing):
            of = dump.manifest
            if of and of.events and (of.format, of.version.schema_hash) == (DUMP_FORMAT, schema_hash):
                wanted = [user_id for user_id in of.events.user_ids if is_wanted(user_id)]
                if wanted and (data := self._bytes_of(dump, of, of.events)):
                    yield from ((dump.name, events) for events in events_in(data, wanted, gone))

    def states(
        self, listing: Listing, version: StateVersion, layout: StateLayout, is_wanted: Callable[[str, int | str], bool]
    ) -> Iterator[tuple[str, list[KeptState]]]:
        """By dump, the last one first, states that are wanted by dump and user, a file's at a time, the hottest first; of no
        forgotten user. A FileNotFoundError as of `events`."""
        for dump, gone in self._last_first(listing):
            if not self._is_usable(dump, version, layout):
                continue
            assert dump.manifest
            for file in dump.manifest.states:
                wanted = {user_id for user_id in file.user_ids if is_wanted(dump.name, user_id)}
                if wanted and (data := self._bytes_of(dump, dump.manifest, file)):
                    yield dump.name, states_in(data, file, dump.manifest.tables, wanted, gone)

    def _last_first(self, listing: Listing) -> list[tuple[Dump, set[int]]]:
        """The dumps of others, each with the keys of the users of whom it may bring nothing back."""
        dumps = [self._read(name, sizes) for name, sizes in listing.dumps.items()]
        return [
            (dump, {key for key, since_s in listing.forgotten_s.items() if may_hold(dump.began_s, since_s)})
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

    def _bytes_of(self, dump: Dump, manifest: Manifest, file: DumpFile) -> bytes | None:
        """None of a file that is not as the dump says."""
        if dump.sizes.get(file.path) != file.num_bytes:
            self._leave(dump.name, manifest.version, "torn", f"{file.path} is missing or cut")
            return None
        data = read_bytes(f"{self._folder}/{dump.name}/{file.path}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            self._leave(dump.name, manifest.version, "torn", f"{file.path} is not what it was")
            return None
        return data

    def _leave(self, name: str, version: StateVersion, what: str, why: str) -> None:
        """One line and one count for each dump and model that asks for it."""
        if (name, version) in self._told:
            return
        self._told.add((name, version))
        setattr(self.counters, what, getattr(self.counters, what) + 1)
        _logger.warning("state dump %s/%s is left alone: %s", self._folder, name, why)

    def _read(self, name: str, sizes: dict[str, int]) -> Dump:
        if _DUMP not in sizes:
            return Dump(name, sizes, None, f"unfinished, without {_DUMP}")
        try:
            manifest = Manifest.model_validate_json(read_bytes(f"{self._folder}/{name}/{_DUMP}"))
        except ValidationError:
            return Dump(name, sizes, None, f"{_DUMP} cannot be read")
        if manifest.format == DUMP_FORMAT and not manifest.is_as_sealed:
            return Dump(name, sizes, None, f"{_DUMP} is not what it was")
        return Dump(name, sizes, manifest)
