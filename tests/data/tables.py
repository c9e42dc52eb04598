"""Sequence tables for tests, built by the platform's own passes, in this process instead of in Ray's."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longer.data.build_plan import BuildPlan
from longer.data.events import iso_time
from longer.data.ray_sequences import Build
from longer.data.sequences import KeepRule, Older, build_sequences
from longer.files import remove_tree
from longer.schema import EventSchema
from longer.storage import DataFile, Table, Version, checked_output
from tests.data.logs import BASKETS

KEEP_ALL = KeepRule(1000, 4)


def sequences_of(events: pa.Table, schema: EventSchema = BASKETS, rule: KeepRule = KEEP_ALL) -> pa.Table:
    """All users' rows in one piece."""
    return build_sequences(events, Older.none(schema), schema, rule)


def publish_sequences(
    path: str,
    events: pa.Table,
    schema: EventSchema,
    rule: KeepRule,
    num_buckets: int,
    row_group_events: int,
    version_id: str = "v1",
) -> Version:
    table = Table(path)
    settings = {**vars(rule), "num_buckets": num_buckets, "row_group_events": row_group_events}
    build = Build(BuildPlan([], None, rule, settings, {}, schema.hash()), schema, table.begin(version_id))
    with checked_output(build.scratch, "log.parquet") as sink:
        pq.write_table(events, sink, row_group_size=max(len(events), 1))
    block = build.cut_block((0, [(f"{build.scratch}/log.parquet", 0, 1)]))
    records = [
        build.build_bucket((bucket, np.array([[start, end]])))
        for bucket, (start, end) in enumerate(pairwise(block["starts"]))
        if start < end
    ]
    remove_tree(build.scratch)
    manifest = {"schema_hash": schema.hash(), "settings": settings, "watermark": iso_time(block["last_ts"])}
    return table.publish(version_id, manifest, [DataFile(**file) for record in records for file in record["files"]])
