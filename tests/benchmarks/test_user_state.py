"""The user-state benchmark's page: every goal from the rows, whichever shards measured them, and nothing made up."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.model_arms.sizes import model_settings
from benchmarks.state_arms.page import Table, goals, page
from benchmarks.state_arms.states import _BLOCK_CANDIDATES, blocks_of
from benchmarks.state_arms.users import Users

Row = dict[str, Any]


def row(arm: str, ms: float, users: int = 1, length: int = 10_000, **more: Any) -> Row:
    size = {"width": 256, "L": length, "users": users, "stride": 400 if length > 1_000 else 200}
    return {"arm": arm, "ms": ms, "least_ms": ms, "most_ms": ms, **size, **more}


def append(length: int, inside_ms: float, move_ms: float) -> Row:
    stride = 400 if length > 1_000 else 200
    mean_ms = inside_ms + (move_ms - inside_ms) * 8 / stride
    return row("append 8", mean_ms, 32, length, way="graph", inside_ms=inside_ms, move_ms=move_ms)


def replay(share: float, per_s: float, without_reads: float) -> Row:
    rates = {"requests_per_s": per_s, "requests_per_s_without_reads": without_reads}
    shares = {"hit": 0.1, "append": 0.5, "load": 0.4}
    return row("replay", 1.0, 32, budget_share=share, new_events=8, **rates, **shares)


ROWS = [
    *(row("recompute", ms, candidates=c) for c, ms in ((64, 30.0), (500, 200.0))),
    *(row("encode", ms, way=way) for way, ms in (("eager", 20.0), ("graph", 4.0))),
    *(row("hit", ms, way=way, candidates=c) for way, c, ms in (("eager", 64, 9.0), ("graph", 64, 0.5), ("graph", 500, 0.8))),
    *(row("hit", ms, 32, way="graph", candidates=c) for c, ms in ((64, 0.7), (500, 1.0))),
    *(row("host hit", ms, u, way="graph", candidates=500) for u, ms in ((1, 1.0), (32, 5.0))),
    row("encode", 12.0, 32, way="graph"),
    *(append(n, inside, move) for n, inside, move in ((1_000, 1.0, 3.0), (2_000, 1.0, 3.0), (10_000, 1.1, 4.0))),
    row("read", 6.0, candidates=500),
    replay(0.0, 100.0, 200.0),
    replay(0.5, 150.0, 240.0),
    {"conditions": {"hardware": "h", "software": "s", "states": "bf16", "differences": {"a": 1e-4}, "seconds": 7.0}},
]  # fmt: skip


def test_every_goal_is_computed_from_the_fastest_way_and_told_met_or_missed() -> None:
    found = {goal.name: (goal.value, goal.verdict) for goal in goals(Table(ROWS), 256)}
    assert found["hit_vs_recompute"] == (pytest.approx(200 / 0.8), "met")
    assert found["hit_vs_encode"] == (pytest.approx(4.5 / 0.5), "met")
    assert found["hit_vs_read_and_encode"] == (pytest.approx(10.5 / 0.5), "met")
    assert found["million_candidates_per_s"] == (pytest.approx(16.0), "missed")
    assert found["encode_vs_append8"] == (pytest.approx(12 / (1.1 + 2.9 * 8 / 400)), "met")
    assert found["host_hit_vs_encode_1users"] == (pytest.approx(0.05), "met")
    assert found["host_hit_vs_encode_32users"] == (pytest.approx(4 / 12), "missed")
    assert found["end_to_end_L10000_50%_8new_reads"][0] == pytest.approx(1.5)
    assert found["end_to_end_L10000_50%_8new_no_reads"][0] == pytest.approx(1.2)


def test_appends_are_compared_over_one_stride_though_short_histories_move_more_often() -> None:
    [flat] = [goal for goal in goals(Table(ROWS), 256) if goal.name == "append8_flat"]
    assert flat.value == pytest.approx((1.1 + 2.9 * 0.02) / (1.0 + 2.0 * 0.02))
    assert flat.verdict == "met"
    assert "1.08 at L=1000" in flat.how  # over its own stride


def test_what_was_not_measured_is_said_not_guessed() -> None:
    rows = [one for one in ROWS if one.get("arm") not in ("read", "append 8", "recompute")]
    verdicts = {goal.name: goal.verdict for goal in goals(Table(rows), 256)}
    assert {name for name, verdict in verdicts.items() if verdict == "not measured"} == {
        *("hit_vs_recompute", "hit_vs_read_and_encode", "append8_flat", "encode_vs_append8")
    }
    told = json.loads(page(rows).splitlines()[-1])
    assert told["width256"]["append8_flat"] == {"value": None, "verdict": "not measured"}


def test_every_candidate_is_recomputed_exactly_once() -> None:
    users = Users(model_settings(8, 128, small=True), 1, "float32")
    asked = users.asked(1, 2 * _BLOCK_CANDIDATES + 6)
    blocks = blocks_of(users, asked)
    assert [block.num_requests for block in blocks] == [_BLOCK_CANDIDATES, _BLOCK_CANDIDATES, 6]
    recomputed = np.concatenate([block.candidates.features["item_id"] for block in blocks])
    np.testing.assert_array_equal(recomputed, asked.candidates.features["item_id"])
    assert all((np.diff(block.histories.offsets_B1) == 128).all() for block in blocks)
