"""What keeping user states in fewer bits costs in AUC and in scores: python -m benchmarks.state_precision [--root runs/quickstart]

The quickstart's served checkpoint answers its test split from states, by serving's own engine: each household's state is encoded at
the first request, and appended to before each later one, in float32, bf16, int8 (a scale for each head of each vector) and fp8.
Besides, the forward pass over every request's whole window, which keeps nothing. On a GPU states are grown and scored as by a
replica, compiled and captured, with products in bf16 and GELU in its tanh form; those in float32, from which the others differ,
launch by launch, so that they are there first; and the forward pass is made once more in bf16, which tells what of a cost is the
arithmetic's. There each arm has a process, and all run at once: nothing is timed, and most of it is compiling. Needs the pipeline's
tables and checkpoint: `python -m jobs.pipeline --config configs/quickstart.yaml` (of the requests only the folders `split=test`).
Prints a Markdown page, its rows as they are ready; last, one JSON line. Beside each largest difference stands the tolerance of
`tests/model/tolerances.py`: on a CPU that to which tests hold small models, on a GPU one for the quickstart's.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.conditions import commit, cpu_model
from benchmarks.model_arms.sizes import DEVICE, ON_CUDA
from longer.arrays import Float32, Int64, RequestBatch
from longer.config import Settings, load_settings
from longer.data.tables import RequestTable, SequenceTable
from longer.model.engine import StateEngine
from longer.model.fuse import plainly
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import UserState
from longer.serving.room import BATCH_USERS
from longer.training.checkpoints import CheckpointInfo, load_appendable
from longer.training.inputs import Inputs
from longer.training.loader import SplitData, read_split, score_split
from longer.training.metrics import auc, gauc
from tests.model.tolerances import ON_GPU, TOLERANCE

EXACT: Precision = "float32"
PRECISIONS: tuple[Precision, ...] = (EXACT, "bf16", "int8", "fp8")
FORWARD, FORWARD_BF16 = "forward", "forward in bf16"
ARMS = [EXACT, FORWARD, *([FORWARD_BF16] if ON_CUDA else []), *PRECISIONS[1:]]


@dataclass(frozen=True)
class Arm:
    """Probabilities of every candidate of the split, and the bytes of a full state."""

    name: str
    probability_C: Float32
    state_bytes: int
    tolerance: float | None = None


def test_split(settings: Settings, model: Longer, inputs: Inputs, num_buckets: int | None) -> SplitData:
    schema = settings.event_schema
    sequences = SequenceTable(settings.path("tables", "sequences"), schema, inputs.ids["sequences"])
    requests = RequestTable(settings.path("tables", "requests"), schema, inputs.ids["requests"])
    return read_split(sequences, requests, "test", model.windows, None if num_buckets is None else range(num_buckets))


def waves(data: SplitData) -> Iterator[list[Int64]]:
    """For each batch of users, their requests in order of time: wave n is the nth request of each user who has so many."""
    order_R = np.lexsort((data.requests.request_ts_R, data.row_R))
    of_user = np.split(order_R, np.flatnonzero(np.diff(data.row_R[order_R])) + 1)
    of_user.sort(key=len, reverse=True)
    for begin in range(0, len(of_user), BATCH_USERS):
        users = of_user[begin : begin + BATCH_USERS]
        yield [np.array([one[n] for one in users if len(one) > n]) for n in range(len(users[0]))]


def from_states(model: Longer, data: SplitData, precision: Precision) -> Arm:
    """Each user's state grows from request to request; nothing is encoded twice."""
    layout = StateLayout.of(model, precision)
    state_bytes = layout.largest_rows * layout.row_bytes
    pool = StatePool(layout, BATCH_USERS * state_bytes, DEVICE)
    engine = StateEngine(model, pool, is_plain=precision == EXACT)
    requests, windows = data.requests, model.windows
    output_C = np.empty(len(requests.item_id_C), np.float32)
    for batch in waves(data):
        slots = [slot for _ in batch[0] if (slot := pool.slots.allocate(layout.largest_rows))]
        states: list[UserState] = []
        for rows_R in batch:
            end, row, slots_now = requests.history_end_R[rows_R], data.row_R[rows_R], slots[: len(rows_R)]
            if not states:
                start = windows.history_start(end) * windows.merge_size
                states = engine.encode(data.histories.slice_events(row, start, end), slots_now)
            else:
                held = states[: len(rows_R)]
                begin = np.array([state.num_events for state in held])
                states = engine.append(held, data.histories.slice_events(row, begin, end), slots_now)
            asked = requests.take(rows_R)
            scored_CT = engine.score(states, asked.request_ts_R, asked.candidates)
            first, last = (requests.candidates.offsets_R1[rows_R + n] for n in (0, 1))
            output_C[np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])] = scored_CT[:, 0]
        for slot in slots:
            pool.slots.free(slot)
    tolerance = (ON_GPU if ON_CUDA else TOLERANCE).get(precision)
    return Arm(f"states in {precision}", _probabilities(output_C), state_bytes, tolerance)


def by_forward(model: Longer, data: SplitData, in_bf16: bool = False) -> Arm:
    @torch.inference_mode()
    def outputs(batch: RequestBatch) -> Float32:
        with plainly(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=in_bf16, cache_enabled=False):
            return model(to_tensors(batch, DEVICE)).float().cpu().numpy()

    name = f"forward pass{' in bf16' * in_bf16}, no states"
    return Arm(name, _probabilities(score_split(data, outputs, len(model.tasks))[:, 0]), 0)


def arm_of(name: str, config: str, root: str | None, num_buckets: int | None) -> Arm:
    """One of `ARMS`, from files on; told on stderr with what it took."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    _, model, _, data = world(config, root, num_buckets, DEVICE.type)
    loaded = time.perf_counter()
    states_in = next((precision for precision in PRECISIONS if precision == name), None)
    arm = from_states(model, data, states_in) if states_in else by_forward(model, data, in_bf16=name == FORWARD_BF16)
    print(
        f"state_precision: {arm.name}, {loaded - started:.1f} s to load, {time.perf_counter() - loaded:.1f} s to compute",
        file=sys.stderr,
        flush=True,
    )
    return arm


def world(
    config: str, root: str | None, num_buckets: int | None, device: str
) -> tuple[Settings, Longer, CheckpointInfo, SplitData]:
    settings = load_settings(config, {"root": root} if root else {})
    inputs = Inputs.served(settings)
    model, info = load_appendable(inputs.checkpoint.path, device)
    return settings, model, info, test_split(settings, model, inputs, num_buckets)


def ready(submitted: list[Future[Arm]]) -> Iterator[Arm]:
    """As they come, but first the states in float32, from which the others differ."""
    exact, *others = submitted
    yield exact.result()
    yield from (arm.result() for arm in as_completed(others))


def _probabilities(output_C: Float32) -> Float32:
    return torch.from_numpy(output_C).double().sigmoid().numpy()


def measured(arm: Arm, exact: Arm, data: SplitData) -> dict[str, Any]:
    """Differences are from `exact`."""
    label_C = next(iter(data.requests.labels.values()))
    user_C = np.repeat(data.requests.user_key_R, np.diff(data.requests.candidates.offsets_R1))
    difference_C = np.abs(arm.probability_C - exact.probability_C)
    return {
        "arm": arm.name,
        "auc": auc(arm.probability_C, label_C),
        "gauc": gauc(arm.probability_C, label_C, user_C),
        "largest_difference": float(difference_C.max()),
        "tolerance": arm.tolerance,
        "mean_difference": float(difference_C.mean()),
        "state_bytes": arm.state_bytes,
    }


def shown(row: dict[str, Any], exact: dict[str, Any]) -> str:
    cost = [f"{row[name] - exact[name]:+.6f}" for name in ("auc", "gauc")]
    most, tolerance = row["largest_difference"], row["tolerance"]
    stated = "" if tolerance is None else f"{tolerance:g}{', exceeded' * (most > tolerance)}"
    return (
        f"| {row['arm']} | {row['auc']:.6f} | {cost[0]} | {row['gauc']:.6f} | {cost[1]} | {most:.2g} | {stated} "
        f"| {row['mean_difference']:.2g} | {row['state_bytes'] or ''} |"
    )


def head(settings: Settings, config: str, info: CheckpointInfo, data: SplitData) -> str:
    hardware, sizes = (
        torch.cuda.get_device_name() if ON_CUDA else f"one thread of {cpu_model()}, shared machine",
        info.model,
    )
    return "\n".join(
        [
            "# User states in fewer bits: what that costs in AUC and in scores\n",
            f"- hardware: {hardware}; commit {commit()}; torch {torch.__version__}",
            f"- {settings.import_events.dataset}, {config}: {len(data.requests)} test requests, "
            f"{data.requests.candidates.offsets_R1[-1]} candidates, {len(np.unique(data.row_R))} users; model "
            f"{info.model_version}, {sizes.width} wide, L={sizes.history_events}, one cross and {sizes.num_self_layers} self "
            f"layer(s), {sizes.num_heads} heads",
            "- differences of probabilities and costs are from the states in float32\n",
            "| | AUC | cost | GAUC | cost | largest difference | tolerance | mean | bytes of a full state |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--root", help="where the pipeline wrote (default: as the config says)")
    parser.add_argument("--buckets", type=int, help="only the users of the tables' first buckets (default: all)")
    args = parser.parse_args()
    started = time.perf_counter()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each process
    of = args.config, args.root, args.buckets
    rows, exact = list[dict[str, Any]](), None
    with ProcessPoolExecutor(len(ARMS) if ON_CUDA else 1, multiprocessing.get_context("spawn")) as processes:
        submitted = [processes.submit(arm_of, name, *of) for name in ARMS]
        settings, _, info, data = world(*of, "cpu")
        print(head(settings, args.config, info, data), flush=True)
        for arm in ready(submitted):
            exact = exact or arm
            rows.append(measured(arm, exact, data))
            print(shown(rows[-1], rows[0]), flush=True)
    print(f"\nOne run of {time.perf_counter() - started:.0f} s.\n")
    print(json.dumps({row["arm"]: {name: value for name, value in row.items() if name != "arm"} for row in rows}))


if __name__ == "__main__":
    main()
