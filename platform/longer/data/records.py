"""What an unfinished version says of itself: a record for each part that is done, in its scratch folder. A rerun goes on from them.

A record appears whole, and after the files that it is about. No Ray; local or S3.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from longer.files import file_sizes, read_bytes, write_bytes

Record = dict[str, Any]
"""What is known of a part that is done: JSON."""

SCRATCH = "_scratch"
_NUM_READ_THREADS = 32


def scratch(version_path: str) -> str:
    return f"{version_path}/{SCRATCH}"


def remember(version_path: str, name: str, record: Record) -> Record:
    """Says that the part `name` is done; its files are there."""
    write_bytes(f"{scratch(version_path)}/{name}.json", json.dumps(record).encode())
    return record


def finished(version_path: str, files_of: Callable[[str, Record], Mapping[str, int]]) -> dict[str, Record]:
    """What an interrupted run has finished, by name: records that are whole, of files that are there in full.

    `files_of` gives the files of a record, by name and record: their paths in the version and their sizes.
    """
    sizes = file_sizes(version_path)
    prefix, suffix = f"{SCRATCH}/", ".json"
    paths = [path for path in sizes if path.startswith(prefix) and path.endswith(suffix)]
    with ThreadPoolExecutor(_NUM_READ_THREADS) as pool:
        contents = pool.map(lambda path: read_bytes(f"{version_path}/{path}"), paths)
    found = {}
    for path, content in zip(paths, contents, strict=True):
        name = path.removeprefix(prefix).removesuffix(suffix)
        with suppress(ValueError):  # torn by a crash of the machine
            record = json.loads(content)
            if all(sizes.get(file) == num_bytes for file, num_bytes in files_of(name, record).items()):
                found[name] = record
    return found
