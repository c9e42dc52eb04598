"""A bucket's file, written in row groups as they come and there as a whole or not at all; beside it the record that it is done."""

import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.records import Record, finished, remember, scratch
from longer.errors import UserError
from longer.files import file_sizes, make_parents, remove_tree, write_bytes
from longer.serving.batch_alive import silent
from longer.serving.stages import stage
from longer.storage import DataFile, checked_output, manifest_of

_ROW_GROUP_BYTES = 16 << 20
_MOST_ATTEMPTS = 4
"""At one bucket in a run, or of each actor to start: nodes are lost, but the same bucket with each is no accident."""


@dataclass(frozen=True)
class Run:
    """One run at a version. What it writes is named after it, so that another run of the version never reads or replaces it."""

    version_path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def folder(self) -> str:
        """What only this run reads, gone with the version's scratch."""
        return f"{scratch(self.version_path)}/run-{self.id}"

    @property
    def users(self) -> str:
        return f"{self.folder}/users"

    @property
    def candidates(self) -> str:
        return f"{self.folder}/candidates"

    @property
    def alive(self) -> str:
        """A file that it renews."""
        return f"{self.folder}/alive"

    @property
    def is_on_s3(self) -> bool:
        return self.version_path.startswith("s3://")

    def file_of(self, bucket: int) -> str:
        """The bucket's data file, by its path in the version."""
        return f"bucket={bucket:04d}/part-{self.id}.parquet"

    @contextmanager
    def starting(self, most_actors: int, section: str) -> Iterator[None]:
        """Around an actor's constructor; a UserError if too many have died in it, whom Ray would replace for ever."""
        starting, most = f"{self.folder}/starting", _MOST_ATTEMPTS * most_actors
        if len(file_sizes(starting)) >= most:
            raise UserError(
                f"{most} actors died before they were up, as they do when memory runs out: "
                f"lower {section}.concurrency, or give nodes more memory, then run again: buckets that are done stay"
            )
        mark = f"{starting}/{uuid.uuid4().hex}"
        write_bytes(mark, b"")
        yield
        remove_tree(mark)

    def begin(self, bucket: int, actor: str, setting: str) -> None:
        """Before an actor's work at a bucket; a UserError if that has been the end of too many. `setting` bounds memory."""
        begun = self.begun
        mine = begun.get(bucket, set())
        if len(mine) >= _MOST_ATTEMPTS:
            others = [other for other, actors in sorted(begun.items()) if other != bucket and actors >= mine]
            beside = f" (and {', '.join(map(str, others))}, beside it each time)" if others else ""
            raise UserError(
                f"bucket {bucket}{beside}: {_MOST_ATTEMPTS} actors died while they had it, as they do when memory runs out: lower "
                f"{setting} or the concurrency, then run again: buckets that are done stay"
            )
        write_bytes(self._mark(bucket, actor), b"")

    def end(self, bucket: int, actor: str) -> None:
        """After it."""
        remove_tree(self._mark(bucket, actor))

    def _mark(self, bucket: int, actor: str) -> str:
        return f"{self.folder}/begun/{bucket:04d}/{actor}"

    @property
    def begun(self) -> dict[int, set[str]]:
        """Actors that have a bucket, or have died while they had it, by bucket."""
        actors: dict[int, set[str]] = {}
        for mark in file_sizes(f"{self.folder}/begun"):
            bucket, _, actor = mark.partition("/")
            actors.setdefault(int(bucket), set()).add(actor)
        return actors


def write_rows(version_path: str, file: str, parts: Iterable[pa.Table]) -> DataFile | None:
    """Writes the parts as data file `file` of a version, two row groups in memory at a time; None, and no file, without rows.

    The file appears whole: on S3 as uploads do, on a disk by a rename, so that a writer that fails or is killed, or one of an
    earlier run that has not died yet, never leaves half of one.
    """
    groups = _row_groups(parts)
    first = next(groups, None)
    if first is None:
        return None
    on_s3 = version_path.startswith("s3://")
    folder, name = (version_path, file) if on_s3 else (scratch(version_path), f"{uuid.uuid4().hex}.parquet")
    with (
        checked_output(folder, name) as sink,
        pq.ParquetWriter(sink, first.schema, compression="zstd", use_dictionary=_repeating(first.schema)) as writer,
        ThreadPoolExecutor(1) as thread,  # the parts are made meanwhile, in the thread that asks for them
    ):
        writing = thread.submit(writer.write_table, first, row_group_size=len(first))
        for rows in groups:
            with stage("write"):
                writing.result()
            writing = thread.submit(writer.write_table, rows, row_group_size=len(rows))
        with stage("write"):
            writing.result()
    if not on_s3:
        make_parents(f"{version_path}/{file}")
        os.replace(f"{folder}/{name}", f"{version_path}/{file}")
    return replace(sink.data_file, path=file)


def _repeating(schema: pa.Schema) -> list[str]:
    """Paths of the columns that are worth a dictionary: scores are not, hardly any two agree."""
    paths = {field.name: f"{field.name}.list.element" for field in schema if pa.types.is_list(field.type)}
    kinds = {field.name: field.type.value_type if field.name in paths else field.type for field in schema}
    return [paths.get(name, name) for name, kind in kinds.items() if not pa.types.is_floating(kind)]


def remove_unnamed(run: Run) -> None:
    """Removes buckets' files that the published version does not name, which its readers would read: of this run and of dead ones.

    What a live one has written, on S3, it removes itself. Two that publish at once both do so by the later one's manifest.
    """
    others = {mark for mark in _unnamed(run.version_path).values() if mark != run.alive}
    dead = silent(others) if run.is_on_s3 else others
    for path, mark in _unnamed(run.version_path).items():  # which may be another version's than before that wait
        if mark == run.alive or mark in dead:
            remove_tree(f"{run.version_path}/{path}")


def _unnamed(version_path: str) -> dict[str, str]:
    """Buckets' files that the manifest does not name, each with the mark of the run that wrote it; none without a manifest."""
    paths = [path for path in file_sizes(version_path) if path.startswith("bucket=")]
    manifest = manifest_of(version_path)  # after the files, so that it names those which are published
    named = {file["path"] for file in manifest["files"]} if manifest else set(paths)
    return {path: Run(version_path, _run_of(path)).alive for path in paths if path not in named}


def _run_of(file: str) -> str:
    return file.rpartition("/part-")[2].removesuffix(".parquet")


def _row_groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The parts' rows in tables of about `_ROW_GROUP_BYTES`."""
    waiting: list[pa.Table] = []
    for part in parts:
        waiting.append(part)
        if sum(rows.nbytes for rows in waiting) >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if sum(len(rows) for rows in waiting):
        yield pa.concat_tables(waiting)


def remember_bucket(version_path: str, record: Record) -> Record:
    """Says that a bucket is done; its file is there."""
    return remember(version_path, f"bucket-{record['bucket']:04d}", record)


def done_buckets(version_path: str) -> dict[int, Record]:
    """Records of the buckets that an interrupted run has finished and whose files are there."""
    return {record["bucket"]: record for record in finished(version_path, _files_of).values()}


def _files_of(_: str, record: Record) -> dict[str, int]:
    return {record["file"]["path"]: record["file"]["num_bytes"]} if record["file"] else {}
