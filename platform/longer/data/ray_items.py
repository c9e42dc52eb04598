"""The item catalogue of a version of the sequence table, from the log on Ray; of an increment, from its files and the last one."""

from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.build_plan import read_by
from longer.data.catalogue import first_seen
from longer.data.items import items_version, read_items
from longer.data.ray_sequences import readable_files
from longer.data.ray_tasks import each
from longer.data.records import scratch
from longer.data.segments import Piece, plan_blocks, read_block, read_table, write_table
from longer.data.sequences import plain
from longer.files import remove_tree
from longer.schema import EventSchema
from longer.storage import Table, Version, checked_output

_TABLES_AT_ONCE = 16


def publish_items(
    items_path: str, events_path: str, sequences: Version, base: Version | None, schema: EventSchema
) -> Version:
    """The catalogue of a version of the sequence table; built only if it is not there yet, on that of `base` if that is there."""
    table = Table(items_path)
    version_id = items_version(sequences.id, schema)
    if published := table.reuse(version_id):
        return published
    events = Table(events_path)
    files = read_by(sequences, events)
    last = table.find(items_version(base.id, schema)) if base else None
    if base and last:
        files -= read_by(base, events)
    version_path = table.begin(version_id)
    parts = [] if base is None or last is None else [read_items(items_path, base.id, schema)]
    items = _first_seen_in(sorted(files), schema, scratch(version_path), parts)
    with checked_output(version_path, "part-0.parquet") as sink:
        pq.write_table(items, sink, compression="zstd")
    manifest = {"schema_hash": schema.hash(), "inputs": {"sequences": sequences.id}, "num_rows": len(items)}
    version = table.publish(version_id, manifest, [sink.data_file])
    remove_tree(scratch(version_path))
    return version


def _first_seen_in(files: list[str], schema: EventSchema, folder: str, parts: list[pa.Table]) -> pa.Table:
    """Of all events in the files: a few blocks' catalogues at a time, so that memory is set by the number of items."""

    def of_block(numbered: tuple[int, list[Piece]]) -> str:
        number, pieces = numbered
        events = read_block(pieces, schema).select(["item_id", "event_ts", *schema.features_of("item")])
        write_table(path := f"{folder}/0-{number:05d}.arrow", first_seen(plain(events), schema))
        return path

    def of_parts(named: tuple[str, list[str]]) -> str:
        path, paths = named
        write_table(path, first_seen(pa.concat_tables([read_table(part) for part in paths]), schema))
        return path

    blocks = plan_blocks(readable_files(files, schema, False))
    paths = each(of_block, enumerate(blocks), len(blocks), "items of the log", "blocks")
    for level in count(1):
        if len(paths) <= _TABLES_AT_ONCE:
            break
        starts = range(0, len(paths), _TABLES_AT_ONCE)
        named = [(f"{folder}/{level}-{start:05d}.arrow", paths[start : start + _TABLES_AT_ONCE]) for start in starts]
        paths = each(of_parts, named, len(named), "merge items", "parts")
    return first_seen(pa.concat_tables([*parts, *(read_table(path) for path in paths)]), schema)
