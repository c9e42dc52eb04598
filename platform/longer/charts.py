"""Charts as inline SVG, drawn by Matplotlib without a display."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

METRIC_NAMES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss", "ne": "NE", "mse": "mean squared error"}
_INK, _ACCENT, _SECOND, _QUIET = "#1b2a36", "#0b6e99", "#d1682f", "#9aa7b1"


def training_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Training loss by step, and the first task's first metric on the validation split on a second axis."""
    losses = [(record["step"], record["loss"]) for record in history if "loss" in record]
    validated = [
        (record["step"], next(iter(record["validation"].values()))) for record in history if "validation" in record
    ]
    metric = next(iter(validated[0][1]))
    label, curve = f"validation {METRIC_NAMES[metric]}", [(step, values[metric]) for step, values in validated]
    with _chart() as (axes, svg):
        axes.plot(*zip(*losses, strict=True), color=_QUIET, label="training loss")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        right = axes.twinx()
        right.plot(*zip(*curve, strict=True), color=_ACCENT, marker="o", label=label)
        right.set_ylabel(label, color=_ACCENT)
        right.spines["top"].set_visible(False)
    return svg.getvalue()


def auc_by_length(bins: Sequence[Mapping[str, Any]]) -> str:
    """One line a method over bins of history length, each {"from", "to", "auc": {method: AUC or null}}."""
    labels = [f"{b['from']} to {b['to'] - 1}" if b["to"] else f"{b['from']}+" for b in bins]
    with _chart() as (axes, svg):
        for method in bins[0]["auc"]:
            ours = method == "longer"
            axes.plot(
                labels,
                [b["auc"][method] for b in bins],
                marker="o" if ours else ".",
                color=_ACCENT if ours else None,
                linewidth=2.5 if ours else 1,
                label="LONGER" if ours else method,
            )
        axes.tick_params(axis="x", labelrotation=20)
        axes.set_xlabel("events in the user's history")
        axes.set_ylabel("AUC")
        axes.legend(frameon=False, fontsize=8)
    return svg.getvalue()


def histogram(values: Sequence[float], unit: str) -> str:
    """How often each value occurs; the last bar also holds the slowest hundredth."""
    ordered = sorted(values)
    top = ordered[int(0.99 * (len(ordered) - 1))]
    with _chart() as (axes, svg):
        axes.hist([min(value, top) for value in values], bins=40, color=_ACCENT)
        axes.axvline(ordered[len(ordered) // 2], color=_SECOND, linestyle="--", label="median")
        axes.set_xlabel(f"{unit} (the last bar also holds the slowest 1%)")
        axes.set_ylabel("requests")
        axes.legend(frameon=False, fontsize=8)
    return svg.getvalue()


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """One line of points a name, of four at most."""
    with _chart() as (axes, svg):
        for (name, points), color in zip(lines.items(), (_ACCENT, _SECOND, _QUIET, _INK), strict=False):
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False, fontsize=8)
    return svg.getvalue()


@contextmanager
def _chart() -> Iterator[tuple[Axes, io.StringIO]]:
    svg = io.StringIO()
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "longer", "text.color": _INK, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, svg
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    svg.seek(0)
    svg.truncate()
    svg.write(text[text.index("<svg") :])
