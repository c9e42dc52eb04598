"""What a pipeline run amounts to: report.json for machines and report.html, one self-contained page, for people."""

import json
import platform as python_platform
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import jinja2

from longer.charts import METRIC_NAMES, auc_by_length, histogram, training_curve
from longer.config import Settings
from longer.files import exists, read_bytes, write_bytes
from longer.progress import say
from longer.storage import Version

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(settings: Settings, versions: Mapping[str, Version]) -> dict[str, Any]:
    """The report of these stage results, written under `root` unless it is there already."""
    path = settings.path("report.json")
    ids = _ids(versions)
    if exists(path) and (earlier := json.loads(read_bytes(path)))["versions"] == ids:
        say("report", f"{path} is already written, nothing changed")
        return earlier
    report = summarize(versions)
    write_bytes(settings.path("report.html"), render(report, versions).encode())
    write_bytes(path, json.dumps(report, indent=1).encode())
    say("report", f"{settings.path('report.html')} and report.json")
    return report


def summarize(versions: Mapping[str, Version]) -> dict[str, Any]:
    """The figures of report.json."""
    train, evaluation, serving, batch = (
        versions[name].manifest for name in ("train", "evaluate", "serve", "batch_score")
    )
    return {
        "test": evaluation["test"],
        "baselines": evaluation["baselines"],
        "serving": {
            name: serving[name] for name in ("requests", "p50_ms", "p99_ms", "max_abs_diff_vs_offline", "cache")
        },
        "batch": {name: batch[name] for name in ("rows", "rows_per_s", "max_abs_diff_vs_online")},
        "stages": {name: version.manifest["seconds"] for name, version in versions.items()},
        "model": {name: train[name] for name in ("model_version", "num_parameters", "step", "validation")},
        "versions": _ids(versions),
        "made_with": {
            "python": python_platform.python_version(),
            **{package: installed(package) for package in ("ray", "torch", "pyarrow")},
        },
    }


def _ids(versions: Mapping[str, Version]) -> dict[str, str]:
    """As the stages print them; of batch scores, whose stage gives their comparison with the served ones, the scores' own."""
    return {name: version.id for name, version in versions.items()} | {
        "batch_score": versions["batch_score"].manifest["inputs"]["batch_scores"]
    }


def render(report: Mapping[str, Any], versions: Mapping[str, Version]) -> str:
    """The page: figures as tables, curves as inline SVG, nothing loaded from anywhere."""
    bins = versions["evaluate"].manifest["auc_by_length"]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text()).render(
        report=report,
        sizes={name: versions[name].manifest for name in ("import_events", "build_sequences", "build_requests")},
        settings=versions["train"].manifest["settings"],
        methods={"LONGER": report["test"], **report["baselines"]},
        metric_names=METRIC_NAMES,
        charts={
            "Training": training_curve(versions["train"].manifest["history"]),
            **({"Test AUC by length of history": auc_by_length(bins)} if bins else {}),
            "Latency of online requests": histogram(versions["serve"].manifest["latencies_ms"], "milliseconds"),
        },
    )
