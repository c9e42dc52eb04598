"""What the study trains: arms of a grid, each a name, a log and what differs from that log's base, most important first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from longer.config import ModelSettings

ENCODERS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "sum_pooling": {"kind": "sum_pooling"},
    "din": {"kind": "din"},
    "din_recent50": {"kind": "din", "recent_events": 50},
    "sim_hard": {"kind": "sim", "search": "hard"},
    "sim_soft": {"kind": "sim", "search": "soft"},
    "twin": {"kind": "twin"},
    "transformer": {"kind": "transformer"},
    "hstu": {"kind": "hstu"},
    "user_embedding": {"kind": "user_embedding"},
}
LENGTHS = (20, 50, 100, 200, 500, 1000, 2000, 4000)
_MOST_STRIDE_EVENTS = 200
FEATURES = "+features"
"""Suffix of arms that have the interaction features too."""


@dataclass(frozen=True)
class Base:
    """What all arms of a log share. `long_from`: a history that is called long, in events."""

    length: int
    width: int
    num_queries: int
    num_layers: int
    long_from: int
    category: str
    """Feature by which SIM's hard search searches."""
    rows: dict[str, int] = field(default_factory=dict)


BASES = {
    "journey": Base(4000, 128, 100, 1, 1000, "category", {"item_rows": 131_072, "user_rows": 4_096}),
    "movielens": Base(1000, 64, 100, 1, 100, "genres", {"item_rows": 8_192, "user_rows": 2_048}),
    "generated": Base(10_000, 128, 100, 1, 5000, "category", {"item_rows": 131_072, "user_rows": 4_096}),
}
QUICK = {
    "journey": Base(200, 32, 16, 1, 100, "category", {"item_rows": 16_384, "user_rows": 4_096}),
    "movielens": Base(200, 32, 16, 1, 100, "genres", {"item_rows": 8_192, "user_rows": 2_048}),
    "generated": Base(400, 32, 16, 1, 200, "category", {"item_rows": 16_384, "user_rows": 1_024}),
}


@dataclass(frozen=True)
class Arm:
    name: str
    log: str
    group: str
    """The table or plot that it is for."""
    seed: int
    encoder: str = "longer"
    features: bool = True
    length: int | None = None
    merge: int = 4
    queries: int | None = None
    """k in tokens; None: the base's."""
    model: dict[str, Any] = field(default_factory=dict)
    score_length: int | None = None
    """Trained at `length`, it is tested at this one: train short, serve long."""
    from_matches: bool = False
    """LONGER's first layer begins as a search for the candidate's own events (`training.start_from_matches`)."""

    @property
    def key(self) -> str:
        return f"{self.log}/{self.name}/{self.seed}"


def model_settings(arm: Arm, base: Base) -> ModelSettings:
    """The arm's model: the same width whatever is merged, and a window of the wanted length, rounded up to whole groups."""
    merge = arm.merge if arm.encoder == "longer" else 1
    groups = math.ceil((arm.length or base.length) / merge)
    k = groups if arm.encoder != "longer" else min(arm.queries or base.num_queries, groups)
    k, groups, stride = _windows(k, groups, _MOST_STRIDE_EVENTS // merge)
    chosen = {"encoder": dict(ENCODERS[arm.encoder])} if arm.encoder != "longer" else {}
    if arm.encoder == "sim_hard":
        chosen["encoder"]["field"] = base.category
    width = arm.model.get("width", base.width)
    sizes = {
        "history_events": groups * merge,
        "merge_size": merge,
        "event_width": width // merge,
        "query_groups": k,
        "stride_groups": stride,
        "num_self_layers": base.num_layers,
        "interactions": arm.features,
        **base.rows,
    }
    return ModelSettings(**{**sizes, **chosen, **{k: v for k, v in arm.model.items() if k != "width"}})


def _windows(k: int, groups: int, most_stride: int) -> tuple[int, int, int]:
    """Query and history windows in groups, and the longest stride that divides both, is at most half of the first and an eighth of
    the second; a history window that none divides grows by a few groups."""
    most = max(1, min(k // 2, groups // 8, most_stride))
    stride = max(s for s in range(1, most + 1) if k % s == 0)
    return k, math.ceil(groups / stride) * stride if k < groups else k, stride


def grid(log: str, quick: bool, seeds: int) -> list[Arm]:
    """All arms of a log in the order in which they are worth their time; seeds of headline arms come one round each."""
    make = {"journey": _journey, "movielens": _movielens, "generated": _generated}[log]
    return list(make(quick, seeds))


def _journey(quick: bool, seeds: int) -> Iterator[Arm]:
    base = Arm("", "journey", "encoders", 0)
    for seed in range(1 if quick else seeds):
        here = replace(base, seed=seed)
        yield replace(here, name="longer" + FEATURES)
        yield replace(here, name="none" + FEATURES, encoder="none")
        yield replace(here, name="longer", features=False)
        for name in ENCODERS:
            if name != "none":
                yield replace(here, name=name + FEATURES, encoder=name)
        if quick:
            yield from _lengths(here, (20, 50, 200))
            continue
        for name in ENCODERS:
            yield replace(here, name=name, encoder=name, features=False)
        yield from _merging(here)
        yield from _switches(here)
        yield from _lengths(here, LENGTHS)


def _merging(here: Arm) -> Iterator[Arm]:
    """Does what merging loses come back if the first layer need not find out how to recognise an item?"""
    here = replace(here, group="switches", from_matches=True)
    yield replace(here, name="K=4 from matches", features=False)
    yield replace(here, name="K=8 from matches", features=False, merge=8, queries=50)
    yield replace(here, name="K=1 from matches", features=False, merge=1, queries=400)
    yield replace(here, name="longer from matches" + FEATURES, group="encoders")


def _switches(here: Arm) -> Iterator[Arm]:
    """LONGER's own ablations, as in the paper's Table 2, on ids and side features alone."""
    here = replace(here, group="switches", features=False)
    yield replace(here, name="K=1", merge=1, queries=400)
    yield replace(here, name="K=8", merge=8, queries=50)
    yield replace(here, name="K=4 no InnerTrans", model={"inner_transformer": False})
    yield replace(here, name="K=2", merge=2, queries=200)
    for queries in ("uniform", "learnable", "recent_uniform"):
        yield replace(here, name=f"{queries} queries", model={"queries": queries})
    for k in (12, 25, 50, 200, 1000):
        yield replace(here, name=f"k={k}", queries=k)
    yield replace(here, name="paper's encoding", model={"encoding": "paper"})
    yield replace(here, name="N=2", model={"num_self_layers": 2})
    yield replace(here, name="N=0", model={"num_self_layers": 0})
    yield replace(here, name="width 256", model={"width": 256})


def _lengths(here: Arm, lengths: tuple[int, ...]) -> Iterator[Arm]:
    for features in (True, False):
        for length in lengths[:-1]:
            suffix = FEATURES if features else ""
            yield replace(here, name=f"longer L={length}{suffix}", group="lengths", length=length, features=features)
    short = replace(here, group="switches", features=False, score_length=lengths[-1])
    for length in lengths[-4:-1]:
        yield replace(short, name=f"trained at L={length}, tested at {lengths[-1]}", length=length)
    for length in lengths[2:-1:2]:
        name = f"transformer L={length}"
        yield replace(here, name=name, group="flops", length=length, encoder="transformer", features=False)


def _movielens(quick: bool, seeds: int) -> Iterator[Arm]:
    base = Arm("", "movielens", "encoders", 0)
    for seed in range(1 if quick else seeds):
        here = replace(base, seed=seed)
        yield replace(here, name="longer", features=False)
        yield replace(here, name="longer" + FEATURES)
        for name in ENCODERS:
            yield replace(here, name=name, encoder=name, features=False)
        yield replace(here, name="none" + FEATURES, encoder="none")
        for length in (20, 50, 100, 200):
            yield replace(here, name=f"longer L={length}", group="lengths", length=length, features=False)


def _generated(quick: bool, seeds: int) -> Iterator[Arm]:
    base = Arm("", "generated", "lengths", 0, features=False)
    lengths = (50, 100, 200, 400) if quick else (100, 200, 500, 1000, 2000, 4000, 6000, 10_000)
    for seed in range(1 if quick else seeds):
        here = replace(base, seed=seed)
        for length in reversed(lengths):
            yield replace(here, name=f"longer L={length}", length=length)
        for length in reversed(lengths):
            yield replace(here, name=f"longer L={length}{FEATURES}", length=length, features=True)
        for length in (2000,) if not quick else ():
            name = f"trained at L={length}, tested at {lengths[-1]}"
            yield replace(here, name=name, group="switches", length=length, score_length=lengths[-1])
        for width in (32, 64, 256) if not quick else (16,):
            yield replace(here, name=f"longer width {width}", group="widths", model={"width": width})
        for name in ("none", "din_recent50", "sim_hard", "twin", "transformer"):
            yield replace(here, name=name, group="encoders", encoder=name)
