"""What a user's state saves: python -m benchmarks.user_state [--width 256] [--length 10000] [--rows FILE]

One device, CUDA where there is a card; on a CPU a tiny size. Each way's scores of encoded and of appended states are compared with
a float64 forward pass over the whole histories, before the way is timed, for each width, history length, number of users in a
batch and of candidates a user:

    recompute     the forward pass with the history encoded anew for every candidate, in blocks that fit, which are laid out
                  and sent before the clock starts
    encode        each user's history encoded once: sharing within a request, the paper's cache
    hit           the state is in the pool on the device: scored, from NumPy to NumPy
    host hit      the state is in pinned host memory: brought to the device, scored, and gone again without a copy, as it came
    host hit, grown   the same, copied back too, as a state must be that has been appended to
    pinned copy   64 MiB of pinned memory to the device in one piece: what the link allows host hits
    append n      n new events of each user, in place: the mean over a stride, the windows' move included
    append n, mixed   the same of users who stand anywhere in their strides, so that a few windows move in most batches
    read          one history from the published sequence table on the local disk
    replay        whole requests through serving's scorer, with the cache at several budgets and without it

Prints a Markdown page with every goal, met or missed; last, one JSON line. The longest histories come first, as served, then their
recomputation; a run that is ended early, by Ctrl-C or SIGTERM, prints the page of what it has. On CUDA processes side by side
compile first, and nothing is timed meanwhile. To spread a run over several cards, give each its
`--width`, `--length`, `--only` and a file for its `--rows`; then `--page FILE...` makes the page of all of them. `--profile` times
nothing: it prints which kernels a hit, an encode and an append launch on a card, and how long each takes.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.conditions import commit, cpu_model
from benchmarks.model_arms.sizes import ON_CUDA, model_settings
from benchmarks.state_arms import compiled, kernels, replay, states
from benchmarks.state_arms.page import page, shown
from benchmarks.state_arms.users import Users, Way, worst_difference
from longer.model.state_layout import Precision

Row = dict[str, Any]
Size = tuple[int, int]
"""Event width, and history length."""

EVENT_WIDTHS = (32, 64) if ON_CUDA else (8,)
LENGTHS = (10_000, 1_000, 2_000) if ON_CUDA else (256, 128)
NUM_USERS = (1, 32, 8) if ON_CUDA else (1, 4)
NUM_CANDIDATES = (64, 500, 1_024) if ON_CUDA else (16, 40)
REPLAYED = {(32, 2_000), (32, 10_000)} if ON_CUDA else {(8, 256)}
"""Event width and history length of the replays that a whole run makes."""


def rows_of(sizes: list[Size], precision: Precision, only: str | None) -> Iterator[Row]:
    """All rows, in an order in which a run that is cut short answers most: the longest histories as served, then what they are
    compared with, then the rest."""
    if only != "replay":
        yield from state_rows(sizes, precision)
    for size in sizes:
        if only == "replay" or (only is None and size in REPLAYED):
            yield from replay.rows_of(model_settings(*size, small=not ON_CUDA), precision)


def state_rows(sizes: list[Size], precision: Precision) -> Iterator[Row]:
    """Rows of states, each way's after the way is checked."""
    longest = max(num_events for _, num_events in sizes)
    sizes = sorted(sizes, key=lambda size: size[1] != longest)
    first = [size for size in sizes if size[1] == longest]
    wanted = [(size, what) for size in first for what in (*compiled.SERVED, compiled.RECOMPUTED)]
    running = compiled.start(wanted[1:], precision) if ON_CUDA else []  # this process compiles the first itself
    made = {size: Users(model_settings(*size, small=not ON_CUDA), max(NUM_USERS), precision) for size in sizes}

    def of_way(users: Users, way: Way) -> Iterator[Row]:
        for num_users in (1, 2):
            yield checked(users, way, num_users)
            compiled.wait(running)
        if way is users.served:
            yield from states.pinned_copy_rows(users)
        yield from states.rows_of(users, way, NUM_USERS, NUM_CANDIDATES)

    for size in first:
        yield from of_way(made[size], made[size].served)
    for size in first:
        yield from states.recompute_rows(made[size], NUM_CANDIDATES[1:2])
    for size in sizes[len(first) :]:
        yield from of_way(made[size], made[size].served)
    if ON_CUDA:
        compiled.wait(compiled.start([(size, what) for size in first for what in compiled.EAGER], precision))
    for size, users in made.items():
        others = NUM_CANDIDATES if size not in first else [n for n in NUM_CANDIDATES if n != NUM_CANDIDATES[1]]
        yield from states.recompute_rows(users, others)
        for way in users.ways[:-1]:
            yield from of_way(users, way)


def checked(users: Users, way: Way, num_users: int) -> Row:
    """How far states' scores lie from the float64 forward pass; fails if that is not rounding."""
    name = f"width{users.settings.width}_L{users.num_events}_{num_users}_{way.name}"
    difference = worst_difference(users, way, num_users)
    if difference > (0.02 if ON_CUDA else 1e-4):
        raise AssertionError(f"states score otherwise than the float64 forward pass: {name}, {difference:.2g}")
    return {"differences": {name: difference}}


def conditions(widths: list[int], precision: Precision) -> Row:
    """Of a run, and what it sets out to measure."""
    hardware = torch.cuda.get_device_name() if ON_CUDA else cpu_model()
    return {
        "conditions": {
            "hardware": f"one {hardware}" if ON_CUDA else f"{torch.get_num_threads()} threads of {hardware}",
            "software": f"commit {commit()}; torch {torch.__version__}",
            "states": f"states in {precision}",
            "widths": widths,
            "users": NUM_USERS,
            "candidates": NUM_CANDIDATES,
        }
    }


def measured(rows: Iterator[Row], path: Path | None) -> list[Row]:
    """The rows, written as they come, and told with what they took; those so far if the run is ended early."""
    found, began, last = [], time.perf_counter(), time.perf_counter()
    signal.signal(signal.SIGTERM, _interrupted)
    with (path or Path(os.devnull)).open("w") as file:

        def note(row: Row) -> None:
            found.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        try:
            for row in rows:
                note(row)
                took_s, last = time.perf_counter() - last, time.perf_counter()
                first = f", {row['first_s']:.1f} s of it the first step" if "first_s" in row else ""
                what = shown(row) if "arm" in row else json.dumps(row)
                print(f"{what}  [{took_s:.1f} s{first}]", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("user_state: ended early, the page is of what there is", file=sys.stderr)
            note({"ended_early": True})
        note({"seconds": round(time.perf_counter() - began, 1)})
    return found


def _interrupted(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does, once: `timeout` signals the process, and then its group."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append", help="only this model width")
    parser.add_argument("--length", type=int, action="append", help="only this history length")
    parser.add_argument("--only", choices=("states", "replay"), help="only these arms")
    parser.add_argument(
        "--precision", default="bf16" if ON_CUDA else "float32", choices=("float32", "bf16", "int8", "fp8")
    )
    parser.add_argument("--rows", type=Path, help="write the rows as JSON lines here too, as they are measured")
    parser.add_argument("--page", type=Path, nargs="+", help="measure nothing: the page of these files of rows")
    parser.add_argument("--profile", action="store_true", help="measure nothing: the kernels of each step, on a card")
    args = parser.parse_args()
    if args.profile and not ON_CUDA:
        parser.error("--profile needs a GPU: run it on a machine with one")
    if not ON_CUDA:
        torch.set_num_threads(1)
    if args.page:
        print(page([json.loads(line) for file in args.page for line in file.read_text().splitlines()]))
        return
    widths = [width // 8 for width in args.width] if args.width and ON_CUDA else EVENT_WIDTHS
    sizes = [(d, n) for d in widths for n in args.length or LENGTHS]
    if args.profile:
        compiled.wait(compiled.start([(size, what) for size in sizes for what in compiled.SERVED], args.precision))
        for event_width, num_events in sizes:
            print(f"## width {8 * event_width}, L = {num_events}, states in {args.precision}\n", flush=True)
            users = Users(model_settings(event_width, num_events), max(kernels.NUM_USERS), args.precision)
            for table in kernels.tables(users):
                print(table, flush=True)
        return
    told = conditions([model_settings(d, sizes[0][1], small=not ON_CUDA).width for d in widths], args.precision)
    print(page(measured(chain([told], rows_of(sizes, args.precision, args.only)), args.rows)))


if __name__ == "__main__":
    main()
