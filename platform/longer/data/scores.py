"""Tables of scores, by request: what evaluation, batch scoring and the serving check write, and how two are compared.

One row a request of the request table, candidates in its order: `request_id`, `user_id`, `request_ts`, `item_id` list and one
list a task, `score_TASK`: probabilities of binary tasks, values of regression tasks.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.config import TaskSettings
from longer.data.batches import Requests
from longer.data.columns import flat_list, read_columns
from longer.schema import TIMESTAMP, EventSchema
from longer.storage import Version

MAX_DIFFERENCE = 1e-5
"""The most by which one request's scores may differ between evaluation, batch scoring and serving, in float32."""


def check_difference(left: pa.Table, right: pa.Table, tasks: Sequence[TaskSettings]) -> tuple[float, int]:
    """As `max_abs_diff`; raises ArithmeticError above MAX_DIFFERENCE, since then one of the two paths is wrong."""
    worst, compared = max_abs_diff(left, right, tasks)
    if worst > MAX_DIFFERENCE:
        raise ArithmeticError(
            f"scores of one request differ by {worst:.1e} between two paths, more than {MAX_DIFFERENCE}"
        )
    return worst, compared


def score_column(task: str) -> str:
    return f"score_{task}"


def score_rows(requests: Requests, scores: dict[str, npt.NDArray[np.float32]], schema: EventSchema) -> pa.Table:
    """Rows of a score table; `scores` holds every candidate's score by task, in the order of the requests."""
    offsets = pa.array(requests.candidates.offsets_R1.astype(np.int32))
    user_type, item_type = schema.id_types
    columns = {
        "request_id": pa.array(requests.request_id_R),
        "user_id": requests.user_id_R.cast(user_type),
        "request_ts": pa.array(requests.request_ts_R).cast(TIMESTAMP),
        "item_id": pa.ListArray.from_arrays(offsets, requests.item_id_C.cast(item_type)),
        **{score_column(t): pa.ListArray.from_arrays(offsets, pa.array(x, pa.float32())) for t, x in scores.items()},
    }
    return pa.table(columns)


def read_scores(version: Version, request_ids: npt.NDArray[np.int64] | None = None) -> pa.Table:
    """The rows of a score table, or those of some requests, read file by file."""
    parts = []
    for file in version.files():
        if not file.endswith(".parquet"):
            continue
        rows = read_columns(file)
        parts.append(rows if request_ids is None else rows.filter(_among(rows, request_ids)))
    return pa.concat_tables(parts)


def max_abs_diff(left: pa.Table, right: pa.Table, tasks: Sequence[TaskSettings]) -> tuple[float, int]:
    """The largest difference between the scores of requests that both tables have, and how many those are."""
    left, right = (rows.sort_by("request_id") for rows in (left, right))
    both = np.intersect1d(left["request_id"].to_numpy(), right["request_id"].to_numpy())
    left, right = (rows.filter(_among(rows, both)) for rows in (left, right))
    if not left["item_id"].combine_chunks().equals(right["item_id"].combine_chunks()):
        raise ValueError("the tables score other candidates in a request that both have")
    worst = 0.0
    for task in tasks:
        values = [flat_list(rows[score_column(task.name)])[1].to_numpy() for rows in (left, right)]
        if len(values[0]):
            gaps = np.abs(values[0].astype(np.float64) - values[1])
            worst = max(worst, float(np.nan_to_num(gaps, nan=np.inf).max()))  # max(0.0, nan) would be 0.0
    return worst, len(both)


def _among(rows: pa.Table, request_ids: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(np.isin(rows["request_id"].to_numpy(), request_ids))
