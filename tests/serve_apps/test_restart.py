"""A service that stops and starts again on real Ray Serve: its users' states are there before they ask."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from longer.ring import Ring, session_of
from tests.serve_apps.services import CANDIDATES, END_MS, Front, Replicas, kept, running, wait_for_replicas
from tests.serving.tables import NUM_USERS, build_world

USERS = range(1, NUM_USERS + 1)
SENDER, EVENT = 5, {"item_id": "item2", "event_ts": END_MS - 1, "action": "buy"}


def score(url: str, user: int) -> dict[str, Any]:
    body = {"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS}
    answer = httpx.post(f"{url}/v1/score", json=body, headers={"x-session-id": str(user)}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def have_warmed_their_own(replicas: Replicas) -> bool:
    """Both: the first, while it is alone, may have warmed everybody."""
    ring = Ring([one["replica"] for one in replicas])
    own = Counter(ring.owner(session_of(user)) for user in USERS)
    return len(replicas) == 2 and all(one["kept_states"]["warmed"] >= own[one["replica"]] for one in replicas)


@pytest.mark.ray
def test_the_first_request_after_a_restart_is_a_hit_that_knows_what_was_sent_and_a_forgotten_user_stays_forgotten(
    front: Front, tmp_path: Path
) -> None:
    """Slow: a service starts twice."""
    world = build_world(tmp_path / "world")
    kwargs = {"host_cache_bytes": 1 << 20, "state_dump": str(tmp_path / "dumps"), "refresh_s": 1}
    with running(front, world, num_replicas=2, max_replicas=2, **kwargs) as url:
        assert score(url, SENDER)["user_state"]["num_events"] == SENDER**2
        body, session = {"user_id": SENDER, "events": [EVENT]}, {"x-session-id": str(SENDER)}
        assert httpx.post(f"{url}/v1/events", json=body, headers=session, timeout=30).json()["new"] == 1
        before = {user: score(url, user) for user in USERS}
        assert before[SENDER]["user_state"]["num_events"] == SENDER**2 + 1
        assert httpx.delete(f"{url}/v1/users/3", timeout=30).json()["held"] == 1
        # Who stops meanwhile may have dumped her already: no dump brings her back.
        assert len([*(tmp_path / "dumps" / "forgotten").iterdir()]) == 1
    with running(front, world, num_replicas=1, **kwargs) as url:
        found = kept(wait_for_replicas(url, lambda replicas: kept(replicas)["restored"] >= NUM_USERS - 1))
        assert (found["restored"], found["torn"], found["disagreeing"]) == (NUM_USERS - 1, 0, 0)
        after = {user: score(url, user) for user in USERS}
        cache = httpx.get(f"{url}/v1/stats", timeout=30).json()["cache"]
    assert {user: answer["user_state"]["source"] for user, answer in after.items()} == {
        user: "load" if user == 3 else "hit" for user in USERS
    }
    assert cache["promote"] == NUM_USERS - 1
    assert after[SENDER]["user_state"] == {**before[SENDER]["user_state"], "source": "hit"}
    for user in USERS:
        np.testing.assert_allclose(after[user]["scores"]["label"], before[user]["scores"]["label"], rtol=0, atol=1e-6)


@pytest.mark.ray
def test_replicas_warm_their_own_most_active_users_who_hit_at_once_and_the_end_of_the_access_log_is_written(
    front: Front, tmp_path: Path
) -> None:
    world = build_world(tmp_path)
    with running(front, world, num_replicas=2, max_replicas=2, warm_users=NUM_USERS, refresh_s=1) as url:
        replicas = wait_for_replicas(url, have_warmed_their_own)
        assert {score(url, user)["user_state"]["source"] for user in USERS} == {"hit"}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    lines = [line for one in replicas for line in (logs / f"access_{one['replica']}.jsonl").read_text().splitlines()]
    assert sum(json.loads(line)["route"] == "score" for line in lines) == NUM_USERS
