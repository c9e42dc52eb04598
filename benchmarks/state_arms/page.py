"""The page of a run from its rows, whichever shards measured them: conditions, goals, tables; the last line is JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.state_arms.states import HOST_ARMS

Row = dict[str, Any]

_LENGTH, _CANDIDATES = 10_000, 500
_PEERS = "peers: 1.08 to 2.6; 1.32 on real data"
_WAYS = {"graph": "as graphs", "eager": "kernel by kernel"}


@dataclass(frozen=True)
class Goal:
    """A ratio, the bound promised for it, or a `note` if none was, and the value; None where its arms were not measured."""

    name: str
    promise: str
    bound: float | None
    value: float | None
    how: str
    is_most: bool = False
    note: str = ""
    spread: tuple[float, float] | None = None
    """Least and most of the value in parts of the run."""

    @property
    def asked(self) -> str:
        return "" if self.bound is None else f"{'<=' if self.is_most else '>='} {self.bound:g}"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.bound is None:
            return self.note
        return "met" if (self.value <= self.bound if self.is_most else self.value >= self.bound) else "missed"


class Table:
    """Looks rows up by what they are of; and what their runs set out to measure, ascending, even if they were ended early."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if "arm" in row]
        told = [row["conditions"] for row in rows if "conditions" in row]
        self.widths, self.users, self.candidates = (
            sorted({value for one in told for value in one[name]}) for name in ("widths", "users", "candidates")
        )

    def find(self, **of: Any) -> list[Row]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in of.items())]

    def ms(self, arm: str, **of: Any) -> float | None:
        """The arm's milliseconds by the fastest way that was measured."""
        return min((row["ms"] for row in self.find(arm=arm, **of)), default=None)

    def values(self, name: str, arm: str = "hit") -> list[Any]:
        """What the arm was measured for, ascending."""
        return sorted({row[name] for row in self.find(arm=arm)})


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _shown(*parts_ms: float | None) -> str:
    return " / ".join("?" if ms is None else f"{ms:.3g}" for ms in parts_ms) + " ms"


def goals(table: Table, width: int) -> list[Goal]:
    """At the longest history that was measured, which the goals say is 10,000 events; only peers' measure without states' arms."""
    if table.find(arm="replay", width=width) and not table.find(arm="hit", width=width):
        return _replays(table, width)
    longest, most = max(table.values("L"), default=_LENGTH), table.users[-1]
    few, *_, many = (c for c in table.candidates if c <= _CANDIDATES)
    one, batch = {"width": width, "L": longest, "users": 1}, {"width": width, "L": longest, "users": most}
    few_hit, encoded, read = table.ms("hit", **one, candidates=few), table.ms("encode", **one), table.ms("read", **one)
    anew = _sum(encoded, few_hit)
    anew_read = _sum(anew, read)
    scored, all_encoded = table.ms("hit", **batch, candidates=many), table.ms("encode", **batch)
    in_step, mixed = table.ms("append 8", **batch), table.ms("append 8, mixed", **batch)
    flat, flat_how = _flatness(table, width, most)
    return [
        *_recomputed(table, one, many),
        Goal(
            "hit_vs_encode", f"against encoding once a request, {few} candidates, without the history's read", 3,
            _ratio(anew, few_hit), _shown(anew, few_hit),
        ),
        Goal(
            "hit_vs_read_and_encode", "the same with the read from the published table on local disk", 10,
            _ratio(anew_read, few_hit), _shown(anew_read, few_hit),
        ),
        Goal(
            "million_candidates_per_s", f"M candidates/s, {most} users x {many}", 20,
            scored and most * many / scored / 1e3, _shown(scored),
        ),
        Goal("append8_flat", f"append of 8, {most} users: most over least of all L", 1.2, flat, flat_how, is_most=True),
        Goal(
            "encode_vs_append8", f"encoding {longest} against appending 8, {most} users anywhere in their strides", 10,
            _ratio(all_encoded, mixed), _shown(all_encoded, mixed),
        ),
        Goal(
            "encode_vs_append8_in_step", "the same of users whose windows move together, mean over a stride", None,
            _ratio(all_encoded, in_step), _shown(all_encoded, in_step), note="no traffic is so",
        ),
        *_host_hits(table, width, longest, many),
        *_replays(table, width),
    ]  # fmt: skip


def _recomputed(table: Table, one: dict[str, Any], candidates: int) -> list[Goal]:
    """Replay against replay decides, launches against launches stand beside: what capturing saves is no doing of states."""
    found = []
    for way in ("graph", "eager"):
        of = one | {"candidates": candidates, "way": way}
        recomputed, hit = table.ms("recompute", **of), table.ms("hit", **of)
        if recomputed is not None and hit is not None:
            name = f"hit_vs_recompute{'_eager' * bool(found)}"
            what = f"a hit against recomputation for each of {candidates} candidates, both {_WAYS[way]}"
            found.append(Goal(name, what, 200, _ratio(recomputed, hit), _shown(recomputed, hit)))
    return found or [Goal("hit_vs_recompute", f"a hit against recomputation for each of {candidates}", 200, None, "")]


def _flatness(table: Table, width: int, users: int) -> tuple[float | None, str]:
    """All lengths over the longest stride that one of them has: 1,000 events have a shorter one, and move more often."""
    rows = table.find(arm="append 8", width=width, users=users)
    best = {n: min((r for r in rows if r["L"] == n), key=lambda r: r["ms"]) for n in {r["L"] for r in rows}}
    if len(best) < 2:
        return None, ""
    share = 8 / max(row["stride"] for row in best.values())
    alike = {n: (1 - share) * row["inside_ms"] + share * row["move_ms"] for n, row in sorted(best.items())}
    own = ", ".join(f"{best[n]['ms']:.3g} at L={n}" for n in alike)
    how = f"{_shown(*alike.values())} over a stride of {round(8 / share)} events; over each one's own: {own}"
    return max(alike.values()) / min(alike.values()), how


def _host_hits(table: Table, width: int, longest: int, candidates: int) -> list[Goal]:
    """What bringing states from host memory adds to a hit, others going there, as in traffic: each has grown since it came.

    Beside it, those that go back as they came, which copies nothing.
    """
    found = []
    for users, arm in product(table.users, reversed(HOST_ARMS)):
        size = {"width": width, "L": longest, "users": users}
        host, hit = (table.ms(name, **size, candidates=candidates) for name in (arm, "hit"))
        encoded = table.ms("encode", **size)
        is_grown, what = arm == HOST_ARMS[1], f"bringing {users} states from host memory"
        value, how = None, ""
        if host is not None and hit is not None and encoded is not None:
            value, how = max(host - hit, 0.0) / encoded, f"({host:.3g} - {hit:.3g}) / {encoded:.3g} ms"
        for copy in table.find(arm="pinned copy", width=width, L=longest) if encoded and value is not None else ():
            link_ms = copy["ms"] * users * copy["state_bytes"] / copy["bytes"]
            how += f"; so many bytes one way over the link: {link_ms:.3g} ms, {link_ms / encoded:.2g} of an encode"
        if is_grown:
            what += ", others that grew going there, against encoding them"
            found.append(Goal(f"host_hit_vs_encode_{users}users", what, 0.3, value, how, is_most=True))
        else:
            what += ", others going there as they came"
            name, note = f"host_hit_as_it_came_vs_encode_{users}users", "only states without new events are so"
            found.append(Goal(name, what, None, value, how, note=note))
    return found


def _replays(table: Table, width: int) -> list[Goal]:
    """The peers' measure (NVIDIA's recsys examples say 1.08 to 2.6 on made-up users, 1.32 on real ones): whole requests."""
    found = []
    for length in table.values("L", "replay"):
        rows = table.find(arm="replay", width=width, L=length)
        without = [row for row in rows if not row["budget_share"]]
        for row in (row for row in rows if row["budget_share"] and without):
            in_store = row["hit"] + row["append"]
            what = (
                f"end to end, L={length}, budget {row['budget_share']:.0%} of all states, {in_store:.0%} of users in store, "
                f"{row['new_events']} new events a request: throughput against no cache"
            )
            for name, rate in (("reads", "requests_per_s"), ("no_reads", "requests_per_s_without_reads")):
                how, spread = f"{row[rate]:.0f} / {without[0][rate]:.0f} requests/s", None
                if "parts" in row and "parts" in without[0]:
                    parts = list(zip(row["parts"][rate], without[0]["parts"][rate], strict=True))
                    spread = min(a / b for a, b in parts), max(a / b for a, b in parts)
                    how += f"; in {len(parts)} parts of the run {spread[0]:.3g} to {spread[1]:.3g}"
                about = f"{what}{', reads left out of both' if name == 'no_reads' else ''}"
                key = f"end_to_end_L{length}_{row['budget_share']:.0%}_{row['new_events']}new_{name}"
                found.append(
                    Goal(key, about, None, _ratio(row[rate], without[0][rate]), how, note=_PEERS, spread=spread)
                )
    return found


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    table = Table(rows)
    by_width = {width: goals(table, width) for width in table.widths}
    parts = ["# User states: what a hit, an append and a host hit cost", _conditions(rows)]
    for width, found in by_width.items():
        lines = [
            f"| {goal.promise} | {goal.asked} | "
            f"{'' if goal.value is None else f'{goal.value:.3g}'} | {goal.verdict} | {goal.how} |"
            for goal in found
        ]
        header = "| goal | asked | measured | | from |\n|---|---|---|---|---|\n"
        parts += [f"## Goals, width {width}", header + "\n".join(lines)]
    parts += ["## All rows", _HEADER + "\n".join(shown(row) for row in table.rows)]
    ratios = {f"width{width}": {goal.name: _as_json(goal) for goal in found} for width, found in by_width.items()}
    return "\n\n".join([*parts, json.dumps(ratios)])


def _as_json(goal: Goal) -> dict[str, Any]:
    told = {"value": None if goal.value is None else round(goal.value, 4), "verdict": goal.verdict}
    if goal.spread is None:
        return told
    return told | {"least": round(goal.spread[0], 4), "most": round(goal.spread[1], 4)}


_HEADER = (
    "| width | L | users | candidates | arm | way | ms | least to most | M candidates/s, or requests/s |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def shown(row: Row) -> str:
    rate, arm = "", row["arm"]
    if "requests_per_s" in row:
        rate = f"{row['requests_per_s']:.0f} ({row['requests_per_s_without_reads']:.0f} without reads)"
        stages = ", ".join(f"{name} {ms:.3g}" for name, ms in row["stages_ms"].items())
        arm += f", budget {row['budget_share']:.0%}, {row['new_events']} new ({stages} ms)"
    elif row["arm"] == "hit":
        rate = f"{row['users'] * row['candidates'] / row['ms'] / 1e3:.3g}"
    if "move_ms" in row:
        arm += f" ({row['inside_ms']:.3g} inside a stride, {row['move_ms']:.3g} to move)"
    spread = f"{row['least_ms']:.3g} to {row['most_ms']:.3g}"
    cells = (
        row["width"], row["L"], row["users"], row.get("candidates", ""), arm, row.get("way", ""), f"{row['ms']:.3g}", spread, rate,
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _conditions(rows: Sequence[Row]) -> str:
    told = [row["conditions"] for row in rows if "conditions" in row]
    lines = [", ".join(dict.fromkeys(str(one[name]) for one in told)) for name in ("hardware", "software", "states")]
    seconds, num_cut = sum(row.get("seconds", 0) for row in rows), sum("ended_early" in row for row in rows)
    worst = max((d for row in rows for d in row.get("differences", {}).values()), default=None)
    return "\n".join(
        [
            f"- hardware: {lines[0]}",
            f"- {lines[1]}",
            f"- {lines[2]}; {len(told)} shard(s), {seconds:.0f} s in all{f', {num_cut} ended early' * (num_cut > 0)}",
            "- correctness first: probabilities of states that were encoded, then appended to over a stride and its move, "
            f"lie within {worst:.2g} of a float64 forward pass over the whole history, by every way that was timed"
            if worst is not None
            else "- no way of states was checked or timed",
            "- times: median of rounds, each the mean of several steps from NumPy to NumPy; `graph`: as serving runs it, `eager`: "
            "launched kernel by kernel; an append's is its mean over a stride, the windows' move included by its share, or, "
            "`mixed`, of users who stand anywhere in theirs; recomputation is laid out and sent before its clock starts",
        ]
    )
