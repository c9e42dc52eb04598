"""The three logs of the study as splits in memory, without Ray: from a sequence table, a package's files, or the generator.

- journey: the requests that `jobs.build_requests` makes of the same table, by the same kernels and seed;
- movielens: every rating is a request about one film; its label is a like, four stars or more. No negative is drawn;
- generated: requests that only old events answer (`quality_study.generated`).

U users, E events, R requests.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.quality_study.generated import read_generated
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.movielens import IN_PACKAGE, read_ratings, require_ratings
from longer.arrays import Candidates, Histories
from longer.data.batches import Requests
from longer.data.columns import histories_of, requests_of, single_array
from longer.data.requests import (
    SPLITS,
    draw_negatives,
    find_groups,
    merge_catalogues,
    partial_catalogue,
    request_rows,
    split_times,
)
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.schema import EventSchema, Feature
from longer.storage import Table
from longer.table_settings import GenerateSettings, RequestSettings

SCHEMAS = {
    "journey": EventSchema(
        group_id="basket_id",
        features=(
            Feature(name="category", kind="categorical", of="item"),
            Feature(name="department", kind="categorical", of="item"),
            Feature(name="quantity", kind="numeric", of="event"),
            Feature(name="sales_value", kind="numeric", of="event"),
        ),
    ),
    "movielens": EventSchema(
        features=(
            Feature(name="genres", kind="categorical", of="item"),
            Feature(name="rating", kind="numeric", of="event"),
        )
    ),
    "generated": EventSchema(features=(Feature(name="category", kind="categorical", of="item"),)),
}
_LIKE_FROM = 4.0
_QUICKSTART = "--config configs/quickstart.yaml --root"


def home(name: str, root: str) -> str:
    """Where `read_log` finds a log in the root of a quickstart: MovieLens' package is installed beside the tables."""
    return f"{root}/movielens/{IN_PACKAGE}" if name == "movielens" else root


def require(name: str, root: str) -> list[Path]:
    """The files that a log is read from, under the root of a quickstart; a UserError, with what makes them, if there are none."""
    if name == "generated":
        return []
    if name == "movielens":
        return require_ratings(f"{root}/movielens")
    path = f"{root}/tables/sequences"
    if Table(path).current() is None:
        jobs = " && ".join(f"python -m jobs.{job} {_QUICKSTART} {root}" for job in ("import_events", "build_sequences"))
        raise UserError(f"{path}: no table of sequences: run `{jobs}`")
    SequenceTable(path, SCHEMAS[name])  # of this schema
    return sorted(file for file in Path(path).rglob("*") if file.is_file())


def read_log(name: str, root: str, seed: int = 0, sizes: GenerateSettings | None = None) -> Log:
    """A log by its name; `root` holds journey's tables/sequences or MovieLens' two files, and is not read for the generated one."""
    schema = SCHEMAS[name]
    if name == "generated":
        return read_generated(schema, sizes or GenerateSettings(), seed)
    if name == "movielens":
        rows = read_ratings(root)
        return _likes(rows, histories_of(rows, schema), schema)
    table = SequenceTable(f"{root}/tables/sequences", schema)
    rows = pa.concat_tables([table.rows(bucket) for bucket in table.buckets]).combine_chunks()
    return _purchases(rows, histories_of(rows, schema), schema)


def _purchases(rows: pa.Table, histories: Histories, schema: EventSchema) -> Log:
    asked = RequestSettings()
    times = split_times(
        int(histories.event_ts_E.min()),
        int(histories.event_ts_E.max()),
        asked.validation_days_share,
        asked.test_days_share,
    )
    assert times is not None
    catalogue = merge_catalogues([partial_catalogue(rows, schema, times)], schema)
    groups = find_groups(rows, histories, schema, catalogue)
    split_R = times.split_of(groups.request_ts_R)
    negatives = draw_negatives(groups, split_R, catalogue, asked.negatives_per_positive, seed=0)
    table = request_rows(groups, negatives, single_array(rows["user_id"]), schema, catalogue)
    requests = {name: requests_of(table.filter(pa.array(split_R == i)), schema) for i, name in enumerate(SPLITS)}
    row_R = {name: groups.user_row_R[split_R == i] for i, name in enumerate(SPLITS)}
    return Log("journey", schema, histories, requests, row_R, times.valid_from_ms)


def _likes(rows: pa.Table, histories: Histories, schema: EventSchema) -> Log:
    """Split by time into 80, 10 and 10 percent of the ratings."""
    row_E = np.repeat(np.arange(len(histories)), np.diff(histories.offsets_B1))
    number_E = np.arange(len(row_E)) - histories.offsets_B1[row_E]
    new_time_E = np.ones(len(row_E), bool)
    new_time_E[1:] = (row_E[1:] != row_E[:-1]) | (histories.event_ts_E[1:] != histories.event_ts_E[:-1])
    end_E = number_E[np.maximum.accumulate(np.where(new_time_E, np.arange(len(row_E)), 0))]  # strictly earlier only
    valid_from, test_from = np.quantile(histories.event_ts_E, [0.8, 0.9]).astype(np.int64)
    bounds = {
        "train": (0, valid_from),
        "valid": (valid_from, test_from),
        "test": (test_from, np.iinfo(np.int64).max),
    }
    item_id_E, user_id_U = single_array(rows["item_id"]).flatten(), single_array(rows["user_id"])
    label_E = (histories.features["rating"] >= _LIKE_FROM).astype(np.float32)
    requests, row_R = {}, {}
    for name, (begin, end) in bounds.items():
        chosen = np.flatnonzero((histories.event_ts_E >= begin) & (histories.event_ts_E < end))
        row_R[name] = row_E[chosen]
        features = {key: histories.features[key][chosen] for key in ("item_id", "genres")}
        requests[name] = Requests(
            request_id_R=chosen,
            user_id_R=user_id_U.take(pa.array(row_E[chosen])),
            user_key_R=histories.user_key_B[row_E[chosen]],
            request_ts_R=histories.event_ts_E[chosen],
            history_end_R=end_E[chosen],
            candidates=Candidates(np.arange(len(chosen) + 1), features),
            item_id_C=item_id_E.take(pa.array(chosen)),
            labels={"label": label_E[chosen]},
        )
    return Log("movielens", schema, histories, requests, row_R, int(valid_from))
