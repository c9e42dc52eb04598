"""How fast training is, against plain PyTorch: python -m benchmarks.training [--width 512] [--arm "model step"] [--profile]

One run on one device, the same weights, data and mathematics in every arm (checked first); on a CPU a small size.

    per impression, shared padded, model step    one step each: `model_arms.arms`; `launched` if it is asked for
    end to end                                   `longer.training.run.train` from Parquet through Ray Train, its steps and the whole
                                                 run, against the model step on that run's own batches: `benchmarks.end_to_end`
    precision                                    bf16 with recomputation against float32 without

On CUDA everything is first compiled in processes side by side, so that the process that measures finds its kernels in the caches on
disk; nothing is measured meanwhile. Prints Markdown as it goes; last, one JSON line. Model FLOPs are those of real tokens' matrix
products (`model_arms.flops`).
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.model_arms.arms import (
    LAUNCHED,
    PER_IMPRESSION,
    PLAIN,
    SHARED,
    STEP,
    Size,
    check_arms_agree,
    compile_only,
    free_memory,
    precision_arms,
)
from benchmarks.model_arms.sizes import ON_CUDA, measured_rate
from benchmarks.model_arms.work import kernel_table

END_TO_END, PRECISION = "end to end", "precision"
_STARTED = time.perf_counter()
_COMPILE_THREADS = 4
"""Of each process that only compiles; there are about eight."""
_MOST_COMPILING_S = 240

torch._dynamo.config.recompile_limit = (
    64  # one process measures many models, and a piece beyond the limit is not compiled
)


def main() -> None:
    asked = _options()
    if ON_CUDA:
        _compile_ahead(asked)
    worst = check_arms_agree()
    device = torch.cuda.get_device_name() if ON_CUDA else "CPU"
    print(
        f"# Training speed\n\n{device}; torch {torch.__version__}; float32 outputs of the arms differ by {worst:.1e} at most"
    )
    rate = measured_rate()
    print(f"matrix products: {rate / 1e12:.3g} TFLOP/s\n", flush=True)
    rows, left_out = _rows(asked, rate)
    if rows:
        _print_table(rows)
    event_width, lengths = asked.sizes[0][0], [longest for width, longest in asked.sizes if width == asked.sizes[0][0]]
    precision, end_to_end = {}, {}
    if PRECISION in asked.arms and not _is_late(asked, PRECISION, left_out):
        precision = precision_arms(event_width, lengths[0], asked.full)
    if END_TO_END in asked.arms and not _is_late(asked, END_TO_END, left_out):
        end_to_end = _end_to_end(event_width * 8 if ON_CUDA else 32, left_out)
    for longest in lengths if asked.profile else ():
        _print_profile(Size(event_width, longest, True, asked.users))
    print(json.dumps({**summary(rows, precision, end_to_end), **({"left_out": left_out} if left_out else {})}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = [STEP, SHARED, PER_IMPRESSION, END_TO_END, PRECISION]
    parser.add_argument("--width", type=int, choices=[256, 512], action="append", help="D (default: both)")
    parser.add_argument("--length", type=int, choices=[2_000, 10_000], action="append", help="L (default: both)")
    parser.add_argument("--arm", action="append", choices=[*arms, LAUNCHED], help="default: all but launched")
    parser.add_argument(
        "--users", type=int, help="of a step, a request each (default: 512 at L = 2,000, 128 at 10,000)"
    )
    parser.add_argument("--full", action="store_true", help="full histories too, not Zipf lengths only; tf32 and fp16")
    parser.add_argument("--profile", action="store_true", help="where the widest model's step goes, by kind of kernel")
    parser.add_argument(
        "--within-s", type=int, default=420, help="no arm begins later: it is left out, and the last line says so"
    )
    asked = parser.parse_args()
    widths, lengths = sorted(asked.width or [256, 512], reverse=True), sorted(asked.length or [2_000, 10_000])
    asked.sizes = [(width // 8, longest) for width in widths for longest in lengths] if ON_CUDA else [(8, 256)]
    asked.arms = asked.arm or arms
    return asked


def _compile_ahead(asked: argparse.Namespace) -> None:
    """Fills the compiler's caches, and builds the tables of `end to end`, all at once; what fails here is compiled later."""
    widest, shortest = asked.sizes[0]
    wanted = [(*size, SHARED) for size in asked.sizes if SHARED in asked.arms]
    if {STEP, LAUNCHED, END_TO_END, PRECISION} & {*asked.arms} or asked.profile:
        wanted += [(width, shortest, STEP) for width in {width for width, _ in asked.sizes}]  # of any length
    if PRECISION in asked.arms:
        wanted.append((widest, shortest, PLAIN))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(_COMPILE_THREADS)
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=compile_only, args=what) for what in wanted]
    for process in running:
        process.start()
    if END_TO_END in asked.arms:
        subprocess.run([*_end_to_end_command(widest * 8), "--prepare"], check=False, stdout=subprocess.DEVNULL)
    for process in running:
        process.join(max(0.0, _STARTED + _MOST_COMPILING_S - time.perf_counter()))
        process.kill()  # what is not ready is compiled where it is measured
        process.join()
    print(f"compiled ahead in {time.perf_counter() - _STARTED:.0f} s", file=sys.stderr, flush=True)


def _rows(asked: argparse.Namespace, rate: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The arms that are steps, and the names of those for which there was no time."""
    rows, left_out = [], list[str]()
    for event_width, longest in asked.sizes:
        for is_zipf in (True, False) if asked.full else (True,):
            size = Size(event_width, longest, is_zipf, asked.users)
            for arm in asked.arms:
                if arm in (END_TO_END, PRECISION) or (arm == PER_IMPRESSION and not is_zipf):
                    continue
                name = f"{arm}, width {size.settings.width}, L = {longest}"
                if not _is_late(asked, name, left_out) and (row := size.row(arm, rate)):
                    rows.append(row)
    return rows, left_out


def _is_late(asked: argparse.Namespace, what: str, left_out: list[str]) -> bool:
    is_late = ON_CUDA and time.perf_counter() - _STARTED > asked.within_s
    if is_late:
        left_out.append(what)
    return is_late


def _end_to_end_command(width: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.end_to_end", "--width", str(width)]


def _end_to_end(width: int, left_out: list[str]) -> dict[str, dict[str, Any]]:
    """In a process of its own: Ray's workers want the device that this one has."""
    free_memory()
    done = subprocess.run(_end_to_end_command(width), check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        left_out.append(f"{END_TO_END}, which failed")
        return {}
    *page, line = done.stdout.splitlines()
    print("\n".join(page), flush=True)
    return {str(width): json.loads(line)}


def _print_profile(size: Size) -> None:
    step = size.our_step(size.stepper(), is_staged=True)
    print(f"\n## Where a step goes: width {size.settings.width}, L = {size.longest}\n", flush=True)
    print(kernel_table(lambda: step(0)), flush=True)


def _print_table(rows: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
    print(
        "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(shown, row.values())) for row in rows)]),
        "\n",
        flush=True,
    )


def summary(rows: list[dict[str, Any]], precision: dict[str, Any], end_to_end: dict[str, Any]) -> dict[str, Any]:
    speed: dict[str, dict[str, float]] = {}
    mfu = {}
    for row in rows:
        size = f"width{row['width']}_L{row['L']}_{row['lengths'].lower()}"
        speed.setdefault(size, {})[row["arm"]] = round(row["impressions_per_s"])
        if row["arm"] == STEP:
            mfu[size] = round(row["mfu"], 3)

    def ratios(other: str) -> dict[str, float]:
        return {size: round(arms[STEP] / arms[other], 2) for size, arms in speed.items() if {STEP, other} <= set(arms)}

    for width, found in end_to_end.items():
        speed[f"width{width}_end_to_end"] = found["impressions_per_s"]
    return {
        "impressions_per_s": speed,
        "vs_per_impression": ratios(PER_IMPRESSION),
        "vs_shared_padded": ratios(SHARED),
        "mfu": mfu,
        **{
            key: {width: round(found[key], 4) for width, found in end_to_end.items()}
            for key in ("end_to_end_share", "whole_run_share", "data_wait_share")
        },
        **{key: value and round(value, 3) for key, value in precision.items()},
    }


if __name__ == "__main__":
    main()
