"""What a user's state saves: python -m benchmarks.user_state [--width 256] [--length 10000] [--rows FILE]

One device, CUDA where there is a card; on a CPU a tiny size. First the scores of encoded and of appended states are compared with a
float64 forward pass over the whole histories; then, for each width, history length, number of users in a batch and of candidates
a user:

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

Prints a Markdown page with every goal, met or missed; last, one JSON line. To spread a run over several cards, give each its
`--width`, `--length`, `--only` and a file for its `--rows`; then `--page FILE...` makes the page of all of them. `--profile` times
nothing: it prints which kernels a hit, an encode and an append launch on a card, and how long each takes.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_arms.sizes import ON_CUDA, model_settings
from benchmarks.point_reads import commit
from benchmarks.quickstart import cpu_model
from benchmarks.state_arms import kernels, replay, states
from benchmarks.state_arms.page import page, shown
from benchmarks.state_arms.users import Users, worst_difference
from longer.model.pool import Precision

Row = dict[str, Any]

EVENT_WIDTHS = (32, 64) if ON_CUDA else (8,)
LENGTHS = (1_000, 2_000, 10_000) if ON_CUDA else (128, 256)
NUM_USERS = (1, 8, 32) if ON_CUDA else (1, 4)
NUM_CANDIDATES = (64, 500, 1_024) if ON_CUDA else (16, 40)
REPLAYED = {(32, 2_000), (32, 10_000)} if ON_CUDA else {(8, 256)}
"""Event width and history length of the replays that a whole run makes."""


def rows_of(
    event_width: int, num_events: int, precision: Precision, only: str | None, differences: dict[str, float]
) -> Iterator[Row]:
    """All arms of one size; the differences that correctness was checked by are added to those given."""
    settings = model_settings(event_width, num_events, small=not ON_CUDA)
    if only != "replay":
        users = Users(settings, max(NUM_USERS), precision)
        found = {f"{n}_{way}": value for n in (1, 2) for way, value in worst_difference(users, n).items()}
        differences |= {f"width{settings.width}_L{num_events}_{what}": value for what, value in found.items()}
        if max(found.values()) > (0.02 if ON_CUDA else 1e-4):
            raise AssertionError(f"states score otherwise than the float64 forward pass: {found}")
        yield from states.rows_of(users, NUM_USERS, NUM_CANDIDATES)
        del users
    if only == "replay" or (only is None and (event_width, num_events) in REPLAYED):
        yield from replay.rows_of(settings, precision)


def measured(sizes: list[tuple[int, int]], precision: Precision, only: str | None) -> Iterator[Row]:
    """Rows of all sizes as they are measured; last, the conditions."""
    started, differences = time.perf_counter(), dict[str, float]()
    for event_width, num_events in sizes:
        yield from rows_of(event_width, num_events, precision, only, differences)
    hardware = torch.cuda.get_device_name() if ON_CUDA else cpu_model()
    yield {
        "conditions": {
            "hardware": f"one {hardware}" if ON_CUDA else f"{torch.get_num_threads()} threads of {hardware}",
            "software": f"commit {commit()}; torch {torch.__version__}",
            "states": f"states in {precision}",
            "differences": differences,
            "seconds": round(time.perf_counter() - started, 1),
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append", help="only this model width")
    parser.add_argument("--length", type=int, action="append", help="only this history length")
    parser.add_argument("--only", choices=("states", "replay"), help="only these arms")
    parser.add_argument(
        "--precision", default="bf16" if ON_CUDA else "float32", choices=("float32", "bf16", "int8", "fp8")
    )
    parser.add_argument(
        "--rows", type=Path, help="write the rows as JSON lines here, as they are measured, and no page"
    )
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
        for event_width, num_events in sizes:
            print(f"## width {8 * event_width}, L = {num_events}, states in {args.precision}\n")
            users = Users(model_settings(event_width, num_events), max(kernels.NUM_USERS), args.precision)
            print("\n".join(kernels.tables(users)), flush=True)
        return
    rows = []
    with args.rows.open("w") if args.rows else open("/dev/null", "w") as file:
        for row in measured(sizes, args.precision, args.only):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            print(shown(row) if "arm" in row else json.dumps(row), file=sys.stderr, flush=True)
    if not args.rows:
        print(page(rows))


if __name__ == "__main__":
    main()
