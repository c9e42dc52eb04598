"""The study's plots: AUC by history length, and quality by FLOPs with the frontier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_study.rows import Record, auc, by_arm, curve, long_auc, mean, mega_flops, spread

_OURS, _OTHERS = "#0b6e99", "#9aa7b1"


def plots(records: Sequence[Record], folder: Path, stem: str) -> list[Path]:
    """Two SVG files a log, named after `stem`."""
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
                made.append(folder / f"{stem}_{log}_{name}.svg")
                figure.savefig(made[-1], format="svg", metadata={"Date": None})
    return made


def _draw_lengths(axes: Any, mine: Sequence[Record]) -> None:
    curves = (
        ("LONGER", "longer", False, "#d1731c"),
        ("LONGER, with interaction features", "longer", True, _OURS),
        ("interaction features alone", "none", True, _OTHERS),
    )
    for name, encoder, features, color in curves:
        found = curve(mine, features, encoder)
        for which, value, line in (("all", auc, "-"), ("long histories", long_auc, "--")):
            means, spreads = ([f(records, value) for records in found.values()] for f in (mean, spread))
            if len(means) > 1:
                style = {"marker": "o", "capsize": 2, "linestyle": line, "color": color}
                axes.errorbar(list(found), means, yerr=spreads, label=f"{name}: {which}", **style)
    axes.set_xscale("log")
    axes.set_xlabel("history length, events")
    axes.set_ylabel("AUC")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _draw_flops(axes: Any, mine: Sequence[Record]) -> None:
    """Without the interaction features, which would hide what the encoders find; nothing cheaper is better than the frontier."""
    groups = ("encoders", "flops", "lengths", "switches")
    arms = by_arm(record for record in mine if not record["features"] and record["group"] in groups)
    points = sorted((max(1.0, mega_flops(records[0])), mean(records, auc), arm) for arm, records in arms.items())
    frontier, best = [], 0.0
    for flops, value, arm in points:
        ours = arms[arm][0]["encoder"] == "longer"
        axes.plot(flops, value, "o" if ours else "s", color=_OURS if ours else _OTHERS)
        if value > best or arms[arm][0]["group"] in ("encoders", "flops"):
            axes.annotate(arm, (flops, value), fontsize=6, xytext=(3, 2), textcoords="offset points")
        if value > best:
            best = value
            frontier.append((flops, value))
    axes.step(*zip(*frontier, strict=True), where="post", color="#d1731c", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("forward MFLOPs of one request: the longest history, the mean number of candidates")
    axes.set_ylabel("AUC, ids alone")
