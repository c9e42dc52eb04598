"""Tables: folders of immutable versions, on a disk or on S3.

    TABLE/<version>/...parquet        data
    TABLE/<version>/_MANIFEST.json    written after the data: a version without it does not exist
    TABLE/_CURRENT.json               written last: which version is served
    .TABLE.lock                       beside it on a disk: locked by the process that writes versions

A version id is the fingerprint of everything that decides its content, so a finished job that runs again finds its version.
"""

import fcntl
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import IO, Any

from longer.errors import UserError
from longer.files import checksum, file_sizes, make_parents, output, read_bytes, remove_tree, write_bytes

TABLE_FORMAT = 3
"""Part of every version id. Raise it when a job writes other bytes for the same input and settings."""

_MANIFEST = "_MANIFEST.json"
_CURRENT = "_CURRENT.json"
_held_locks: dict[str, IO[str]] = {}
"""By table, to the end of the process: closing any handle of the file would give up the lock."""


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that depend on the JSON form of `parts` only, dictionary order aside."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class DataFile:
    """One data file of a version; `path` is relative to the folder of the version that wrote it.

    `version` names that one where it is an earlier version: what did not change is shared, never copied.
    """

    path: str
    num_bytes: int
    sha256: str
    version: str = ""


@dataclass(frozen=True)
class Version:
    """A published version of a table; it never changes."""

    id: str
    path: str
    manifest: dict[str, Any]

    def files(self, prefix: str = "") -> list[str]:
        """Full paths of the data files whose path in the version starts with `prefix`, sorted."""
        return [self.path_of(file) for file in self.data_files() if file.path.startswith(prefix)]

    def data_files(self) -> list[DataFile]:
        """The same files with their sizes and checksums, as another version shares them."""
        return [DataFile(**file) for file in self.manifest["files"]]

    @property
    def table_path(self) -> str:
        return self.path.rpartition("/")[0]

    def path_of(self, file: DataFile) -> str:
        """Full path of one of the data files, whichever version wrote it."""
        return f"{self.table_path}/{file.version}/{file.path}"

    def is_whole(self) -> bool:
        """Whether every file that the manifest lists is there, at its size."""
        files = self.data_files()
        sizes = {version: file_sizes(f"{self.table_path}/{version}") for version in {file.version for file in files}}
        return all(sizes[file.version].get(file.path) == file.num_bytes for file in files)


def manifest_of(path: str) -> dict[str, Any] | None:
    """Of a version, by its folder; None if it is no published one."""
    try:
        return _read_json(f"{path}/{_MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return None


class Table:
    """A folder of immutable versions; a version appears whole or not at all, and a crash leaves the last one served."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self._opened = time.perf_counter()

    def current(self) -> Version | None:
        """The version that is served, if any."""
        try:
            pointer = _read_json(f"{self.path}/{_CURRENT}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self.find(pointer["version"])

    def require(self, job: str) -> Version:
        """The version that is served; a UserError names the table and the job that makes it."""
        version = self.current()
        if version is None:
            raise UserError(
                f"{self.path}: no published version of this table: run `python -m {job}` first, with the same --config and --root"
            )
        return version

    def find(self, version_id: str) -> Version | None:
        """A published version by id, served or not; one of another table format is none, so that its job builds it anew."""
        path = f"{self.path}/{version_id}"
        manifest = manifest_of(path)
        return Version(version_id, path, manifest) if manifest and manifest["table_format"] == TABLE_FORMAT else None

    def reuse(self, version_id: str) -> Version | None:
        """A published version by id, now the one that is served; None too if some of its files are gone, so that it is rebuilt."""
        version = self.find(version_id)
        if version is None or not version.is_whole():
            return None
        self._serve(version_id)
        return version

    def claim(self) -> None:
        """Makes this process the table's only writer until it ends; UserError if another process is, on any machine of those that
        mount the disk. S3 has no such locks, nor has NFS that is mounted with local ones.

        The lock lies beside the table and is never removed: it outlives whatever is removed there.
        """
        if self.path.startswith("s3://") or self.path in _held_locks:
            return
        folder, name = os.path.split(os.path.realpath(self.path))
        _make_folder(folder)
        try:
            lock = open(f"{folder}/.{name}.lock", "a")  # noqa: SIM115  (held to the end)
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing this table: wait for it, then run again") from None
        except OSError as error:
            raise UserError(
                f"{folder}/.{name}.lock: cannot be locked ({error.strerror}): choose another --root, or mount the disk with locks"
            ) from None
        _held_locks[self.path] = lock

    def clear(self) -> None:
        """Removes all versions, as the table's only writer."""
        self.claim()
        remove_tree(self.path)

    def begin(self, version_id: str) -> str:
        """The folder to write a version's data into, empty: what an unfinished attempt left there is removed.

        Raises UserError as `claim` does, or if another run has published the version since this one looked.
        """
        self._claim_unpublished(version_id)
        self.discard(version_id)
        return f"{self.path}/{version_id}"

    def resume(self, version_id: str) -> str:
        """As `begin`, but with the files that an unfinished or damaged version left; it is no version until published."""
        if self._claim_unpublished(version_id):  # else another run may have published it meanwhile, on S3
            self._unpublish(version_id)
        return f"{self.path}/{version_id}"

    def sweep(self, but: str, *marks: str) -> None:
        """Removes what killed builds left of unpublished versions, `but` one and those that have a file of a name in `marks`.

        On S3, where no lock tells whose it is, it stays.
        """
        self.claim()
        if not self.path.startswith("s3://"):
            for folder in glob.glob(f"{glob.escape(self.path)}/*/"):
                # a version has the first, a table inside this one the second
                is_kept = any(os.path.exists(folder + name) for name in (_MANIFEST, _CURRENT, *marks))
                if os.path.basename(folder[:-1]) != but and not is_kept:
                    remove_tree(folder[:-1])

    def _claim_unpublished(self, version_id: str) -> Version | None:
        """The version that is published and damaged, if it is."""
        self.claim()
        if not self.path.startswith("s3://"):
            _make_folder(self.path)
        published = self.find(version_id)
        if published and published.is_whole():
            raise UserError(f"{self.path}: another run has just published version {version_id}: run again to use it")
        return published

    def discard(self, version_id: str) -> None:
        """Removes what a failed attempt has written."""
        self._unpublish(version_id)  # first, so that the version is never there with half its files
        remove_tree(f"{self.path}/{version_id}")

    def _unpublish(self, version_id: str) -> None:
        remove_tree(f"{self.path}/{version_id}/{_MANIFEST}")

    def publish(self, version_id: str, manifest: dict[str, Any], files: Sequence[DataFile] | None = None) -> Version:
        """Makes the data under `begin(version_id)` a version and serves it: manifest first, then the pointer.

        `files` come from `checked_output`, or from an earlier version that shares them; without, the data is read back.
        """
        path = f"{self.path}/{version_id}"
        found = _read_back(path) if files is None else files
        own = (replace(file, version=file.version or version_id) for file in found)
        listed = sorted(own, key=lambda file: (file.path, file.version))
        full = {
            "version": version_id,
            "table_format": TABLE_FORMAT,
            "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._opened, 2),  # of the job, which opens the table as it starts
            **manifest,
            "num_bytes": sum(file.num_bytes for file in listed),
            "files": [asdict(file) for file in listed],
        }
        write_bytes(f"{path}/{_MANIFEST}", json.dumps(full, indent=1).encode())
        self._serve(version_id)
        return Version(version_id, path, full)

    def _serve(self, version_id: str) -> None:
        write_bytes(f"{self.path}/{_CURRENT}", json.dumps({"version": version_id}).encode())


class CheckedOutput:
    """A binary sink for pyarrow that counts and hashes what passes; `data_file` is its record once closed."""

    def __init__(self, sink: Any, path: str) -> None:
        self._sink, self._path = sink, path
        self._hash, self._num_bytes = hashlib.sha256(), 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._num_bytes += len(data)
        self._sink.write(data)
        return len(data)

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self.closed = True

    @property
    def data_file(self) -> DataFile:
        return DataFile(self._path, self._num_bytes, self._hash.hexdigest())


@contextmanager
def checked_output(version_path: str, file: str) -> Iterator[CheckedOutput]:
    """A sink for the data file `file` of the version at `version_path`; gives its size and checksum without reading it back."""
    make_parents(f"{version_path}/{file}")
    with output(f"{version_path}/{file}") as sink:
        yield CheckedOutput(sink, file)


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(read_bytes(path))
    except ValueError:
        raise UserError(f"{path}: damaged: remove this file, then run the table's job again") from None


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --root") from None


def _read_back(path: str) -> list[DataFile]:
    found = {file: size for file, size in file_sizes(path).items() if not file.endswith(_MANIFEST)}
    with ThreadPoolExecutor(8) as pool:
        checksums = pool.map(lambda file: checksum(f"{path}/{file}"), found)
    return [DataFile(file, size, sha256) for (file, size), sha256 in zip(found.items(), checksums, strict=True)]
