"""What an importer is: where a log's files are, and how one of them is read."""

import fnmatch
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
from fsspec import AbstractFileSystem

from longer.datasets.readers import boundaries
from longer.errors import UserError
from longer.files import checksum, filesystem
from longer.progress import say
from longer.table_settings import TimeUnit

_NUM_THREADS = 16
_NUM_NAMED = 5
_STRETCH_BYTES = 256 << 20
"""What one task reads at most, in bytes on disk. Part of what decides the names of the files written."""


@dataclass(frozen=True)
class Part:
    """A file of a log, or a stretch of a large one: what one task reads in bounded memory."""

    path: str
    name: str
    """The path below the source."""
    content_id: str
    """Of the whole file: equal for equal bytes. SHA-256 on a local disk; ETag and size on S3, where nothing is read for it."""
    num_bytes: int
    joined: tuple["Part", ...] = ()
    """Small files that each row is joined with."""
    number: int = 0
    """Which stretch of the file."""
    start: int = 0
    """First row group of a Parquet file, or byte of a text file."""
    stop: int | None = None
    """The end of the stretch; None: the file's."""


class Source(Protocol):
    """An importer: a module of this package, or an object with the same three members."""

    @property
    def PROVENANCE(self) -> str:
        """Who made the log, under which licence, in a sentence or two."""

    @property
    def TIME_UNIT(self) -> TimeUnit:
        """Of times that are numbers."""

    def locate(self, source: str) -> list[Part]:
        """The log's parts, always in the same order. Raises UserError if there are none."""

    def read(self, part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
        """The part's rows in bounded batches, those of the columns `names` that the log has, under these names.

        A batch may have a column `reason`: not null where the reader could not take the row apart. Raises FileError.
        """


def log_parts(
    source: str, patterns: Sequence[str], joined: Sequence[Part] = (), section: str | None = None
) -> list[Part]:
    """The files under the folder or glob `source` whose name matches a pattern, large ones in stretches."""
    files = [replace(file, joined=tuple(joined)) for file in find_files(source, patterns, section)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [part for parts in pool.map(_stretches, files) for part in parts]


def find_files(source: str, patterns: Sequence[str], section: str | None = None) -> list[Part]:
    """The same files whole, sorted by path; hidden ones, and those that start with '_', are not part of a log.

    A line of `section`, a job's, tells which were left out for their names; none where a reader knows its files.
    """
    fs, bare = filesystem(source.rstrip("/"))
    if any(sign in source for sign in "*?["):
        found = {path: info for path, info in fs.glob(bare, detail=True).items() if info["type"] == "file"}
        folder = bare[: min(bare.index(sign) for sign in "*?[" if sign in bare)].rpartition("/")[0]
    elif info := _file_info(fs, bare):
        found, folder = {bare: info}, bare.rpartition("/")[0]
    else:
        found, folder = fs.find(bare, detail=True), bare
    names = {path: path.removeprefix(folder).lstrip("/") for path in found}
    visible = [path for path, name in names.items() if not any(step.startswith((".", "_")) for step in name.split("/"))]
    chosen = [
        path for path in visible if any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)
    ]
    left_out = sorted(names[path] for path in set(visible).difference(chosen))
    if section and left_out:
        named = ", ".join(left_out[:_NUM_NAMED] + ["..."] * (len(left_out) > _NUM_NAMED))
        say(section, f"left out, for the ending of their names: {len(left_out)} files ({named})")
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda path: _part(source, path, names[path], found[path]), sorted(chosen)))


def _file_info(fs: AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """None where no file is; unlike `isfile`, a store that fails is not taken for that."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return info if info["type"] == "file" else None


def require_files(source: str, *names: str) -> list[Part]:
    """The files of these names in the folder `source`; a UserError names the first that is missing."""
    folder = source.rstrip("/")
    fs, bare = filesystem(folder)
    parts = []
    for name in names:
        try:
            parts.append(_part(source, f"{bare}/{name}", name, fs.info(f"{bare}/{name}")))
        except FileNotFoundError:
            raise UserError(
                f"import_events.source: {folder}/{name}: no such file; the folder must hold {' and '.join(names)}"
            ) from None
    return parts


def require_parts(source: str, parts: list[Part], wanted: str, section: str = "import_events") -> list[Part]:
    """The parts, of which there must be one at least."""
    if not parts:
        raise UserError(f"{section}.source: {source}: no log there: it must hold {wanted}")
    return parts


def _part(source: str, path: str, name: str, info: dict[str, Any]) -> Part:
    if source.startswith("s3://"):
        content_id = f"etag:{info['ETag'].strip(chr(34))}-{info['size']}"
        return Part(f"s3://{path}", name, content_id, info["size"])
    return Part(path, name, f"sha256:{checksum(path)}", info["size"])


def _stretches(file: Part) -> list[Part]:
    edges = boundaries(file.path, file.num_bytes, _STRETCH_BYTES)
    spans = zip([0, *edges], [*edges, None], strict=True)
    share = file.num_bytes // (len(edges) + 1)
    return [replace(file, number=n, start=a, stop=b, num_bytes=share) for n, (a, b) in enumerate(spans)]
