"""Tables of scores, by request: what evaluation, batch scoring and the serving check write, and how two are compared.

One row a request of the request table, candidates in its order: `request_id`, `user_id`, `request_ts`, `item_id` list and one
list a task, `score_TASK`: probabilities of binary tasks, values of regression tasks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.arrays import Float32
from longer.data.batches import Requests
from longer.data.columns import flat_list, read_columns
from longer.schema import TIMESTAMP, EventSchema
from longer.storage import Version
from longer.training_settings import TaskSettings

Float64 = npt.NDArray[np.float64]

MAX_DIFFERENCE = 1e-5
"""The most by which one request's scores may differ between evaluation, batch scoring and serving, in float32: relative to the
score, to the root mean square of its task's scores, or to 1, whichever is most. A head's rounding errors are of that size."""

MAX_DIFFERENCE_BF16 = 1e-2
"""The same where both sides multiply in bf16, whose numbers have 8 bits: a rounding is 4e-3 of a number, and many are summed."""


def check_difference(left: pa.Table, right: pa.Table, tasks: Sequence[TaskSettings]) -> tuple[float, int]:
    """As `max_abs_diff`; raises ArithmeticError above MAX_DIFFERENCE, since then one of the two paths is wrong."""
    pairs, compared = _pairs(left, right, tasks)
    for task, (ours, theirs) in pairs.items():
        check_gaps(absolute_gaps(ours, theirs), ours, f"scores of {task}", "two paths")
    return _worst(pairs), compared


def check_gaps(
    gaps: Float64,
    answers: npt.NDArray,
    what: str,
    between: str,
    scale: float | None = None,
    most: float = MAX_DIFFERENCE,
) -> None:
    """ArithmeticError if a gap is above `most`; `scale` is `root_mean_square` of more answers than these, if known."""
    scales = np.maximum(np.abs(answers, dtype=np.float64), scale or root_mean_square(answers))
    relative = np.nan_to_num(gaps / scales, nan=np.inf, posinf=np.inf)
    if len(relative) and relative.max() > most:
        worst = int(relative.argmax())
        raise ArithmeticError(
            f"{what} differ by {gaps[worst]:.1e} between {between}, more than {most} of their size, {scales[worst]:.3g}"
        )


def absolute_gaps(left: npt.NDArray, right: npt.NDArray) -> Float64:
    """By how much the answers differ; infinitely where one is not a number, or not finite."""
    return np.nan_to_num(np.abs(left.astype(np.float64) - right), nan=np.inf, posinf=np.inf)


def root_mean_square(answers: npt.NDArray) -> float:
    """Of the finite ones, and at least 1."""
    finite = answers[np.isfinite(answers)].astype(np.float64)
    return max(1.0, float(np.sqrt(np.square(finite).mean()))) if len(finite) else 1.0


def score_column(task: str) -> str:
    return f"score_{task}"


def score_rows(requests: Requests, scores: dict[str, Float32], schema: EventSchema) -> pa.Table:
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
    pairs, compared = _pairs(left, right, tasks)
    return _worst(pairs), compared


def _worst(pairs: Mapping[str, tuple[Float32, Float32]]) -> float:
    return max((float(absolute_gaps(*pair).max()) for pair in pairs.values() if len(pair[0])), default=0.0)


def _pairs(
    left: pa.Table, right: pa.Table, tasks: Sequence[TaskSettings]
) -> tuple[dict[str, tuple[Float32, Float32]], int]:
    """Both tables' scores by task, one opposite the other, of requests that both have, and how many those are."""
    left, right = (rows.sort_by("request_id") for rows in (left, right))
    both = np.intersect1d(left["request_id"].to_numpy(), right["request_id"].to_numpy())
    left, right = (rows.filter(_among(rows, both)) for rows in (left, right))
    if not left["item_id"].combine_chunks().equals(right["item_id"].combine_chunks()):
        raise ValueError("the tables score other candidates in a request that both have")
    columns = {task.name: score_column(task.name) for task in tasks}
    return {
        task: (flat_list(left[column])[1].to_numpy(), flat_list(right[column])[1].to_numpy())
        for task, column in columns.items()
    }, len(both)


def _among(rows: pa.Table, request_ids: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(np.isin(rows["request_id"].to_numpy(), request_ids))
