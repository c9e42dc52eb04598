"""What a user's state saves: python -m benchmarks.user_state [--width 256] [--precision int8] [--read]

One run on one device, CUDA where there is a card; on a CPU a tiny size. First the scores of encoded and of appended states are
compared with a float64 forward pass over the whole histories; then, for each width, history length, number of users in a batch and
of candidates a user:

    recompute     the forward pass with the history encoded anew for every candidate, in blocks that fit
    encode        each user's history encoded, then the candidates scored: sharing within a request, the paper's cache
    hit           the state is in the pool on the device: scored, from NumPy to NumPy
    host hit      the state is in pinned host memory: brought to the device, then scored
    append n      n new events of each user: in place, timed over a whole stride, the windows' move included

Scoring runs as each of `SCORERS` does it. Rows are printed as they are measured; last, one JSON line with the ratios of the goals.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.model_arms.sizes import (
    DEVICE,
    ON_CUDA,
    SCHEMA,
    TASKS,
    model_settings,
    per_impression,
    random_batch,
    seconds,
)
from longer.arrays import Candidates, Histories, Int64, RequestBatch
from longer.config import ModelSettings
from longer.model.captured_scores import CapturedScores
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.pool import Precision, StateLayout, StatePool
from longer.model.states import UserState, append, encode, new_slots, score
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint
from longer.serving.store import StateStore

Score = Callable[[Sequence[UserState], Int64, Candidates], np.ndarray]


def eager(model: Longer, pool: StatePool) -> Score:
    return lambda states, request_ts_R, candidates: score(model, pool, states, request_ts_R, candidates)


def graph(model: Longer, pool: StatePool) -> Score:
    return CapturedScores(model, pool).score


SCORERS: dict[str, Callable[[Longer, StatePool], Score]] = {"eager": eager, **({"graph": graph} if ON_CUDA else {})}
"""Ways to score states of a pool: built once for each model and pool, then called with any batch."""

BLOCK_CANDIDATES = 64
VERSION = StateVersion("benchmark", "schema", "appendable")


class Users:
    """Users with full windows and their next events, a pool with room for their states, and the model."""

    def __init__(self, settings: ModelSettings, num_users: int, num_next: int, precision: Precision) -> None:
        torch.manual_seed(0)
        self.settings, self.num_users, self.rng = settings, num_users, np.random.default_rng(2)
        self.model = Longer(settings, SCHEMA, TASKS).to(DEVICE).eval()
        self.histories = random_batch(self.rng, np.full(num_users, settings.history_events + num_next), 1).histories
        layout = StateLayout.of(self.model, precision)
        self.state_bytes = layout.largest_rows * layout.row_bytes
        self.pool = StatePool(layout, (num_users + 2) * self.state_bytes, DEVICE)
        self.end_B = np.full(num_users, settings.history_events)

    def events(self, num_users: int, begin: int, end: int) -> Histories:
        rows = np.arange(num_users)
        return self.histories.slice_events(rows, np.full(num_users, begin), np.full(num_users, end))

    def encoded(self, num_users: int) -> list[UserState]:
        slots = new_slots(self.pool, self.end_B[:num_users])
        return encode(self.model, self.pool, self.events(num_users, 0, int(self.end_B[0])), slots)

    def free(self, states: Sequence[UserState]) -> None:
        for state in states:
            self.pool.slots.free(state.slot)

    def asked(self, num_users: int, num_candidates: int) -> RequestBatch:
        return random_batch(self.rng, np.ones(num_users, np.int64), num_candidates)


# -- correctness ------------------------------------------------------------------------------------------------------


def worst_difference(users: Users, num_users: int = 2, num_candidates: int = 16) -> dict[str, float]:
    """Largest difference of probabilities from the float64 forward pass: encoded, appended event by group, each scorer."""
    num_events, step = users.settings.history_events, 3 * users.settings.merge_size + 1
    states = users.encoded(num_users)
    end = num_events
    while end + step <= num_events + users.model.windows.stride_events + step:
        states = append(
            users.model, users.pool, states, users.events(num_users, end, end + step), [s.slot for s in states]
        )
        end += step
    asked = users.asked(num_users, num_candidates)
    start = users.model.windows.history_start(end) * users.settings.merge_size
    whole = RequestBatch(
        users.events(num_users, int(start), end),
        asked.row_R,
        np.full(num_users, end),
        asked.request_ts_R,
        asked.candidates,
        asked.request_id_R,
    )
    exact_model = Longer(users.settings, SCHEMA, TASKS)
    exact_model.load_state_dict(users.model.state_dict())
    exact_model = exact_model.to(DEVICE, torch.float64).eval()
    with torch.inference_mode(), torch.autocast(DEVICE.type, enabled=False):
        exact = exact_model(to_tensors(whole, DEVICE)).sigmoid().cpu()
    differences = {}
    for name, make in SCORERS.items():
        outputs = make(users.model, users.pool)(states, asked.request_ts_R, asked.candidates)
        differences[name] = float((torch.from_numpy(outputs).double().sigmoid() - exact).abs().max())
    users.free(states)
    return differences


# -- arms -------------------------------------------------------------------------------------------------------------


def recompute_ms(users: Users, num_candidates: int) -> float:
    """One user, every candidate with a history of its own."""
    asked = users.asked(1, num_candidates)
    batch = RequestBatch(
        users.events(1, 0, int(users.end_B[0])),
        asked.row_R,
        users.end_B[:1],
        asked.request_ts_R,
        asked.candidates,
        asked.request_id_R,
    )
    block = to_tensors(per_impression(batch, min(BLOCK_CANDIDATES, num_candidates)), DEVICE)
    num_blocks = num_candidates / min(BLOCK_CANDIDATES, num_candidates)
    with torch.inference_mode():
        return seconds(lambda: users.model(block), 3, 2) * num_blocks * 1e3


def encode_ms(users: Users, num_users: int) -> float:
    states = users.encoded(num_users)
    slots, events = [state.slot for state in states], users.events(num_users, 0, int(users.end_B[0]))
    elapsed_s = seconds(lambda: encode(users.model, users.pool, events, slots), 5, 2)
    users.free(states)
    return elapsed_s * 1e3


def append_ms(users: Users, num_users: int, num_new: int) -> float:
    """An append's mean over a stride of events: the last one moves the windows."""
    num_events, stride = users.settings.history_events, users.model.windows.stride_events
    num_steps = max(1, stride // num_new)
    steps = [
        users.events(num_users, num_events + n * num_new, num_events + (n + 1) * num_new) for n in range(num_steps + 2)
    ]
    states = users.encoded(num_users)
    remaining = iter(steps)

    def step() -> None:
        nonlocal states
        states = append(users.model, users.pool, states, next(remaining), [state.slot for state in states])

    elapsed_s = seconds(step, num_steps, 2)
    users.free(states)
    return elapsed_s * 1e3


def host_hit_ms(users: Users, make: Callable[[Longer, StatePool], Score], asked: RequestBatch) -> float:
    """A store without a device budget: each batch's states come from host memory, and go back."""
    num_users = asked.num_requests
    store = StateStore(users.model, 0, (num_users + 20) * 2 * users.state_bytes, users.pool.layout.precision)
    events = users.events(num_users, 0, int(users.end_B[0]))
    slots = store.slots([store.layout.largest_rows] * num_users)
    for user, state in enumerate(encode(users.model, store.pool, events, slots)):
        nothing = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
        store.put(user, VERSION, Entry(state, 0, 0, Known("", 0), nothing, True))
    store.release()
    scorer = make(users.model, store.pool)

    def step() -> None:
        taken = [held for user in range(num_users) if (held := store.take(user, VERSION))]
        store.bring(taken)
        scorer([held.entry.state for held in taken], asked.request_ts_R, asked.candidates)
        store.release()

    elapsed_s = seconds(step, 10, 2)
    if store.counters.promote < 12 * num_users:
        raise AssertionError("states did not come from host memory")
    return elapsed_s * 1e3


def rows_of(users: Users, num_users: Sequence[int], num_candidates: Sequence[int]) -> Iterator[dict[str, Any]]:
    size = {"width": users.settings.width, "L": users.settings.history_events, "state_bytes": users.state_bytes}
    for count in num_users:
        encoded_ms = encode_ms(users, count)
        yield size | {"users": count, "arm": "encode only", "ms": encoded_ms}
        for num_new in (1, 8, 64):
            yield size | {"users": count, "arm": f"append {num_new}", "ms": append_ms(users, count, num_new)}
        states = users.encoded(count)
        for candidates in num_candidates:
            what = size | {"users": count, "candidates": candidates}
            asked = users.asked(count, candidates)
            if count == 1:
                yield what | {"arm": "recompute", "ms": recompute_ms(users, candidates)}
            for name, make in SCORERS.items():
                scorer = make(users.model, users.pool)
                hit_ms = 1e3 * seconds(
                    lambda s=scorer, a=asked, u=states: s(u, a.request_ts_R, a.candidates), 10
                )  # as serving calls it
                per_s = count * candidates / hit_ms * 1e3
                yield what | {"arm": f"hit, {name}", "ms": hit_ms, "candidates_per_s": per_s}
                yield what | {"arm": f"encode, {name}", "ms": encoded_ms + hit_ms}
                yield what | {"arm": f"host hit, {name}", "ms": host_hit_ms(users, make, asked)}
        users.free(states)


def read_ms(num_events: int) -> float:
    """A user's history of so many events from a published sequence table on the local disk, its footers read before."""
    from benchmarks.point_reads import read_one, timed
    from jobs import build_sequences, generate_events
    from longer.config import load_settings
    from longer.data.tables import SequenceTable
    from longer.runner import start_ray
    from longer.schema import EventSchema

    num_users = 40
    sizes = {"num_users": num_users, "num_events": num_users * num_events, "user_zipf_exponent": 0.0}
    with tempfile.TemporaryDirectory() as root:
        settings = load_settings(overrides={"root": root, "generate": sizes})
        start_ray(settings.ray)
        generate_events.run(settings)
        build_sequences.run(settings)
        table = SequenceTable(settings.path("tables", "sequences"), EventSchema())
        users = list(range(1, num_users + 1))
        table.get(users)
        return timed(lambda user: read_one(table, user), users * 3)[0]


# -- the run ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, Any]], read: float | None) -> dict[str, Any]:
    """The ratios of the goals, each where it is measured."""

    def ms(arm: str, **size: int) -> float | None:
        found = [r["ms"] for r in rows if r["arm"] == arm and all(r.get(k) == v for k, v in size.items())]
        return found[0] if found else None

    def ratio(over: float | None, under: float | None) -> float | None:
        return round(over / under, 2) if over and under else None

    ratios: dict[str, Any] = {}
    for width in sorted({row["width"] for row in rows}):
        lengths = sorted({row["L"] for row in rows if row["width"] == width})
        most = max(row["users"] for row in rows)
        for name in SCORERS:
            for candidates in sorted({row["candidates"] for row in rows if "candidates" in row}):
                size = {"width": width, "L": lengths[-1], "users": 1, "candidates": candidates}
                hit, encoded = ms(f"hit, {name}", **size), ms(f"encode, {name}", **size)
                key = f"width{width}_L{lengths[-1]}_{candidates}_{name}"
                ratios[f"hit_vs_recompute_{key}"] = ratio(ms("recompute", **size), hit)
                ratios[f"hit_vs_encode_{key}"] = ratio(encoded, hit)
                if read and encoded:
                    ratios[f"hit_vs_read_and_encode_{key}"] = ratio(encoded + read, hit)
                host, only = ms(f"host hit, {name}", **size), ms("encode only", width=width, L=lengths[-1], users=1)
                if host and hit:
                    ratios[f"bringing_vs_encode_{key}"] = ratio(host - hit, only)
                batch = size | {"users": most}
                if batched := ms(f"hit, {name}", **batch):
                    ratios[f"candidates_per_s_{most}users_{key}"] = round(most * candidates / batched * 1e3)
        shortest, longest = (ms("append 8", width=width, L=n, users=most) for n in (lengths[0], lengths[-1]))
        ratios[f"append8_longest_vs_shortest_width{width}"] = ratio(longest, shortest)
        encoded = ms("encode only", width=width, L=lengths[-1], users=most)
        ratios[f"encode_vs_append8_width{width}"] = ratio(encoded, longest)
    return ratios


def shown(row: dict[str, Any]) -> str:
    rate = f"{row['candidates_per_s'] / 1e6:.3g}" if "candidates_per_s" in row else ""
    cells = (row["width"], row["L"], row["users"], row.get("candidates", ""), row["arm"], f"{row['ms']:.3g}", rate)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="only this width")
    parser.add_argument("--length", type=int, action="append", help="only this history length")
    parser.add_argument("--precision", default=None, choices=("float32", "bf16", "int8", "fp8"))
    parser.add_argument("--read", action="store_true", help="also time the history's read (starts Ray)")
    args = parser.parse_args()
    precision: Precision = args.precision or ("bf16" if ON_CUDA else "float32")
    sizes = [(d, n) for d in (32, 64) for n in (1_000, 2_000, 10_000)] if ON_CUDA else [(8, 128), (8, 256)]
    if args.width:
        sizes = [(args.width // 8, n) for d, n in sizes if d == sizes[0][0]]
    sizes = [(d, n) for d, n in sizes if not args.length or n in args.length]
    print(f"{DEVICE.type}, states in {precision}\n")
    print(
        "| width | L | users | candidates | arm | ms a batch | M candidates/s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows, tolerance = [], 1e-5 if precision == "float32" and not ON_CUDA else 0.02
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA, cache_enabled=False):
        for event_width, num_events in sizes:
            settings = model_settings(event_width, num_events, small=not ON_CUDA)
            users = Users(settings, 32 if ON_CUDA else 4, 2 * settings.windows.stride_events + 128, precision)
            differences = worst_difference(users)
            print(f"width {settings.width}, L {num_events}: probabilities within {differences}", file=sys.stderr)
            if max(differences.values()) > tolerance:
                raise AssertionError(f"states score otherwise than the float64 forward pass: {differences}")
            for row in rows_of(users, [1, 8, 32] if ON_CUDA else [1, 4], [64, 500, 1024] if ON_CUDA else [64]):
                rows.append(row)
                print(shown(row), flush=True)
            del users
    read = read_ms(sizes[-1][1]) if args.read else None
    print(f"\nread of one history: {read:.3g} ms\n" if read else "")
    print(json.dumps(summary(rows, read)))


if __name__ == "__main__":
    main()
