"""What keeping user states in fewer bits costs in AUC and in scores: python -m benchmarks.state_precision [--root runs/quickstart]

The quickstart's served checkpoint answers its test split from states, by serving's own engine: each household's state is encoded at
the first request, and appended to before each later one, in float32, bf16, int8 (a scale for each head of each vector) and fp8.
Besides, the forward pass over every request's whole window, which keeps nothing. On a GPU states are grown and scored as by a
replica, compiled and captured, all but the float32 ones with products in bf16 and GELU in its tanh form; and the forward pass is
made once more in bf16, which tells what of a cost is the arithmetic's. Needs the pipeline's tables and checkpoint:
`python -m jobs.pipeline --config configs/quickstart.yaml` (of the requests only the folders `split=test`). Prints a Markdown page;
last, one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.model_arms.sizes import DEVICE, ON_CUDA
from benchmarks.point_reads import commit
from benchmarks.quickstart import cpu_model
from longer.arrays import Float32, Int64, RequestBatch
from longer.config import Settings, load_settings
from longer.data.tables import RequestTable, SequenceTable
from longer.model.engine import StateEngine
from longer.model.fuse import plainly
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.pool import Precision, StateLayout, StatePool
from longer.model.states import UserState
from longer.serving.store import BATCH_USERS
from longer.training.checkpoints import load_appendable
from longer.training.inputs import Inputs
from longer.training.loader import SplitData, read_split, score_split
from longer.training.metrics import auc, gauc

PRECISIONS: tuple[Precision, ...] = ("float32", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Arm:
    """Probabilities of every candidate of the split, and the bytes of a full state."""

    name: str
    probability_C: Float32
    state_bytes: int


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
    engine = StateEngine(model, pool)
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
    return Arm(f"states in {precision}", _probabilities(output_C), state_bytes)


def by_forward(model: Longer, data: SplitData, in_bf16: bool = False) -> Arm:
    @torch.inference_mode()
    def outputs(batch: RequestBatch) -> Float32:
        with plainly(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=in_bf16, cache_enabled=False):
            return model(to_tensors(batch, DEVICE)).float().cpu().numpy()

    name = f"forward pass{' in bf16' * in_bf16}, no states"
    return Arm(name, _probabilities(score_split(data, outputs, len(model.tasks))[:, 0]), 0)


def arms(model: Longer, data: SplitData) -> Iterator[Arm]:
    """First the states in float32, from which the others differ."""
    yield from_states(model, data, PRECISIONS[0])
    yield by_forward(model, data)
    if ON_CUDA:
        yield by_forward(model, data, in_bf16=True)
    for precision in PRECISIONS[1:]:
        yield from_states(model, data, precision)


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
        "mean_difference": float(difference_C.mean()),
        "state_bytes": arm.state_bytes,
    }


def shown(row: dict[str, Any], exact: dict[str, Any]) -> str:
    cost = [f"{row[name] - exact[name]:+.6f}" for name in ("auc", "gauc")]
    return (
        f"| {row['arm']} | {row['auc']:.6f} | {cost[0]} | {row['gauc']:.6f} | {cost[1]} | {row['largest_difference']:.2g} "
        f"| {row['mean_difference']:.2g} | {row['state_bytes'] or ''} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--root", help="where the pipeline wrote (default: as the config says)")
    parser.add_argument("--buckets", type=int, help="only the users of the tables' first buckets (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_settings(args.config, {"root": args.root} if args.root else {})
    inputs, started = Inputs.served(settings), time.perf_counter()
    model, info = load_appendable(inputs.checkpoint.path, DEVICE.type)
    data = test_split(settings, model, inputs, args.buckets)
    rows, exact = list[dict[str, Any]](), None
    for arm in arms(model, data):
        exact = exact or arm
        rows.append(measured(arm, exact, data))
        print(f"state_precision: {arm.name}, {time.perf_counter() - started:.0f} s so far", file=sys.stderr)
    assert exact is not None
    print("# User states in fewer bits: what that costs in AUC and in scores\n")
    hardware = torch.cuda.get_device_name() if ON_CUDA else f"one thread of {cpu_model()}, shared machine"
    sizes = info.model
    print(
        f"- hardware: {hardware}; commit {commit()}; torch {torch.__version__}; one run of {time.perf_counter() - started:.0f} s"
    )
    print(
        f"- {settings.import_events.dataset}, {args.config}: {len(data.requests)} test requests, {len(exact.probability_C)} "
        f"candidates, {len(np.unique(data.row_R))} users; model {info.model_version}, {sizes.width} wide, "
        f"L={sizes.history_events}, one cross and {sizes.num_self_layers} self layer(s), {sizes.num_heads} heads"
    )
    print("- differences of probabilities and costs are from the states in float32\n")
    print(
        "| | AUC | cost | GAUC | cost | largest difference | mean | bytes of a full state |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(shown(row, rows[0]))
    print()
    print(json.dumps({row["arm"]: {name: value for name, value in row.items() if name != "arm"} for row in rows}))


if __name__ == "__main__":
    main()
