"""The quickstart from nothing, measured: python -m benchmarks.quickstart [--runs N] > benchmarks/results/quickstart_cpu2_DATE.md

Prints a Markdown page: hardware, versions, seconds by stage, quality against the baselines, serving and batch figures; last, one
JSON line. Each run has its own seed, so that quality comes with its spread. The log is downloaded before the clock starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.conditions import cpu_model
from longer.datasets.complete_journey import locate

CONFIG = "configs/quickstart.yaml"


def run_once(root: Path, seed: int) -> dict[str, Any]:
    """One run's report.json, with the seconds of the whole process."""
    command = [sys.executable, "-m", "jobs.pipeline", "--config", CONFIG, "--root", str(root), "--seed", str(seed)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return {**json.loads((root / "report.json").read_text()), "seconds": time.perf_counter() - started}


def page(reports: list[dict[str, Any]]) -> str:
    """The results page without its last line."""

    def over_runs(values: list[float], digits: int) -> str:
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    first = reports[0]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = [
        "# The quickstart, from raw log to report",
        "",
        f"`python -m benchmarks.quickstart --runs {len(reports)}`; means, and ranges over seeds where there are several runs.",
        "",
        f"- hardware: {len(os.sched_getaffinity(0))} cores of {cpu_model()}, no GPU; shared machine",
        f"- commit {commit}; {', '.join(f'{name} {version}' for name, version in first['made_with'].items())}",
        f"- settings: `{CONFIG}`; {len(reports)} run(s), seeds 0 to {len(reports) - 1}",
        "",
        "| method | AUC | GAUC |",
        "|---|---|---|",
    ]
    methods = {"LONGER": [r["test"] for r in reports]}
    methods |= {name: [r["baselines"][name] for r in reports] for name in first["baselines"]}
    for name, metrics in methods.items():
        lines.append(
            f"| {name} | {over_runs([m['auc'] for m in metrics], 4)} | {over_runs([m['gauc'] for m in metrics], 4)} |"
        )
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {over_runs([r['stages'][stage] for r in reports], 1)} |" for stage in first["stages"]]
    lines += [f"| whole process, Ray's start included | {over_runs([r['seconds'] for r in reports], 1)} |", ""]
    serving, batch = [r["serving"] for r in reports], [r["batch"] for r in reports]
    gap = max(s["max_abs_diff_vs_offline"] for s in serving), max(b["max_abs_diff_vs_online"] for b in batch)
    lines += [
        f"Online: {first['serving']['requests']} requests over HTTP, p50 {over_runs([s['p50_ms'] for s in serving], 1)} ms, "
        f"p99 {over_runs([s['p99_ms'] for s in serving], 1)} ms, cache {serving[0]['cache']}. "
        f"Batch: {over_runs([b['rows_per_s'] for b in batch], 0)} scores/s. "
        f"Largest difference online to offline {gap[0]:.1e}, batch to online {gap[1]:.1e}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="runs, each with its own seed (default 1)")
    runs = parser.parse_args().runs
    locate("package")
    with tempfile.TemporaryDirectory() as folder:
        reports = [run_once(Path(folder) / str(seed), seed) for seed in range(runs)]
    print(page(reports))
    summary = {
        "auc": mean(r["test"]["auc"] for r in reports),
        "auc_minus_count_all": mean(r["test"]["auc"] - r["baselines"]["count_all"]["auc"] for r in reports),
        "seconds": mean(r["seconds"] for r in reports),
        "p50_ms": mean(r["serving"]["p50_ms"] for r in reports),
        "batch_scores_per_s": mean(r["batch"]["rows_per_s"] for r in reports),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
