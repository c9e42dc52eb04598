"""Tables of scores, by request: what evaluation, batch scoring and the serving check write, and how two are compared.

One row a request of the request table, candidates in its order: `request_id`, `user_id`, `request_ts`, `item_id` list and one
list a task, `score_TASK`: probabilities of binary tasks, values of regression tasks.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from longer.arrays import Float32
from longer.data.batches import Requests
from longer.data.columns import flat_list
from longer.data.parquet import naming, open_parquet
from longer.schema import TIMESTAMP, EventSchema
from longer.storage import Version
from longer.training_settings import TaskKind, TaskSettings

Float64 = npt.NDArray[np.float64]

MAX_DIFFERENCE = 1e-5
"""The most by which one request's scores may differ between evaluation, batch scoring and serving, in float32: of the scores' size,
as `relative_gaps` has it. A head's rounding errors are of that size."""

MAX_DIFFERENCE_BF16 = 1e-2
"""The same where both sides multiply in bf16, whose numbers have 8 bits: neighbours are up to 8e-3 of a number apart."""

_LOG_ODDS_SIZE = 4.0
"""At a probability of a half, 1e-5 of it in log-odds is 1e-5 in the probability."""

_PROBABILITY_ROUNDING = 2.0**-22
"""Of a probability: two float32 numbers for it are that far apart at most, by their own rounding and the sigmoid's."""


def most_difference(precision: str) -> float:
    """Of relative gaps, where both sides compute in it."""
    return MAX_DIFFERENCE_BF16 if precision == "bf16" else MAX_DIFFERENCE


def check_difference(
    left: pa.Table, right: pa.Table, tasks: Sequence[TaskSettings], most: float = MAX_DIFFERENCE
) -> tuple[float, int]:
    """As `max_abs_diff`; raises ArithmeticError where a relative gap is above `most`: then one of the two paths is wrong."""
    pairs, compared = _pairs(left, right, tasks)
    for task in tasks:
        check_gaps(*pairs[task.name], task.kind, f"scores of {task.name}", "two paths", None, most)
    return _worst(pairs), compared


def check_gaps(
    left: npt.NDArray,
    right: npt.NDArray,
    kind: TaskKind,
    what: str,
    between: str,
    scale: float | None,
    most: float,
) -> None:
    """ArithmeticError if a relative gap is above `most`; `scale` is that of `relative_gaps`."""
    relative = relative_gaps(left, right, kind, scale)
    if len(relative) and relative.max() > most:
        worst = int(relative.argmax())
        of_what = "their log-odds" if kind == "binary" else "them"
        raise ArithmeticError(
            f"{what} differ by {absolute_gaps(left, right)[worst]:.1e} between {between}: by {relative[worst]:.1e} of the size of "
            f"{of_what}, more than {most}"
        )


def relative_gaps(left: npt.NDArray, right: npt.NDArray, kind: TaskKind, scale: float | None = None) -> Float64:
    """By what part of their size the answers differ; infinitely where one is not a number, or not finite.

    The size is the answer's, or `scale`, `typical_size` of more answers than these, whichever is more. Of a binary task all are of
    log-odds: rounding errors are even there, so that small probabilities are told from each other as well as large ones. What
    a probability near 1 loses by being stored in float32 is no difference.
    """
    gaps, answers, rounding = absolute_gaps(left, right), left.astype(np.float64), np.zeros(())
    if kind == "binary":
        answers = log_odds(left)
        rounding = _PROBABILITY_ROUNDING / (1 - _inside(np.minimum(left, right)))
        gaps = np.where(np.isfinite(gaps), np.abs(answers - log_odds(right)), np.inf)
    sizes = np.maximum(np.abs(answers), scale or typical_size(left, kind))
    return np.nan_to_num(np.maximum(gaps - rounding, 0) / sizes, nan=np.inf, posinf=np.inf)


def log_odds(probabilities: npt.NDArray) -> Float64:
    """What the sigmoid has made these of; finite for 0 and 1 too."""
    inside = _inside(probabilities)
    return np.log(inside) - np.log1p(-inside)


def _inside(probabilities: npt.NDArray) -> Float64:
    return np.clip(probabilities.astype(np.float64), np.finfo(np.float32).tiny, 1 - 2.0**-24)


def absolute_gaps(left: npt.NDArray, right: npt.NDArray) -> Float64:
    """By how much the answers differ; infinitely where one is not a number, or not finite."""
    return np.nan_to_num(np.abs(left.astype(np.float64) - right), nan=np.inf, posinf=np.inf)


def typical_size(answers: npt.NDArray, kind: TaskKind) -> float:
    """The root mean square of a regression task's answers, 1 if all are 0; of a binary task, how far its log-odds are spread.

    Not how far they are from 0: where all probabilities are small, one bias says so, and it is as large on both sides.
    """
    finite = answers[np.isfinite(answers)].astype(np.float64)
    if kind == "binary":
        return _LOG_ODDS_SIZE * max(1.0, float(log_odds(finite).std()) if len(finite) else 0.0)
    return float(np.sqrt(np.square(finite).mean())) or 1.0 if len(finite) else 1.0


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
    """The rows of a score table, or those of some requests, of which no more than a row group is read besides."""
    parts: list[pa.Table] = []
    for file in version.data_files():
        if not file.path.endswith(".parquet"):
            continue
        with naming(path := version.path_of(file)), open_parquet(path, file.num_bytes) as opened:
            parts += [opened.read()] if request_ids is None else _some_rows(opened, request_ids)
    return pa.concat_tables(parts)


def _some_rows(file: pq.ParquetFile, request_ids: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    yield file.schema_arrow.empty_table()
    for group in range(file.num_row_groups):
        if _among(file.read_row_group(group, columns=["request_id"]), request_ids).true_count:
            rows = file.read_row_group(group)
            yield rows.filter(_among(rows, request_ids))


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
