"""The benchmark's Markdown page: hardware, versions, commit, sizes, rates, and the goals beside what was measured."""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

import pyarrow as pa
import ray
import torch

from benchmarks.batch_arms.world import num_cores, scoring_seconds
from benchmarks.conditions import commit, cpu_model
from longer.config import Settings
from longer.storage import Version

JOB = "**the job**"
SCRATCH = "each request from scratch (`map_batches`, as many actors as the job has)"
SCRATCH_LOOP = "each request from scratch, laid out on the device before, one process"
LINEAR_WITHIN = 0.1
"""By how much the cost of a user may change between a quarter of the users and all of them, to count as linear."""

WITHIN_BUDGETS = 2
MORE_OF_BUDGET = 0.1


@dataclass(frozen=True)
class Measured:
    """All that a run of the split has found; `stages` are seconds by what took them."""

    asked: argparse.Namespace
    settings: Settings
    rates: dict[str, list[float]]
    scored: Version
    best: Version | None
    linear: dict[int, Version]
    stages: dict[str, float]


def page(of: Measured, summary: dict[str, float]) -> list[str]:
    told, job, num_users = of.scored.manifest, median(of.rates[JOB]), of.scored.manifest["num_users"]
    return [
        "# Offline scoring, from Parquet to Parquet\n",
        *_conditions(of.asked, of.settings, 1),
        f"- {num_users} users with {told['num_requests'] / num_users:.0f} requests each on average, {told['num_rows']:,} scores; "
        f"medians of {of.asked.runs} runs, the fewest and the most in brackets",
        f"- {_stages(of.stages)}\n",
        f"| | {_unit(of.asked)} | of the job |",
        "|---|---|---|",
        *(
            f"| {name} | {median(runs):,.0f} ({min(runs):,.0f} to {max(runs):,.0f}) | {median(runs) / job:.3f} |"
            for name, runs in of.rates.items()
        ),
        f"\nThe last run of the job: **start** {told['start_s']:.1f} s until the first actor was up, then {_steady(of.scored)}; "
        f"start and all, {told['num_rows'] / told['seconds']:,.0f} scores a second. "
        f"{_costs(of.scored)}; {_memory(of.scored)}. {_checked(of.scored)}\n",
        *_actors(of.scored),
        *([_best_in_words(of.best)] if of.best else []),
        *(_linear(of.linear) if of.linear else []),
        *_goals(
            ("end to end, of the bare loop", ">= 90% on a GPU", f"{summary['vs_bare_loop']:.0%}", summary["vs_bare_loop"] >= 0.9),
            ("times scoring from scratch", ">= 20", f"{summary['vs_from_scratch']:.1f}", summary["vs_from_scratch"] >= 20),
            *([_linear_goal(of.linear)] if of.linear else []),
        ),
    ]  # fmt: skip


def catalogue_page(
    asked: argparse.Namespace,
    settings: Settings,
    num_devices: int,
    runs: dict[int, Version],
    of_tenth: Version,
    stages: dict[str, float],
) -> list[str]:
    """`runs` by number of users; `of_tenth`: the fewest of them asked about a tenth of the items."""
    whole = runs[max(runs)]
    return [
        f"# Best {asked.top_k} items of a large catalogue\n",
        *_conditions(asked, settings, num_devices),
        f"- {_stages(stages)}\n",
        f"{_best_in_words(whole)} {whole.manifest['start_s']:.1f} s before that until the first actor was up.",
        *_linear(runs),
        *_goals(
            *_memory_goals(asked, settings, runs, of_tenth),
            _linear_goal(runs),
        ),
    ]


def _conditions(asked: argparse.Namespace, settings: Settings, num_devices: int) -> list[str]:
    sizes = settings.model
    device = f"one core of {cpu_model()}"
    if asked.device == "cuda":
        device = f"{num_devices} x {torch.cuda.get_device_name()}, {num_cores()} CPU cores"
    precision = "float32, no TF32" if asked.precision == "float32" else asked.precision
    return [
        f"`python -m benchmarks.batch_scoring {' '.join(sys.argv[1:])}`\n",
        f"- hardware: {device}; {asked.scorers} scorers a device",
        f"- {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}; Python {sys.version.split()[0]}, torch {torch.__version__}, ray "
        f"{ray.__version__}, pyarrow {pa.__version__}",
        f"- L = {sizes.history_events}, K = {sizes.merge_size}, D = {sizes.width}, k = {sizes.query_groups}, s = "
        f"{sizes.stride_groups}, one cross and {sizes.num_self_layers} self layers, {precision}; {asked.users:,} users with "
        f"{settings.generate.num_events // asked.users:,} events each",
    ]


def _commit() -> str:
    """Of the code; a copy of a working tree need have none."""
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):
        return "of the copied tree"


def _unit(asked: argparse.Namespace) -> str:
    """On a CPU, time is that of processes, all threads together, so that a shared machine's other work does not count."""
    return "scores/s" if asked.device == "cuda" else "scores a second of CPU time"


def _stages(stages: dict[str, float]) -> str:
    """What took how long."""
    return "seconds, starts included: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in stages.items())


def _memory(version: Version) -> str:
    told = version.manifest
    of_gpu = f", {told['peak_gpu_bytes'] / 1e6:,.0f} MB of its GPU" if told["peak_gpu_bytes"] else ""
    return f"an actor held at most {told['peak_bytes'] / 1e6:,.0f} MB of memory{of_gpu}"


def _checked(version: Version) -> str:
    check = version.manifest["online_check"]
    return f"{check['requests']} requests through the serving path too: largest difference {check['max_abs_diff']:.1e}."


def _steady(version: Version) -> str:
    told = version.manifest
    seconds = told["seconds"] - told["start_s"]
    return f"**steady** {seconds:.1f} s for {told['num_rows']:,} scores, {told['num_rows'] / seconds:,.0f} a second"


_STAGES = ("read", "queue", "compile", "lay out", "encode", "score", "wait", "check", "write")


def _actors(version: Version) -> list[str]:
    """Where the actors' time went."""
    return [
        "Seconds of each actor, summed over its buckets, of which a GPU's has two at once: waits for what is *read*, in the "
        "*queue* for the device, for a sweep's kernels to be *compiled*, for packs to be *laid out*, histories *encoded* and "
        "appended to (until launched; packs do that as they are scored), candidates *scored* (and waited for), the *wait* of "
        "buckets that are written until they are checked with others, requests *checked* through the serving path, of several "
        "buckets by the last (while another is scored), waits for what is *written*, and the rest. Before: *load*, "
        "*warm up*.\n",
        "| actor | load | warm up | begun at | done at | buckets | scores | " + " | ".join(_STAGES) + " | rest |",
        "|---" * (8 + len(_STAGES)) + "|",
        *(
            f"| {n} | {a['start_s']['load']:.1f} | {a['start_s']['warm up']:.1f} | {a['begun_s']:.1f} | {a['done_s']:.1f} | "
            f"{a['buckets']} | {a['scores']:,} | "
            + " | ".join(f"{a['stages_s'].get(name, 0.0):.2f}" for name in _STAGES)
            + f" | {a['buckets_s'] - sum(a['stages_s'].values()):.2f} |"
            for n, a in enumerate(version.manifest["actors"], 1)
        ),
        "",
    ]


def actors_in_words(version: Version) -> list[str]:
    """The same in few words, for who watches."""
    return [
        f"actor {n}: {', '.join(f'{name} {s:.1f}' for name, s in (actor['start_s'] | actor['stages_s']).items())} s"
        for n, actor in enumerate(version.manifest["actors"], 1)
    ]


def _best_in_words(best: Version) -> str:
    told, seconds = best.manifest, scoring_seconds(best)
    num_users, matrix_bytes = told["num_users"], 4 * told["num_rows"]
    return (
        f"Best {told['settings']['top_k']} of {told['num_rows'] // num_users:,} items for {num_users:,} users: "
        f"{told['num_rows']:,} scores in {seconds:.1f} s, {told['num_rows'] / seconds:,.0f} a second, "
        f"{_costs(best)}; {_memory(best)}; the scores alone would be "
        f"{matrix_bytes / 1e6:,.0f} MB. {_checked(best)}"
    )


def _linear(runs: dict[int, Version]) -> list[str]:
    lines = ["", "| users | scores | seconds | ms for a user |", "|---|---|---|---|"]
    for num_users, version in runs.items():
        seconds = steady_seconds(version)
        lines.append(
            f"| {num_users:,} | {version.manifest['num_rows']:,} | {seconds:.2f} | {seconds / num_users * 1e3:.2f} |"
        )
    return lines


def steady_seconds(version: Version) -> float:
    """Of GPUs, or of CPU time, in buckets: without the start of actors."""
    told, of = version.manifest, _clock(version)
    seconds = told[of] - told[f"start_{of}"]
    assert told["device"] != "cuda" or seconds <= told["seconds"] * 1.02, (
        "one GPU has computed for longer than the run took"
    )
    return seconds


def _clock(version: Version) -> str:
    return "device_s" if version.manifest["device"] == "cuda" else "cpu_s"


def costs(version: Version) -> dict[str, float]:
    """Of a million scores, in seconds of GPUs or of CPU time: with the start of actors, and without."""
    millions = version.manifest["num_rows"] / 1e6
    return {
        "device_s_per_million_scores": version.manifest[_clock(version)] / millions,
        "steady_device_s_per_million_scores": steady_seconds(version) / millions,
    }


def _costs(version: Version) -> str:
    whole, steady = costs(version).values()
    return f"{steady:.3g} device-seconds a million scores, {whole:.3g} with the start of actors"


def _linear_goal(runs: dict[int, Version]) -> tuple[str, str, str, bool]:
    cost = [steady_seconds(version) / num_users for num_users, version in runs.items()]
    change = cost[-1] / cost[0] - 1
    name = f"cost of a user, {max(runs):,} users against {min(runs):,}"
    return name, f"within {LINEAR_WITHIN:.0%}", f"{change:+.0%}", abs(change) <= LINEAR_WITHIN


def _memory_goals(
    asked: argparse.Namespace, settings: Settings, runs: dict[int, Version], of_tenth: Version
) -> list[tuple[str, str, str, bool]]:
    """That the matrix of scores is never held: what buckets take, besides weights and items, is bounded by the settings alone."""
    sizes, limit = settings.model, asked.batch_bytes
    most = max(version.manifest["working_bytes"] for version in runs.values())
    more = runs[min(runs)].manifest["working_bytes"] - of_tenth.manifest["working_bytes"]
    told = runs[max(runs)].manifest
    num_items = told["num_rows"] // told["num_users"]
    model = f"L = {sizes.history_events}, D = {sizes.width}, {sizes.num_self_layers} self layers"
    return [
        (f"an actor's memory besides weights and items, {max(runs):,} users x {num_items:,} items, {model}",
         f"<= {WITHIN_BUDGETS} x batch_bytes", f"{most / limit:.2f} x", most <= WITHIN_BUDGETS * limit),
        (f"how much more that is for all items than for a tenth, {min(runs):,} users",
         f"<= {MORE_OF_BUDGET:.0%} of batch_bytes", f"{more / limit:.1%}", more <= MORE_OF_BUDGET * limit),
    ]  # fmt: skip


def _goals(*goals: tuple[str, str, str, bool]) -> list[str]:
    rows = [f"| {name} | {goal} | {found} | {'yes' if met else 'no'} |" for name, goal, found, met in goals]
    return ["", "| goal | | measured | met |", "|---|---|---|---|", *rows, ""]
