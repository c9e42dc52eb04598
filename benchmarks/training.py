"""How fast training is, against plain PyTorch: python -m benchmarks.training [--width 512] [--arm "model step"] [--out FILE]

One run on one device, the same weights, data and mathematics in every arm (checked first); on a CPU a small size.

    per impression, shared padded, model step    one step each: `model_arms.arms`; `launched` if it is asked for
    precision                                    bf16 with recomputation against float32 without
    end to end                                   `longer.training.run.train` from Parquet through Ray Train, its steps and the whole
                                                 run, against the model step on that run's own batches: `benchmarks.end_to_end`

Processes (`model_arms.workers`) begin all at once with what takes long, which is compiling, and tables for `end to end`; then they
measure in turn, what matters most first, alone on the device. Prints Markdown and last one JSON line; a run that SIGTERM ends
prints what it has. Model FLOPs are those of real tokens' matrix products (`model_arms.flops`).
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.model_arms.arms import (
    LAUNCHED,
    PER_IMPRESSION,
    PLAIN,
    PRECISIONS,
    RECOMPUTED,
    SHARED,
    STEP,
    check_arms_agree,
    compile_only,
    free_memory,
    measured_row,
    precision_row,
    profiled_step,
)
from benchmarks.model_arms.page import Page
from benchmarks.model_arms.sizes import ON_CUDA, measured_rate
from benchmarks.model_arms.workers import Workers, exit_at_sigterm

END_TO_END, PRECISION = "end to end", "precision"
_STARTED = time.perf_counter()
_MOST_COMPILING_S = 240
_NUM_SIZES_FIRST = 3
"""The fourth, width 256 with L = 10,000, comes last, and nothing is compiled for it ahead."""
_MERGE_SIZE = 8 if ON_CUDA else 4

Turn = tuple[str, Callable[[], None]]
"""What is measured alone on the device, by name."""


class Sitting:
    """One run of the benchmark: its processes, its turns and its page."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.workers, self.rate = asked, Workers(), 0.0
        self.turns = list(self._turns())
        self.page = Page(asked.out, [name for name, _ in self.turns])

    def run(self) -> None:
        self._prepare()
        worst = check_arms_agree()
        self.workers.ready(_MOST_COMPILING_S)
        self.rate = measured_rate()
        device = torch.cuda.get_device_name() if ON_CUDA else "CPU"
        self.page.head = (
            f"{device}; torch {torch.__version__}; float32 outputs of the arms differ by {worst:.1e} at most\n"
            f"matrix products: {self.rate / 1e12:.3g} TFLOP/s"
        )
        for name, turn in self.turns:
            if ON_CUDA and time.perf_counter() - _STARTED > self.asked.within_s:
                return
            try:
                turn()
            except Exception:  # the others are worth their time all the same
                traceback.print_exc()
                continue
            self.page.done(name)
            print(f"{name}: done after {time.perf_counter() - _STARTED:.0f} s", file=sys.stderr, flush=True)

    def _turns(self) -> Iterator[Turn]:
        """What matters most comes first."""
        asked, (width, longest) = self.asked, self.asked.sizes[0]
        for size in asked.sizes[:_NUM_SIZES_FIRST]:
            yield from self._rows_of(*size)
        if PRECISION in asked.arms:
            names = [*PRECISIONS] if asked.full else [RECOMPUTED, PLAIN, "bf16"]
            for name in names if ON_CUDA else (RECOMPUTED, PLAIN):
                yield f"{PRECISION}: {name}", partial(self._measure_precision, name, width, longest)
        if END_TO_END in asked.arms:
            yield END_TO_END, self._measure_end_to_end
        for event_width, length in asked.sizes if asked.profile else ():
            if event_width == width:
                yield f"profile, L = {length}", partial(self._profile, event_width, length)
        for size in asked.sizes[_NUM_SIZES_FIRST:]:
            yield from self._rows_of(*size)

    def _rows_of(self, event_width: int, longest: int) -> Iterator[Turn]:
        for is_zipf in (True, False) if self.asked.full else (True,):
            for arm in (STEP, SHARED, PER_IMPRESSION, LAUNCHED):
                if arm not in self.asked.arms or (arm == PER_IMPRESSION and not is_zipf):
                    continue
                name = f"{arm}, width {event_width * _MERGE_SIZE}, L = {longest}{'' if is_zipf else ', full'}"
                yield name, partial(self._measure_row, event_width, longest, is_zipf, arm)

    def _prepare(self) -> None:
        asked, (width, longest) = self.asked, self.asked.sizes[0]
        if {STEP, LAUNCHED, PRECISION} & {*asked.arms} or asked.profile:
            for one in dict(asked.sizes):  # kernels are those of any length
                self.workers.prepare((STEP, one), compile_only, one, longest, STEP)
        if SHARED in asked.arms:
            for size in asked.sizes[:_NUM_SIZES_FIRST]:
                self.workers.prepare((SHARED, *size), compile_only, *size, SHARED)
        if PRECISION in asked.arms:
            self.workers.prepare(PLAIN, compile_only, width, longest, PLAIN)
            self.workers.prepare((STEP, width), compile_only, width, longest, RECOMPUTED)
        if PER_IMPRESSION in asked.arms:
            self.workers.prepare(PER_IMPRESSION, free_memory)  # only begins: nothing of it is compiled
        if END_TO_END in asked.arms:
            from benchmarks import end_to_end  # every process imports this module, and few need Ray

            self.workers.prepare(END_TO_END, end_to_end.prepare, self._end_to_end_options())

    def _measure_row(self, event_width: int, longest: int, is_zipf: bool, arm: str) -> None:
        keys = {SHARED: (SHARED, event_width, longest), PER_IMPRESSION: PER_IMPRESSION}
        what = event_width, longest, is_zipf, self.asked.users, arm, self.rate
        self.page.rows.append(self.workers.ask(keys.get(arm, (STEP, event_width)), measured_row, *what))

    def _measure_precision(self, name: str, width: int, longest: int) -> None:
        key = PLAIN if name == PLAIN else (STEP, width)
        self.page.precision_of = f"Width {width * _MERGE_SIZE}, L = {longest}"
        self.page.precision[name] = self.workers.ask(key, precision_row, width, longest, name)

    def _measure_end_to_end(self) -> None:
        from benchmarks import end_to_end

        options = self._end_to_end_options()
        self.page.end_to_end[options[1]] = self.workers.ask(END_TO_END, end_to_end.measure, options)

    def _profile(self, event_width: int, longest: int) -> None:
        table = self.workers.ask((STEP, event_width), profiled_step, event_width, longest, self.asked.users)
        self.page.profiles[f"width {event_width * _MERGE_SIZE}, L = {longest}"] = table

    def _end_to_end_options(self) -> list[str]:
        return ["--width", str(self.asked.sizes[0][0] * _MERGE_SIZE)]


def main() -> None:
    exit_at_sigterm()
    sitting = Sitting(_options())
    try:
        sitting.run()
    finally:
        sitting.page.write()
        print(sitting.page.text(), flush=True)
        sitting.workers.end()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = [STEP, SHARED, PER_IMPRESSION, PRECISION, END_TO_END]
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
    parser.add_argument("--out", help="file that the page is written to as well, each time that there is more")
    asked = parser.parse_args()
    widths, lengths = sorted(asked.width or [256, 512], reverse=True), sorted(asked.length or [2_000, 10_000])
    asked.sizes = [(width // 8, longest) for width in widths for longest in lengths] if ON_CUDA else [(8, 256)]
    asked.arms = asked.arm or arms
    return asked


if __name__ == "__main__":
    main()
