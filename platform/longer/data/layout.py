"""Where the files of a sequence version lie: a bucket's rows, and the news that an increment left beside them.

`bucket=0007/part-0.parquet`       one row a user (`EventSchema.sequences_arrow`), up to the last time that the bucket was merged
`news/bucket=0007/part-0.parquet`  one row a user with later events: `user_id`, `num_older`, and the lists of those events alone
"""

from dataclasses import dataclass

import pyarrow as pa

from longer.data.sequences import NUM_OLDER
from longer.schema import EventSchema
from longer.storage import DataFile, Version


@dataclass(frozen=True)
class BucketFiles:
    """The files of one bucket."""

    rows: DataFile
    news: DataFile | None = None


def rows_path(bucket: int) -> str:
    return f"bucket={bucket:04d}/part-0.parquet"


def news_path(bucket: int) -> str:
    return f"news/bucket={bucket:04d}/part-0.parquet"


def bucket_of_path(path: str) -> int:
    """The bucket of a file of a sequence or request table."""
    return int(path.rpartition("bucket=")[2][:4])


def bucket_files(version: Version) -> dict[int, BucketFiles]:
    """The files of each bucket that holds users."""
    by_path = {file.path: file for file in version.data_files()}
    buckets = sorted(int(path.removeprefix("bucket=")[:4]) for path in by_path if path.startswith("bucket="))
    return {bucket: BucketFiles(by_path[rows_path(bucket)], by_path.get(news_path(bucket))) for bucket in buckets}


def news_arrow(schema: EventSchema) -> pa.Schema:
    """The columns of a file of news."""
    rows = schema.sequences_arrow()
    lists = [rows.field(field.name) for field in schema.event_fields()]
    return pa.schema([rows.field("user_id"), pa.field(NUM_OLDER, pa.int64()), *lists])
