"""Event log to one row a user, against DuckDB, Polars and Ray's `map_groups`: python -m benchmarks.sequences [--events N]

Prints a Markdown page with the time and peak memory of every contender in every form, and last one JSON line. Each run is a
process of its own on two cores; its result is compared with the log before its time counts. Below 20 million events the part
under a memory limit is left out, and `--events 1000000` takes about a minute. Needs the extra `bench`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from benchmarks.conditions import cpu_model
from benchmarks.regroup import libraries
from benchmarks.regroup.digest import Digest, digest_log, problem_of, rows_of_files, rows_of_table
from benchmarks.regroup.job import Job
from benchmarks.regroup.measure import Measured, limit_in_words, measure
from longer.storage import Table, Version

FULL_EVENTS = 20_000_000
EVENTS_PER_USER = 200
NUM_DAYS = 30
NUM_CORES = 2
SEED = 1
SHUFFLES = ("ray: repartition(keys)", "ray: repartition(keys), disk shuffle")
LIMITED = (
    *(
        "longer",
        "longer: one more day",
        "copy floor: two files at a time",
        "copy floor: the same, encoded as our tables are",
        "polars: group_by, arg_sort of lists",
        "polars: sort by time, group_by",
    ),
    *("polars: two passes by hash", "duckdb: list_sort of structs", "duckdb: two passes by hash"),
    "ray: groupby.map_groups",
)
"""Without the forms that hold all lists at once and have lost at a tenth of the size, whatever they would need here."""
GOALS: tuple[tuple[str, str, Callable[[dict[str, float]], float], float, bool], ...] = (
    ("time over the fastest Polars'", "at most", lambda s: 1 / s["vs_polars"], 1.25, False),
    ("the fastest DuckDB's time over ours", "at least", lambda s: s["vs_duckdb"], 1.5, True),
    ("`map_groups`' time over ours", "at least", lambda s: s["vs_ray_map_groups"], 10, True),
    ("time over the fastest copy's", "at most", lambda s: s["vs_copy_floor"], 2, False),
    ("under the limit, the fastest Polars' time over ours", "at least", lambda s: s["limited_vs_polars"], 1.5, True),
    ("under the limit, the fastest DuckDB's time over ours", "at least", lambda s: s["limited_vs_duckdb"], 1.5, True),
    ("time for ten times the events", "at most", lambda s: s["growth_10x"], 11, False),
    ("peak memory for it", "at most", lambda s: s["peak_bytes_200m"] / s["peak_bytes_20m"], 1.3, False),
    ("full build over one more day", "at least", lambda s: s["incremental_speedup"], 10, True),
)
"""What this platform set out for: a ratio of the last line, and its bound."""
VERSIONED = ("ray", "pyarrow", "polars", "duckdb", "numpy")


@dataclass
class Stage:
    """One log, and every run on it."""

    log: Version
    digest: Digest
    num_events: int
    memory_bytes: int | None
    runs: dict[str, list[Measured]] = field(default_factory=dict)
    output_bytes: dict[str, int] = field(default_factory=dict)

    def seconds(self, contender: str) -> float | None:
        """The median of a contender's runs, or of its fastest form's where `contender` begins the names of several."""
        times = [
            median(run.seconds for run in runs if run.seconds is not None)
            for name, runs in self.runs.items()
            if name == contender or name.startswith(f"{contender}: ")
            if name != "longer: one more day" and all(run.seconds is not None for run in runs)
        ]
        return min(times, default=None)

    def peak_bytes(self, contender: str) -> int | None:
        """The most that any run of a contender held; None if one has no time."""
        runs = self.runs.get(contender, [])
        return max((run.peak_bytes for run in runs), default=None) if all(run.seconds for run in runs) else None


def main() -> None:
    options = _options()
    data = Path(options.data).absolute()
    stages = [_stage(data, options.events, options.events // EVENTS_PER_USER, None)]
    _run(stages[0], _contenders(options), options.runs, data, options.timeout_s)
    if options.limited_events:
        limit_bytes = int(options.memory_gb * 1e9)
        stages.append(_stage(data, options.limited_events, options.events // EVENTS_PER_USER, limit_bytes))
        _run(stages[1], _chosen(LIMITED, options), 1, data, options.timeout_s)
    summary = _summary(stages, options)
    text = "\n".join([*_page(stages, options), "", *_goals(summary), "", json.dumps(summary)])
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=FULL_EVENTS, help="events of the log (default 20 million)")
    parser.add_argument("--runs", type=int, default=1, help="rounds over all contenders; times are medians (default 1)")
    parser.add_argument("--limited-events", type=int, help="events of the log under the memory limit; 0: leave it out")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="the limit, in 10^9 bytes (default 6)")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="longest time of one run (default 900)")
    parser.add_argument("--shuffles", action="store_true", help="also measure Ray's own shuffles for the same job")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only contenders whose names contain one of these")
    parser.add_argument("--data", default="runs/benchmark_sequences", help="folder for logs, which stay, and results")
    parser.add_argument("--output", help="also write the page to this file")
    options = parser.parse_args()
    if options.limited_events is None:
        options.limited_events = 10 * options.events if options.events >= FULL_EVENTS else 0
    return options


def _contenders(options: argparse.Namespace) -> list[str]:
    shuffles = SHUFFLES if options.shuffles else ()
    names = ["longer", "longer: one more day", *libraries.FORMS, "ray: groupby.map_groups", *shuffles]
    return _chosen(names, options)


def _chosen(names: Iterable[str], options: argparse.Namespace) -> list[str]:
    return [name for name in names if not options.only or any(part in name for part in options.only)]


def _stage(data: Path, num_events: int, num_users: int, memory_bytes: int | None) -> Stage:
    """The log of the stage, generated unless an earlier run has left it."""
    root = data / f"log_{num_events}_{num_users}"
    sizes = {"num_events": num_events, "num_users": num_users, "num_days": NUM_DAYS, "period_days": NUM_DAYS // 2}
    sizes |= {"episode_days": 1, "num_items": 1_000_000}
    flags = [word for name, value in sizes.items() for word in (f"--generate.{name}", str(value))]
    command = [sys.executable, "-m", "jobs.generate_events", "--root", str(root), "--seed", str(SEED), *flags]
    subprocess.run([*command, "--ray.num_cpus", str(NUM_CORES)], check=True)
    log = Table(f"{root}/tables/events").require("jobs.generate_events")
    return Stage(log, digest_log(log.files(), num_users), num_events, memory_bytes)


def _run(stage: Stage, contenders: Iterable[str], num_rounds: int, data: Path, timeout_s: float) -> None:
    """Rounds over all contenders, so that a change in the machine's mood meets all of them; the slowest runs once."""
    for number in range(num_rounds):
        for name in contenders:
            if number and name == "ray: groupby.map_groups":
                continue
            run = _checked_run(stage, name, data, timeout_s)
            stage.runs.setdefault(name, []).append(run)
            told = run.problem or f"{run.seconds:.2f} s"
            print(
                f"{stage.num_events} events: {name}: {told}, {run.peak_bytes / 1e9:.2f} GB", file=sys.stderr, flush=True
            )


def _checked_run(stage: Stage, name: str, data: Path, timeout_s: float) -> Measured:
    """A run whose time is dropped if its result is not right."""
    out, scratch = data / "out", data / "scratch"
    for folder in (out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    job = Job(stage.log.path, str(out), str(scratch), stage.num_events, NUM_CORES, stage.memory_bytes)
    run = measure(name, job, timeout_s)
    if not run.problem:
        stage.output_bytes[name] = sum(Path(file).stat().st_size for file in run.files)
    if not run.problem and not name.startswith("copy floor"):
        rows = rows_of_table(f"{out}/tables/sequences") if name.startswith("longer") else rows_of_files(run.files)
        if wrong := problem_of(rows, stage.digest):
            run = replace(run, seconds=None, problem=wrong)
    for folder in (out, scratch):
        shutil.rmtree(folder)
    return run


def _page(stages: list[Stage], options: argparse.Namespace) -> list[str]:
    """The results page without its last line."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    asked = f"`python -m benchmarks.sequences --events {options.events} --runs {options.runs}`"
    python = f"python {sys.version.split()[0]}"
    lines = [
        "# Event log to one row a user",
        "",
        f"{asked}; medians of the runs' times, the largest of their peaks.",
        "",
        f"- hardware: {NUM_CORES} cores of {cpu_model()} for every contender; logs and results on its disk, shared machine",
        f"- commit {git.stdout.strip()}; {python}, {', '.join(f'{name} {_version(name)}' for name in VERSIONED)}",
        "- the job: lists of item, time and action of every user, oldest to newest, nothing cut, as zstd (level 1) Parquet",
        "- a time counts only if the result holds exactly the log's events, each user in one row, in the order of time",
        "- memory: anonymous and shared memory of the whole process tree, sampled 20 times a second, without page cache",
        "- start-up (imports; for Ray also its start, a first small run and three seconds to settle) is not part of the time",
        "- one more day: the last day's file added to a table of the days before; its events lie beside the rows, where readers "
        "merge them, until they are a fifth of them",
    ]
    for stage in stages:
        lines += ["", *_table(stage)]
    return lines


def _table(stage: Stage) -> list[str]:
    limit = ""
    if stage.memory_bytes:
        limit = f", {stage.memory_bytes / 1e9:g} GB of memory for each contender, held by {limit_in_words()}"
    settings = stage.log.manifest["settings"]
    lines = [
        f"## {stage.num_events:,} events of {settings['num_users']:,} users over {NUM_DAYS} days{limit}",
        "",
        f"Log: {stage.log.manifest['num_bytes'] / 1e6:,.0f} MB, seed {settings['seed']}, Zipf activity with exponent "
        f"{settings['user_zipf_exponent']}; the busiest user has {stage.digest.num_events_U.max():,} events.",
        "",
        "| contender | seconds | events/s | peak GB | start-up s | result MB | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in stage.runs.items():
        problem = next((run.problem for run in runs if run.problem), "")
        peak = f"{max(run.peak_bytes for run in runs) / 1e9:.2f}"
        if problem:
            lines.append(f"| {name} | {problem} | | {peak} | | | {len(runs)} |")
            continue
        times = [run.seconds for run in runs if run.seconds is not None]
        spread = f" ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
        startup = median(run.startup_seconds for run in runs if run.startup_seconds is not None)
        seconds = median(times)
        num_events = stage.num_events // NUM_DAYS if name == "longer: one more day" else stage.num_events
        lines.append(
            f"| {name} | {seconds:.1f}{spread} | {num_events / seconds:,.0f} | {peak} | {startup:.1f} | "
            f"{stage.output_bytes[name] / 1e6:,.0f} | {len(runs)} |"
        )
    return lines


def _goals(summary: dict[str, float | None]) -> list[str]:
    """Each goal with its figure, met or missed; what was not measured has none."""
    known = {name: value for name, value in summary.items() if value is not None}
    lines = ["## Goals", "", "| ratio | goal | measured | |", "|---|---|---|---|"]
    for title, bound, ratio, limit, at_least in GOALS:
        try:
            value = ratio(known)
        except KeyError:
            lines.append(f"| {title} | {bound} {limit:g} | | not measured, or a side has no time |")
            continue
        is_met = value >= limit if at_least else value <= limit
        lines.append(f"| {title} | {bound} {limit:g} | {value:.2f} | {'met' if is_met else '**missed**'} |")
    return lines


def _summary(stages: list[Stage], options: argparse.Namespace) -> dict[str, float | None]:
    full = stages[0]
    ours = full.seconds("longer")
    limited = stages[1] if len(stages) > 1 else None
    limited_ours = limited.seconds("longer") if limited else None
    is_tenfold = options.limited_events == 10 * options.events
    increment = [run.seconds for run in full.runs.get("longer: one more day", []) if run.seconds is not None]
    return {
        "events_per_s": _over(full.num_events, ours),
        "vs_duckdb": _over(full.seconds("duckdb"), ours),
        "vs_polars": _over(full.seconds("polars"), ours),
        "vs_ray_map_groups": _over(full.seconds("ray: groupby.map_groups"), ours),
        "vs_copy_floor": _over(ours, full.seconds("copy floor")),
        "peak_bytes_20m": full.peak_bytes("longer") if full.num_events == FULL_EVENTS else None,
        "peak_bytes_200m": limited.peak_bytes("longer") if limited and limited.num_events == 10 * FULL_EVENTS else None,
        "growth_10x": _over(limited_ours, ours) if is_tenfold else None,
        "limited_vs_polars": _over(limited.seconds("polars"), limited_ours) if limited else None,
        "limited_vs_duckdb": _over(limited.seconds("duckdb"), limited_ours) if limited else None,
        "incremental_speedup": _over(ours, median(increment) if increment else None),
    }


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator is not None else None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
