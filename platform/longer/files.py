"""Files of local paths and s3:// URLs alike: one resolver, small files written whole, files read at random.

S3 credentials, region and endpoint (AWS_ENDPOINT_URL) come from the usual environment variables.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from longer.errors import UserError


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a local path or s3:// URL, and the path on it. Listings are never stale."""
    if "://" in path and not path.startswith("s3://"):
        raise UserError(f"{path}: paths are local or start with s3://")
    if not path.startswith("s3://"):
        return fsspec.core.url_to_fs(path)
    from longer import s3

    return (fs := s3.connect()), fs._strip_protocol(path)


def arrow_filesystem(path: str) -> tuple[FileSystem, str]:
    """The Arrow filesystem of a local path or s3:// URL, and the path on it without the scheme."""
    fs, bare = filesystem(path)
    return (PyFileSystem(FSSpecHandler(fs)) if path.startswith("s3://") else LocalFileSystem()), bare


def exists(path: str) -> bool:
    fs, bare = filesystem(path)
    return fs.exists(bare)


def file_sizes(folder: str) -> dict[str, int]:
    """The size of each file below a folder, by its path in it; none if there is no such folder."""
    fs, bare = filesystem(folder)
    within = f"{bare}/"  # S3's listing of an empty folder names the folder if a file is written into it meanwhile
    found = fs.find(bare, detail=True).items()
    return {path.removeprefix(within): info["size"] for path, info in found if path.startswith(within)}


def read_bytes(path: str) -> bytes:
    fs, bare = filesystem(path)
    return fs.cat_file(bare)


def checksum(path: str) -> str:
    """SHA-256 of a file's content, in hex."""
    fs, bare = filesystem(path)
    with fs.open(bare, "rb", block_size=8 << 20) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_input(path: str, num_bytes: int, spans: Sequence[tuple[int, int]] = ()) -> pa.NativeFile:
    """A file of known size to read at random: on S3 each range is one request and nothing more, and opening is none.

    With `spans`, each from a byte to before another, only what lies in them can be read: on S3 one request each, side by side.
    """
    fs, bare = filesystem(path)
    if not path.startswith("s3://"):
        return LocalFileSystem().open_input_file(bare)
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    parts = fs.cat_ranges([bare] * len(spans), begins, ends)
    for part in parts:
        if isinstance(part, BaseException):
            raise part
    known = {"data": dict(zip(spans, parts, strict=True)), "strict": True}  # else what lies around them reads as zeros
    how = {"cache_type": "parts", "cache_options": known} if spans else {"cache_type": "none"}
    file = fs.open(bare, "rb", size=num_bytes, **how)
    file.details = {"name": bare, "size": num_bytes}  # else the first read asks for them
    return pa.PythonFile(file, mode="r")


def write_bytes(path: str, data: bytes) -> None:
    """Writes a small file whole or not at all, making its folder if needed."""
    fs, bare = filesystem(path)
    if path.startswith("s3://"):
        fs.pipe_file(bare, data)  # one PUT is atomic
        return
    os.makedirs(os.path.dirname(bare), exist_ok=True)
    temporary = f"{os.path.dirname(bare)}/.tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, bare)
    except BaseException:
        with suppress(FileNotFoundError):  # it may not have come to be
            os.unlink(temporary)
        raise


@contextmanager
def output(path: str) -> Iterator[Any]:
    """A file to write bytes to. On S3 it is there only if nothing goes wrong: closing it would end the upload of a part of it."""
    fs, bare = filesystem(path)
    if not path.startswith("s3://"):
        with LocalFileSystem().open_output_stream(bare, buffer_size=1 << 20) as sink:
            yield sink
        return
    file = fs.open(bare, "wb")
    try:
        yield file
    except BaseException:
        file.closed = True  # first: the upload must not be ended if it cannot be aborted
        file.discard()
        raise
    file.close()


def make_parents(path: str) -> None:
    """Makes the folders above a local file; object stores have none."""
    if not path.startswith("s3://"):
        os.makedirs(os.path.dirname(path), exist_ok=True)


def remove_tree(path: str) -> None:
    """Removes a file, or a folder and all under it, if it is there."""
    fs, bare = filesystem(path)
    if fs.exists(bare):
        fs.rm(bare, recursive=True)
