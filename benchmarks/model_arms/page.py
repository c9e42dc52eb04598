"""The page of `benchmarks.training`: what has been found so far, and what has not."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.model_arms.arms import PER_IMPRESSION, PLAIN, RECOMPUTED, SHARED, STEP

_PRECISION = (
    "Held: weights, moments, gradients, the captured pass and a step's own. Of the pass: the most that its tensors took at once "
    "while it was captured, beyond weights and moments\n\n| precision | ms/step | GB held | GB of the pass |\n|---|---|---|---|"
)


@dataclass
class Page:
    """Written to the file `out`, if there is one, each time that there is more; `left_out` are names of what is not there yet."""

    out: str | None
    left_out: list[str]
    head: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    precision_of: str = ""
    precision: dict[str, dict[str, float]] = field(default_factory=dict)
    end_to_end: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """By width: its own page, and its figures."""
    profiles: dict[str, str] = field(default_factory=dict)

    def done(self, name: str) -> None:
        self.left_out.remove(name)
        self.write()

    def write(self) -> None:
        if self.out:
            Path(self.out).write_text(self.text())

    def text(self) -> str:
        precision = [
            f"| {name} | {row['ms_per_step']:.2f} | {row['held_gb']:.3f} | {row['pass_gb']:.3f} |"
            for name, row in self.precision.items()
        ]
        lines = [
            f"# Training speed\n\n{self.head}\n",
            *(_table(self.rows) if self.rows else ()),
            *((f"\n{self.precision_of}. {_PRECISION}", *precision) if precision else ()),
            *(page for page, _ in self.end_to_end.values()),
            *(f"\n## Where a step goes: {of}\n\n{table}" for of, table in self.profiles.items()),
        ]
        found = summary(self.rows, self.precision, {width: found for width, (_, found) in self.end_to_end.items()})
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return "\n".join([*lines, "", json.dumps({**found, **left_out}), ""])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    def shown(value: Any) -> str:
        return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)

    lines = [
        " | ".join(rows[0]),
        " | ".join("---" for _ in rows[0]),
        *(" | ".join(map(shown, r.values())) for r in rows),
    ]
    return [f"| {line} |" for line in lines]


def summary(
    rows: list[dict[str, Any]], precision: dict[str, dict[str, float]], end_to_end: dict[str, Any]
) -> dict[str, Any]:
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
        **_against_float32(precision),
    }


def _against_float32(precision: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """bf16 with recomputation; nothing is known of a CPU's memory."""
    if not {RECOMPUTED, PLAIN} <= set(precision):
        return {}
    ours, theirs = precision[RECOMPUTED], precision[PLAIN]
    memory = ours["held_gb"] / theirs["held_gb"] - 1
    return {
        "amp_recompute_speedup": round(theirs["ms_per_step"] / ours["ms_per_step"], 3),
        "amp_recompute_memory": round(memory, 3) if memory == memory else None,
    }
