"""Offline scoring from Parquet to Parquet, against the same model from scratch and in memory: python -m benchmarks.batch_scoring

One run on one machine and one device (a CPU core, or with `--device cuda` a GPU that `--scorers` actors share), on a generated log
in which all users are alike, with a model of random weights:

    the job           `jobs.batch_score` of the test split: each history encoded once and appended to, or on a GPU in packs
    from scratch      the same model in Ray Data's `map_batches`, as many actors as the job has, for ten seconds: every request
                      encodes its own history, in batches laid out ahead and kernels compiled before; and alone, laid out before
    bare model loop   the model alone over what is in memory, of a part of the requests: in packs that share a history, batches
                      laid out on the device before, of several sizes; and by the job's own scoring function, chunks read
                      before. The fastest one is the limit.
    best items        users x the whole catalogue with top_k, and the memory that took against the size of the score matrix
    linear in users   a quarter and all of the users x --candidates

With `--catalogue-items N` only the best items, of N, for a tenth and for all of `--top-k-users`, on all GPUs of the machine, and of
a tenth of N for that tenth: the memory must be the same. On a GPU with a smaller model, or 10,000 users x 1 M items would take the
better part of an hour.

Rates leave out the start of Ray and of the actors with their kernels, which is given beside them. On a CPU they are per second
of CPU time, of all threads of the processes that score: what else runs on the machine does not count. Tells its rates as it
goes; `--out FILE` keeps what there is after each stage. Prints a Markdown page; last, one JSON line: the job's scores per second,
its ratios to `from scratch` and to the bare loop, and what a million scores cost with the start of actors and without.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from benchmarks.batch_arms.arms import Loop, bare_loops, from_scratch, loop_rate
from benchmarks.batch_arms.page import (
    JOB,
    SCRATCH,
    SCRATCH_LOOP,
    Measured,
    actors_in_words,
    catalogue_page,
    costs,
    page,
    steady_seconds,
)
from benchmarks.batch_arms.world import (
    fresh_run,
    items_file,
    make_tables,
    pool_of,
    scoring_seconds,
    settings_of,
    users_file,
)
from longer.batch_settings import BatchSettings
from longer.config import Settings
from longer.progress import say
from longer.runner import start_ray
from longer.storage import Version

MOST_START_S = 600


def main() -> None:
    asked = _options()
    torch.set_num_threads(1)
    lines, summary = _catalogue(asked) if asked.catalogue_items else _split(asked)
    told = "\n".join([*lines, json.dumps(summary)])
    if asked.out:
        Path(asked.out).write_text(told + "\n")
    print(told)


def _split(asked: argparse.Namespace) -> tuple[list[str], dict[str, float]]:
    settings, kept = settings_of(asked, asked.scorers), Kept(asked.out)
    _start_ray(settings)
    with kept.timed("tables"):
        make_tables(settings, with_requests=True)
    loops = dict[str, Loop]()
    for _ in range(asked.runs):  # all in turn, so that a change in the machine's mood meets all of them
        with kept.timed("the job"):
            scored = fresh_run(settings, settings.batch_score)
            kept.note(JOB, scored.manifest["num_rows"] / scoring_seconds(scored))
        say("batch_scoring", "; ".join(actors_in_words(scored)))
        if not loops:
            with kept.timed("bare loops' batches and kernels"):
                loops = bare_loops(settings, asked.device)
        with kept.timed("bare loops"):
            for name, loop in loops.items():
                kept.note(name, loop_rate(loop, asked.device))
        with kept.timed("from scratch"):
            kept.note(SCRATCH, from_scratch(settings, asked.scratch_requests))
    loops.clear()  # the actors need the memory
    torch.cuda.empty_cache()
    pool = pool_of(asked, asked.scorers)
    best = None
    if asked.top_k_users:
        with kept.timed("best items"):
            users = users_file(settings, min(asked.users, asked.top_k_users))
            best = fresh_run(settings, BatchSettings(**pool, catalogue=True, top_k=asked.top_k, users=users))
    linear = {}
    if num_users := min(asked.users, asked.linear_users):
        with kept.timed("linear in users"):
            items = items_file(settings, asked.candidates)
            for n in (num_users // 4, num_users):
                chosen = BatchSettings(**pool, users=users_file(settings, n), candidates=items)
                linear[n] = fresh_run(settings, chosen)
    rates = kept.rates
    measured = Measured(asked, settings, dict(rates), scored, best, linear, kept.stages)
    job, scratch = median(rates[JOB]), median(rates[SCRATCH])
    limit = max(median(of_runs) for name, of_runs in rates.items() if name not in (JOB, SCRATCH, SCRATCH_LOOP))
    summary = {"scores_per_s": job, "vs_from_scratch": job / scratch, "vs_bare_loop": job / limit, **costs(scored)}
    return page(measured, summary), summary


def _catalogue(asked: argparse.Namespace) -> tuple[list[str], dict[str, float]]:
    num_devices = torch.cuda.device_count() if asked.device == "cuda" else 1
    num_actors, kept = num_devices * asked.scorers, Kept(asked.out)
    asked.users = asked.top_k_users
    settings = settings_of(asked, num_actors)
    _start_ray(settings)
    with kept.timed("tables"):
        make_tables(settings, with_requests=False)

    def best(num_users: int, **items: Any) -> Version:
        name = f"{num_users} users, {'a tenth of the' if 'candidates' in items else 'all'} items"
        with kept.timed(name):
            users, pool = users_file(settings, num_users), pool_of(asked, num_actors)
            version = fresh_run(settings, BatchSettings(**pool, **items, top_k=asked.top_k, users=users))
            kept.note(name, version.manifest["num_rows"] / scoring_seconds(version))
        return version

    tenth = asked.top_k_users // 10
    whole = best(asked.top_k_users, catalogue=True)
    runs = {tenth: best(tenth, catalogue=True), asked.top_k_users: whole}
    of_tenth = best(tenth, candidates=items_file(settings, asked.catalogue_items // 10))
    small_s, large_s = (steady_seconds(version) / n for n, version in runs.items())
    summary = {
        "scores_per_s": whole.manifest["num_rows"] / scoring_seconds(whole),
        **costs(whole),
        "cost_of_a_user_all_vs_tenth": large_s / small_s,
    }
    return catalogue_page(asked, settings, num_devices, runs, of_tenth, kept.stages), summary


def _start_ray(settings: Settings) -> None:
    """Runs begin when all their actors are up, so that a rate is that of all of them."""
    start_ray(settings.ray)
    ray.data.DataContext.get_current().wait_for_min_actors_s = MOST_START_S


@dataclass
class Kept:
    """Rates by what was measured, and seconds by stage; told as they come, and kept in `file` whatever happens afterwards."""

    file: str | None
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, rate: float) -> None:
        """Adds a round's rate."""
        self.rates[name].append(rate)
        say("batch_scoring", f"{name}: {rate:,.0f} scores/s")
        self._keep()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds to the stage's seconds."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        say("batch_scoring", f"{stage}: {seconds:.1f} s")
        self._keep()

    def _keep(self) -> None:
        if self.file:
            Path(self.file).write_text(
                json.dumps({"scores_per_s": self.rates, "stages_s": self.stages}, indent=1) + "\n"
            )


DEFAULTS = {
    "cpu": {"precision": "float32", "scorers": 1, "batch_bytes": 256 << 20, "runs": 3}
    | {"history_events": 1_000, "merge_size": 4, "query_groups": 50, "event_width": 16, "self_layers": 2}
    | {"users": 200, "requests_per_user": 40, "negatives": 9, "candidates": 1_000}
    | {"scratch_requests": 1_000, "linear_users": 200, "top_k_users": 50, "items": 10_000},
    "cuda": {"precision": "bf16", "scorers": 4, "batch_bytes": 8_000_000_000, "runs": 1}
    | {"history_events": 10_000, "merge_size": 8, "query_groups": 100, "event_width": 32, "self_layers": 3}
    | {"users": 6_400, "requests_per_user": 200, "negatives": 99, "candidates": 10_000}
    | {"scratch_requests": 40_000, "linear_users": 6_400, "top_k_users": 0, "items": 50_000},
}
"""Sizes that keep the device busy for some seconds; all of it takes minutes."""

CATALOGUE = {"cpu": {}, "cuda": {"scorers": 1, "requests_per_user": 40, "history_events": 1_000, "merge_size": 4}}
CATALOGUE["cuda"] |= {"query_groups": 50, "event_width": 16, "self_layers": 1, "top_k_users": 10_000}
"""What `--catalogue-items` changes of them."""


def _options() -> argparse.Namespace:
    lines = [f"defaults on {device}: {sizes}" for device, sizes in DEFAULTS.items()]
    lines += [f"with --catalogue-items on {device}: {sizes}" for device, sizes in CATALOGUE.items() if sizes]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--precision", choices=("float32", "bf16"), help="of products; bf16 on a GPU only")
    parser.add_argument("--scorers", type=int, help="actors that share a device")
    parser.add_argument("--history-events", type=int, help="L")
    parser.add_argument("--merge-size", type=int, help="K")
    parser.add_argument("--query-groups", type=int, help="k, twice the stride in groups")
    parser.add_argument("--event-width", type=int, help="d; tokens are K*d wide")
    parser.add_argument("--self-layers", type=int, help="N")
    parser.add_argument("--users", type=int, help="users of the log")
    parser.add_argument("--requests-per-user", type=int, help="about how many")
    parser.add_argument("--negatives", type=int, help="candidates of a request besides its item")
    parser.add_argument("--candidates", type=int, help="items that all of --linear-users are asked about")
    parser.add_argument(
        "--linear-users", type=int, help="users asked about --candidates, and a quarter of them, if not 0"
    )
    parser.add_argument("--items", type=int, help="items of the log")
    parser.add_argument("--top-k", type=int, default=100, help="best items of a user that are kept (default 100)")
    parser.add_argument("--top-k-users", type=int, help="users who get the best items of all, if not 0")
    parser.add_argument("--catalogue-items", type=int, help="only best items, of a catalogue of so many")
    parser.add_argument("--scratch-requests", type=int, help="scored from scratch, at most")
    parser.add_argument("--batch-bytes", type=int, help="batch_score.batch_bytes")
    parser.add_argument("--data", default="runs/benchmark_batch_scoring", help="folder for tables, which stay")
    parser.add_argument("--out", help="file that has what is measured so far, and at the end the page")
    parser.add_argument("--runs", type=int, help="rounds over the arms; rates are medians")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    parser.set_defaults(**DEFAULTS[given.device] | (CATALOGUE[given.device] if given.catalogue_items else {}))
    return parser.parse_args()


if __name__ == "__main__":
    main()
