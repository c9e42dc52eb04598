"""The study's plots: AUC by history length, and quality by FLOPs with the frontiers."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_study.arms import FEATURES
from benchmarks.quality_study.rows import Record, auc, by_arm, curve, long_auc, mean, mega_flops, spread

Point = tuple[float, float, str]
"""Forward MFLOPs, AUC and arm."""

_OURS, _OTHERS = "#0b6e99", "#9aa7b1"
_SHOWN_AUC = 0.05
"""Below the best: what lies deeper would flatten the frontier, and is named."""
_LABEL_PT = 6


def plots(records: Sequence[Record], folder: Path, stem: str) -> list[Path]:
    """Two SVG files a log, named after `stem`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    trained = [record for record in records if "test" in record]
    made = []
    for log in dict.fromkeys(record["log"] for record in trained):
        mine = [record for record in trained if record["log"] == log]
        for name, draw, number in (("length", _draw_lengths, 1), ("flops", _draw_flops, 2)):
            with mpl.rc_context({"font.size": 9, "svg.hashsalt": "longer", "svg.fonttype": "none"}):
                figure = Figure(figsize=(2.6 + 3.8 * number, 3.8), layout="constrained")
                panels = figure.subplots(1, number, squeeze=False)[0]
                for axes in panels:
                    axes.spines[["top", "right"]].set_visible(False)
                draw(panels, mine)
                made.append(folder / f"{stem}_{log}_{name}.svg")
                figure.savefig(made[-1], format="svg", metadata={"Date": None})
    return made


def _draw_lengths(panels: Any, mine: Sequence[Record]) -> None:
    (axes,) = panels
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


def _draw_flops(panels: Any, mine: Sequence[Record]) -> None:
    """On ids alone, and with the interaction features; nothing cheaper is better than a frontier, LONGER's or the others'."""
    groups = ("encoders", "flops", "tables", "lengths", "switches")
    names: list[list[Point]] = []
    for axes, features, title in zip(
        panels, (False, True), ("on ids alone", "with the interaction features"), strict=True
    ):
        arms = by_arm(record for record in mine if record["features"] == features and record["group"] in groups)
        points = sorted((mega_flops(records[0]), mean(records, auc), arm) for arm, records in arms.items())
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("forward MFLOPs of one request:\nthe longest history, the mean number of candidates")
        axes.set_ylabel("AUC")
        best = max((value for _, value, _ in points), default=1.0)
        lowest = best - _SHOWN_AUC
        axes.set_ylim(lowest - _SHOWN_AUC / 8, best + _SHOWN_AUC / 8)
        axes.margins(x=0.12)
        shown = [point for point in points if point[1] >= lowest]
        ours = {arm for arm, records in arms.items() if records[0]["encoder"] == "longer"}
        named = _draw_frontier(axes, arms, [point for point in shown if point[2] in ours], "o", _OURS)
        named += _draw_frontier(axes, arms, [point for point in shown if point[2] not in ours], "s", _OTHERS)
        names.append(named)
        if below := [arm.removesuffix(FEATURES) for _, value, arm in points if value < lowest]:
            told = textwrap.fill(f"below: {', '.join(below)}", 80)
            axes.text(0.98, 0.02, told, fontsize=5, ha="right", transform=axes.transAxes)
    panels[0].figure.draw_without_rendering()  # where points lie is known from here on
    for axes, named in zip(panels, names, strict=True):
        _name(axes, named)


def _draw_frontier(
    axes: Any, arms: dict[str, list[Record]], points: Sequence[Point], marker: str, color: str
) -> list[Point]:
    """FLOPs and AUC of arms, by FLOPs, and the line that the best ones make; those worth a name."""
    best, frontier, named = 0.0, [], []
    for flops, value, arm in points:
        axes.errorbar(flops, value, spread(arms[arm], auc), fmt=marker, color=color, markersize=4)
        if value > best or arms[arm][0]["group"] in ("encoders", "flops"):
            named.append((flops, value, arm))
        if value > best:
            best = value
            frontier.append((flops, value))
    axes.step([x for x, _ in frontier], [y for _, y in frontier], where="post", color=color, linewidth=0.8)
    return named


def _name(axes: Any, points: Sequence[Point]) -> None:
    """Names beside points, each as far above or below its own as leaves it readable."""
    to_points = 72 / axes.figure.dpi
    boxes: list[tuple[float, float, float]] = []
    for flops, value, arm in sorted(points, key=lambda point: -point[1]):
        name = arm.removesuffix(FEATURES)
        x, y = (float(pixel) * to_points for pixel in axes.transData.transform((flops, value)))
        x, width = x + 4, 0.6 * _LABEL_PT * len(name)
        steps = [sign * step for step in range(1, 30) for sign in (1, -1)]
        shift = next(
            shift
            for shift in (step * 0.7 * _LABEL_PT for step in steps)
            if all(
                x > right or x + width < left or abs(y + shift - middle) >= 1.2 * _LABEL_PT
                for left, right, middle in boxes
            )
        )
        boxes.append((x, x + width, y + shift))
        line = {"arrowstyle": "-", "linewidth": 0.3, "shrinkA": 0, "shrinkB": 0} if abs(shift) > 2 * _LABEL_PT else None
        axes.annotate(
            name,
            (flops, value),
            (4, shift),
            fontsize=_LABEL_PT,
            va="center",
            textcoords="offset points",
            arrowprops=line,
        )
