"""The study's Markdown page and plots, from its records: means over seeds, and how far seeds lie apart."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_study.arms import FEATURES

Record = dict[str, Any]


def page(records: Sequence[Record]) -> str:
    """Tables of every log that has records; the last line is JSON."""
    trained = [record for record in records if "test" in record]
    if not trained:
        return "no arm is trained yet"
    logs = list(dict.fromkeys(record["log"] for record in trained))
    parts = ["# Quality: LONGER and the encoders that it is compared with", _conditions(trained)]
    for log in logs:
        mine = [record for record in trained if record["log"] == log]
        baselines = next((r["baselines"] for r in records if r.get("key") == f"{log}/baselines"), {})
        parts += [f"## {log}", _encoders(mine, baselines), _switches(mine), _lengths(mine)]
    return "\n\n".join([*filter(None, parts), json.dumps(_summary(trained))])


def plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """AUC by history length and AUC by counted FLOPs of every log, as SVG files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    trained = [record for record in records if "test" in record]
    made = []
    for log in dict.fromkeys(record["log"] for record in trained):
        mine = [record for record in trained if record["log"] == log]
        for name, draw in (("length", _draw_lengths), ("flops", _draw_flops)):
            with mpl.rc_context({"font.size": 9, "svg.hashsalt": "longer", "svg.fonttype": "none"}):
                figure = Figure(figsize=(6.4, 3.8), layout="constrained")
                axes = figure.subplots()
                axes.spines[["top", "right"]].set_visible(False)
                draw(axes, mine)
                made.append(folder / f"quality_{log}_{name}.svg")
                figure.savefig(made[-1], format="svg", metadata={"Date": None})
    return made


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """alpha, beta, gamma of y = alpha * x^beta + gamma by least squares, and R^2. Needs at least four points."""
    x_N, y_N = np.log(np.asarray(x, float)), np.asarray(y, float)
    x_N -= x_N.mean()  # a scale that alpha takes up
    best = (math.inf, 0.0, 0.0, 0.0)
    for beta in np.concatenate([-np.geomspace(3, 1e-3, 200), np.geomspace(1e-3, 3, 200)]):
        design = np.stack([np.exp(beta * x_N), np.ones_like(x_N)], axis=1)
        (alpha, gamma), *_ = np.linalg.lstsq(design, y_N, rcond=None)
        error = float(((design @ [alpha, gamma] - y_N) ** 2).sum())
        best = min(best, (error, float(alpha), float(beta), float(gamma)))
    error, alpha, beta, gamma = best
    alpha *= math.exp(-beta * float(np.log(np.asarray(x, float)).mean()))
    return alpha, beta, gamma, 1 - error / float(((y_N - y_N.mean()) ** 2).sum())


def _conditions(trained: Sequence[Record]) -> str:
    first = trained[0]
    cards = ", ".join(dict.fromkeys(record["hardware"] for record in trained))
    seeds = sorted({record["seed"] for record in trained})
    budget = ", ".join(
        dict.fromkeys(f"{r['train_requests']} requests x {r['epochs']} ({r['steps']} steps)" for r in trained)
    )
    return (
        f"- hardware: {cards}; torch {first['torch']}{'; quick sizes' if first['quick'] else ''}\n"
        f"- every arm: {budget} of training; seeds {seeds}, mean ± half of the range between seeds\n"
        "- FLOPs: counted, forward, of one request of the longest history in the test split"
    )


def _encoders(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> str:
    chosen = _by_arm(record for record in mine if record["group"] == "encoders")
    if not chosen:
        return ""
    rows = [_row(arm, records) for arm, records in sorted(chosen.items(), key=lambda item: -_mean(item[1], _auc))]
    rows += [f"| {name} | {v['auc']:.4f} | {v['long_auc']:.4f} | | | | | |" for name, v in baselines.items()]
    return "### Encoders at the same training\n\n" + "\n".join([*_HEADER, *rows])


def _switches(mine: Sequence[Record]) -> str:
    names = ("switches", "widths", "flops")
    chosen = _by_arm(record for record in mine if record["group"] in names or record["arm"] == "longer")
    if len(chosen) < 2:
        return ""
    return "### Switches of LONGER, without the interaction features\n\n" + "\n".join(
        [*_HEADER, *(_row(arm, records) for arm, records in chosen.items())]
    )


def _lengths(mine: Sequence[Record]) -> str:
    lines = ["### LONGER by history length", "", "| L | ids | with interaction features |", "|---|---|---|"]
    curves = {features: _curve(mine, features) for features in (False, True)}
    lengths = sorted({length for curve in curves.values() for length in curve})
    if len(lengths) < 2:
        return ""
    for length in lengths:
        cells = [_with_spread(curves[f].get(length, []), _auc) for f in (False, True)]
        lines.append(f"| {length} | {cells[0]} | {cells[1]} |")
    for features, curve in curves.items():
        if len(curve) >= 4:
            alpha, beta, gamma, r2 = power_law(list(curve), [_mean(records, _auc) for records in curve.values()])
            name = "with features" if features else "ids"
            lines += ["", f"{name}: AUC = {alpha:.4g} * L^{beta:.3g} + {gamma:.4g}, R² = {r2:.4f}"]
    return "\n".join(lines)


def _curve(mine: Sequence[Record], features: bool) -> dict[int, list[Record]]:
    """Of LONGER as it is, by length ascending; the whole length is the headline arm."""
    curve: dict[int, list[Record]] = defaultdict(list)
    for record in mine:
        headline = record["arm"] in ("longer", "longer" + FEATURES)
        if (
            record["encoder"] == "longer"
            and record["features"] == features
            and (headline or record["group"] == "lengths")
        ):
            curve[record["length"]].append(record)
    return dict(sorted(curve.items()))


_HEADER = (
    "| arm | AUC | AUC, long histories | GAUC | log loss | dense parameters | MFLOPs | train s |",
    "|---|---|---|---|---|---|---|---|",
)


def _row(arm: str, records: Sequence[Record]) -> str:
    first = records[0]
    return (
        f"| {arm} | {_with_spread(records, _auc)} | {_with_spread(records, _long_auc)} | {_mean(records, _gauc):.4f} | "
        f"{_mean(records, lambda r: r['test']['logloss']):.4f} | {first['dense_parameters']:,} | "
        f"{first['forward_flops']['flops'] / 1e6:,.0f} | {_mean(records, lambda r: r['train_s']):.1f} |"
    )


def _auc(record: Record) -> float:
    return record["test"]["auc"]


def _long_auc(record: Record) -> float:
    return record["test"]["long_auc"]


def _gauc(record: Record) -> float:
    return record["test"]["gauc"]


def _by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["arm"]].append(record)
    return groups


def _mean(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    return statistics.fmean(map(value, records))


def _spread(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    values = [value(record) for record in records]
    return (max(values) - min(values)) / 2


def _with_spread(records: Sequence[Record], value: Callable[[Record], float]) -> str:
    if not records:
        return ""
    spread = f" ± {_spread(records, value):.4f}" if len(records) > 1 else ""
    return f"{_mean(records, value):.4f}{spread}"


def _summary(trained: Sequence[Record]) -> dict[str, Any]:
    """Of the first log: AUC of every encoder and of LONGER by length, and the widest spread between seeds of an encoder."""
    mine = [record for record in trained if record["log"] == trained[0]["log"]]
    arms = _by_arm(record for record in mine if record["group"] == "encoders")
    return {
        "auc": {arm: _mean(records, _auc) for arm, records in arms.items()},
        "auc_by_length": {length: _mean(records, _auc) for length, records in _curve(mine, True).items()},
        "spread": max((_spread(records, _auc) for records in arms.values()), default=None),
    }


def _draw_lengths(axes: Any, mine: Sequence[Record]) -> None:
    for features in (False, True):
        curve = _curve(mine, features)
        label = "LONGER with interaction features" if features else "LONGER"
        means, spreads = ([f(records, _auc) for records in curve.values()] for f in (_mean, _spread))
        axes.errorbar(list(curve), means, yerr=spreads, marker="o", capsize=2, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("history length, events")
    axes.set_ylabel("AUC")
    axes.legend(frameon=False, fontsize=8)


def _draw_flops(axes: Any, mine: Sequence[Record]) -> None:
    """Without the interaction features, which would hide what the encoders find."""
    arms = _by_arm(record for record in mine if not record["features"])
    for arm, records in arms.items():
        ours = records[0]["encoder"] == "longer"
        flops = max(1.0, records[0]["forward_flops"]["flops"] / 1e6)
        axes.plot(flops, _mean(records, _auc), "o" if ours else "s", color="#0b6e99" if ours else "#9aa7b1")
        axes.annotate(arm, (flops, _mean(records, _auc)), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("forward MFLOPs of one request of the longest history")
    axes.set_ylabel("AUC")
