"""What the study trains: arms, each a name, a log and what differs from that log's base."""

import math
from dataclasses import dataclass, field
from typing import Any

from longer.model_settings import ModelSettings

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
_MOST_STRIDE_EVENTS = 200
UNDO = (
    "first layer not a search",
    "merge not concatenation",
    "loud numbers",
    "quiet items",
    "values without the mark",
    "first layer turns",
    "all pairs turn",
    "none of it",
)
"""Parts of LONGER's start that the study takes back one by one, and all of them (`training.undo`)."""
FEATURES = "+features"
"""Suffix of arms that have the interaction features too."""
UNMERGED = "K=1"
"""LONGER in which every event is a token."""
ITSELF = "longer, no history"
"""LONGER whose candidates attend to themselves alone (`control.NoHistory`)."""


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
    "generated": Base(10_000, 128, 100, 1, 5000, "category", {"item_rows": 131_072, "user_rows": 32_768}),
}
QUICK = {
    "journey": Base(500, 128, 25, 1, 100, "category", {"item_rows": 131_072, "user_rows": 4_096}),
    "movielens": Base(200, 64, 16, 1, 100, "genres", {"item_rows": 8_192, "user_rows": 2_048}),
    "generated": Base(400, 64, 16, 1, 200, "category", {"item_rows": 16_384, "user_rows": 1_024}),
}


@dataclass(frozen=True)
class Trained:
    """How an encoder is trained: peak learning rates of tables and of dense layers, and passes over the requests."""

    tables: float = 0.01
    dense: float = 0.002
    passes: int = 1


@dataclass(frozen=True)
class Arm:
    name: str
    log: str
    group: str
    """One of `grid.GROUPS`, or tuning."""
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
    undone: str | None = None
    """One of `training.UNDO`: what LONGER's start is without that part of it."""
    trial: Trained | None = None
    """How a `tuning` arm is trained; others are as their trials say."""
    more_passes: int = 0
    """Beside those that the trials say: what the study's budget of passes keeps from an encoder."""

    @property
    def key(self) -> str:
        return f"{self.log}/{self.name}/{self.seed}"

    @property
    def is_longer(self) -> bool:
        return self.encoder in ("longer", ITSELF)

    @property
    def is_tested(self) -> bool:
        """What steers the study sees the validation split only."""
        return self.group not in ("tuning", "tried", "undone")

    @property
    def is_compared(self) -> bool:
        """With intervals over users."""
        return self.group == "encoders" or self.name in (UNMERGED, UNMERGED + FEATURES)


def model_settings(arm: Arm, base: Base) -> ModelSettings:
    """The arm's model: the same width whatever is merged, and a window of the wanted length, rounded up to whole groups.

    Other encoders have LONGER's window at that length, event for event.
    """
    groups = math.ceil((arm.length or base.length) / arm.merge)
    k, groups, stride = _windows(min(arm.queries or base.num_queries, groups), groups, _MOST_STRIDE_EVENTS // arm.merge)
    merge = arm.merge
    if not arm.is_longer:
        k, groups, stride, merge = groups * merge, groups * merge, stride * merge, 1
    chosen = {} if arm.is_longer else {"encoder": dict(ENCODERS[arm.encoder])}
    if arm.encoder == "sim_hard":
        chosen["encoder"]["field"] = base.category
    width = arm.model.get("width", base.width)
    sizes = {
        "num_heads": max(4, merge),  # a head for each event of a group, so that each can be searched for by itself
        "inner_transformer": merge > 1,  # a group of one has nothing inside
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
