"""The Serve application over real HTTP."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from serve_apps.scoring import ScoringArgs
from tests.serve_apps.services import Front
from tests.serving.tables import DAY_MS, START_MS, build_world, checkpoint_path

EVENT = {"item_id": "item2", "action": "buy", "features": {"category": "category2", "price": 2, "quantity": 1}}
ITEMS = ["item1", "item5", "never seen"]
AFFINITY_S = 3.0
"""Within which a replica learns of another."""
END_MS = START_MS + 31 * DAY_MS


@pytest.fixture(scope="module")
def service(front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Scorer]]:
    """The URL of a running app with two replicas, and a scorer without a cache to compare with."""
    world = build_world(tmp_path_factory.mktemp("service"))
    tables = {"sequences": world.path("tables", "sequences"), "items": world.path("tables", "items")}
    args = ScoringArgs(
        checkpoint=world.path("checkpoints"),
        **tables,
        num_replicas=2,
        max_replicas=2,
        num_cpus=0.5,
        max_candidates=10,
        max_body_bytes=2000,
        max_events=5,
        max_users=4,
        access_log=False,
        refresh_s=1,
    )
    with front.running(args):
        time.sleep(AFFINITY_S)
        yield front.url, Scorer(checkpoint_path(world), args.sequences, 0, args.items)


def post(url: str, user: int, body: dict, session: str | None = None) -> httpx.Response:
    headers = {"x-session-id": session or str(user)}
    return httpx.post(f"{url}/v1/score", json={"user_id": user, **body}, headers=headers, timeout=30)


@pytest.mark.ray
def test_scores_over_http_equal_the_scorers_and_a_session_keeps_its_replica(service: tuple[str, Scorer]) -> None:
    url, scorer = service
    replicas: dict[int, set[str]] = {}
    for source, request_ts in (("load", END_MS), ("hit", END_MS + 1)):
        for user in range(1, 10):
            response = post(url, user, {"candidates": ITEMS, "request_ts": request_ts})
            assert response.status_code == 200, response.text
            answer = response.json()
            expected = scorer.score([ScoreRequest(user, ITEMS, request_ts=request_ts)])[0]
            assert isinstance(expected, ScoreResult)
            np.testing.assert_allclose(answer["scores"]["label"], expected.scores["label"], rtol=0, atol=1e-5)
            assert answer["user_state"]["source"] == source
            assert answer["user_state"]["num_events"] == user * user
            assert answer["model_version"] == scorer.info.model_version
            replicas.setdefault(user, set()).add(response.headers["x-replica"])
    assert all(len(seen) == 1 for seen in replicas.values())
    sessions = [httpx.get(f"{url}/healthz", headers={"x-session-id": str(s)}) for s in range(40)]
    assert len({response.headers["x-replica"] for response in sessions}) == 2


@pytest.mark.ray
def test_a_cold_user_and_an_unknown_item_get_scores_and_top_k_cuts(service: tuple[str, Scorer]) -> None:
    url, _ = service
    answer = post(url, 10**9, {"candidates": [*ITEMS, {"id": "new", "features": {"price": 2}}], "top_k": 2}).json()
    assert answer["user_state"] == {"source": "cold", "num_events": 0, "last_event_ts": None}
    scores = answer["scores"]["label"]
    assert len(answer["candidates"]) == 2
    assert scores == sorted(scores, reverse=True)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"candidates": ["a"] * 11}, 413, "candidates: at most 10"),
        ({"candidates": ["a" * 3000]}, 413, "body: at most 2000 bytes"),
        ({"candidates": [1]}, 422, "candidates: expected string values"),
        ({"candidates": ["a"], "request_ts": "yesterday"}, 422, "request_ts: expected ISO 8601"),
        ({"candidates": ["a"], "events": [{**EVENT, "event_ts": START_MS}] * 6}, 413, "events: at most 5"),
        ({"candidates": ["a"], "events": [{**EVENT, "event_ts": 2**43}]}, 422, "events: event_ts"),
        ({"candidates": ["a"], "events": [{"item_id": "a"}]}, 422, "events: expected a list of objects with item_id"),
    ],
)
def test_mistakes_are_answered_with_their_reason(
    service: tuple[str, Scorer], body: dict, status: int, reason: str
) -> None:
    response = post(service[0], 5, body)
    assert response.status_code == status
    assert response.json()["error"].startswith(reason)


@pytest.mark.ray
def test_half_a_body_and_a_lost_client_leave_the_service_well(service: tuple[str, Scorer]) -> None:
    url, scorer = service
    whole = json.dumps({"user_id": 5, "candidates": ITEMS}).encode()
    cut = httpx.post(f"{url}/v1/score", content=whole[:20], timeout=30)
    assert (cut.status_code, cut.json()) == (400, {"error": "body: not valid JSON"})
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(whole)}\r\n\r\n"
        connection.sendall(head.encode() + whole[:20])
    answer = post(url, 5, {"candidates": ITEMS, "request_ts": END_MS})
    assert answer.status_code == 200
    [expected] = scorer.score([ScoreRequest(5, ITEMS, request_ts=END_MS)])
    assert isinstance(expected, ScoreResult)
    np.testing.assert_allclose(answer.json()["scores"]["label"], expected.scores["label"], rtol=0, atol=1e-5)


@pytest.mark.ray
def test_what_is_served_and_how_it_does_can_be_asked(service: tuple[str, Scorer]) -> None:
    url, scorer = service
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
    model = httpx.get(f"{url}/v1/model").json()
    assert model["model_version"] == scorer.info.model_version
    assert model["sequences_version"] == scorer.history.version_id
    assert post(url, 5, {"candidates": ITEMS}).status_code == 200
    stats = httpx.get(f"{url}/v1/stats", headers={"x-session-id": "5"}).json()  # of the replica that has just answered
    assert stats["cache"]["hit"] >= 0
    assert 0 < stats["cache"]["bytes"] <= stats["cache"]["budget_bytes"]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert list(logs.rglob("*serve*"))
    assert not list(logs.rglob(f"access_{stats['replica']}*"))  # switched off


def held_by(url: str) -> dict[str, dict]:
    """Every replica's own account of itself."""
    stats = (httpx.get(f"{url}/v1/stats", headers={"x-session-id": str(n)}).json() for n in range(40))
    return {one["replica"]: one for one in stats}


def two_sessions(url: str) -> tuple[str, str]:
    """Sessions of two replicas."""
    owners = {
        httpx.get(f"{url}/healthz", headers={"x-session-id": s}).headers["x-replica"]: s for s in map(str, range(40))
    }
    first, second = owners.values()
    return first, second


@pytest.mark.ray
def test_events_sent_online_are_seen_by_the_scores_that_follow_and_counted_once(service: tuple[str, Scorer]) -> None:
    url, scorer = service
    sent = {"user_id": 4, "events": [{**EVENT, "event_ts": END_MS}]}
    for new in (1, 0):
        told = httpx.post(f"{url}/v1/events", json=sent, headers={"x-session-id": "4"})
        answer = {"received": 1, "new": new, "replica": told.headers["x-replica"]}
        assert (told.status_code, told.json()) == (200, answer)
    later = {**EVENT, "event_ts": END_MS + 5}
    answer = post(url, 4, {"candidates": ITEMS, "request_ts": END_MS + 9, "events": [later]}).json()
    assert answer["user_state"]["num_events"] == 18
    columns = {"item_id": ["item2"] * 2, "action": ["buy"] * 2, "event_ts": [END_MS, END_MS + 5]}
    columns |= {name: [value] * 2 for name, value in EVENT["features"].items()}
    [expected] = scorer.score([ScoreRequest(4, ITEMS, request_ts=END_MS + 9, events=columns)])
    assert isinstance(expected, ScoreResult)
    np.testing.assert_allclose(answer["scores"]["label"], expected.scores["label"], rtol=0, atol=1e-5)
    assert post(url, 4, {"candidates": ITEMS, "request_ts": END_MS + 5}).json()["user_state"]["num_events"] == 17
    scorer.forget(4)


@pytest.mark.ray
def test_several_users_in_one_call_have_the_scores_and_mistakes_that_they_would_have_alone(
    service: tuple[str, Scorer],
) -> None:
    url, _ = service
    requests = [
        {"user_id": 6, "candidates": ITEMS, "request_ts": END_MS},
        {"user_id": "six", "candidates": ITEMS},
        {"user_id": 7, "candidates": ITEMS[:2], "request_ts": END_MS, "top_k": 1},
    ]
    answer = httpx.post(f"{url}/v1/score:batch", json={"requests": requests})
    assert answer.status_code == 200
    first, wrong, last = answer.json()["results"]
    assert wrong == {"error": "user_id: expected int64 values", "status": 422}
    for result, asked in ((first, requests[0]), (last, requests[2])):
        alone = httpx.post(f"{url}/v1/score", json=asked).json()
        np.testing.assert_allclose(result["scores"]["label"], alone["scores"]["label"], rtol=0, atol=1e-5)
        assert result["candidates"] == alone["candidates"]
    many = httpx.post(f"{url}/v1/score:batch", json={"requests": requests[:1] * 5})
    assert (many.status_code, many.json()["error"][:22]) == (413, "requests: at most 4 in")


@pytest.mark.ray
def test_a_deleted_user_is_forgotten_by_every_replica_whichever_is_asked(service: tuple[str, Scorer]) -> None:
    url, _ = service
    for session in two_sessions(url):
        body = {"candidates": ITEMS, "request_ts": END_MS + 9, "events": [{**EVENT, "event_ts": END_MS}]}
        assert post(url, 3, body, session).json()["user_state"]["num_events"] == 10
    before = held_by(url)
    deleted = httpx.delete(f"{url}/v1/users/3", timeout=30)
    assert (deleted.status_code, deleted.json()) == (200, {"replicas": 2, "held": 2})
    after = held_by(url)
    for replica in before:
        assert after[replica]["cache"]["states"] == before[replica]["cache"]["states"] - 1
        assert after[replica]["online_events"]["users"] == before[replica]["online_events"]["users"] - 1
    for session in two_sessions(url):
        answer = post(url, 3, {"candidates": ITEMS, "request_ts": END_MS + 9}, session).json()
        assert (answer["user_state"]["source"], answer["user_state"]["num_events"]) == ("load", 9)
    for no_id in ("three", "1/2", "%0A3", "", "9" * 30):
        assert httpx.delete(f"{url}/v1/users/{no_id}").status_code == 422


def lost(url: str) -> dict[str, int]:
    counts = [one["lost_affinity"] for one in held_by(url).values()]
    return {reason: sum(one[reason] for one in counts) for reason in counts[0]}


def owner_of(url: str, user: int | str) -> str:
    return httpx.get(f"{url}/healthz", headers={"x-session-id": str(user)}).headers["x-replica"]


def other_session(url: str, user: int) -> str:
    """A session of another replica than the user's."""
    owner, sessions = owner_of(url, user), two_sessions(url)
    return next(session for session in sessions if owner_of(url, session) != owner)


@pytest.mark.ray
def test_requests_that_came_astray_are_counted_whatever_session_they_bring(service: tuple[str, Scorer]) -> None:
    url, _ = service
    before = lost(url)
    assert post(url, 5, {"candidates": ITEMS}).status_code == 200
    assert lost(url) == before
    assert httpx.post(f"{url}/v1/score", json={"user_id": 5, "candidates": ITEMS}).status_code == 200
    assert lost(url) == {**before, "no_session": before["no_session"] + 1}
    assert post(url, 5, {"candidates": ITEMS}, session=other_session(url, 5)).status_code == 200
    assert lost(url)["other_replica"] == before["other_replica"] + 1


@pytest.mark.ray
def test_of_a_batch_each_user_is_scored_once_by_the_owner_and_hits_whichever_replica_is_asked(
    service: tuple[str, Scorer],
) -> None:
    """Else each state is made, and kept, by every replica that a batch happens to reach."""
    url, scorer = service
    owners = {user: owner_of(url, user) for user in range(1000, 1040)}
    users = sorted(user for one in set(owners.values()) for user in [u for u in owners if owners[u] == one][:2])
    event, before = {**EVENT, "event_ts": END_MS - 1}, lost(url)
    columns = {name: [value] for name, value in {**event, **event["features"]}.items() if name != "features"}
    sources, answered_by = list[list[str]](), set[str]()
    while len(answered_by) < 2 or len(sources) < 3:
        requests = [{"user_id": user, "candidates": ITEMS, "request_ts": END_MS, "events": [event]} for user in users]
        answer = httpx.post(f"{url}/v1/score:batch", json={"requests": requests}, timeout=30)
        answered_by.add(answer.headers["x-replica"])
        results = answer.json()["results"]
        sources.append([result["user_state"]["source"] for result in results])
        for user, result in zip(users, results, strict=True):
            [alone] = scorer.score([ScoreRequest(user, ITEMS, request_ts=END_MS, events=columns)])
            assert isinstance(alone, ScoreResult)
            np.testing.assert_allclose(result["scores"]["label"], alone.scores["label"], rtol=0, atol=1e-5)
    assert sources == [["load"] * 4] + [["hit"] * 4] * (len(sources) - 1)
    assert lost(url) == before


@pytest.mark.ray
def test_a_part_of_a_batch_that_serve_hands_to_another_replica_than_its_owner_is_counted_there(
    service: tuple[str, Scorer],
) -> None:
    """What Serve does while the owner is full. Slow: each replica is looked for by 40 sessions, often."""
    url, _ = service
    handle, before = serve.get_deployment_handle("scoring", "scoring"), held_by(url)
    for session in two_sessions(url):
        part = [ScoreRequest(user, ITEMS, request_ts=END_MS) for user in (5, 6)]
        handle.options(method_name="score_here", session_id=session).remote(part).result(timeout_s=30)
    for replica, account in held_by(url).items():
        num_others = sum(owner_of(url, user) != replica for user in (5, 6))
        lost_before = before[replica]["lost_affinity"]
        assert account["lost_affinity"] == {**lost_before, "other_replica": lost_before["other_replica"] + num_others}


@pytest.mark.ray
def test_events_that_came_astray_are_known_where_the_users_requests_go(service: tuple[str, Scorer]) -> None:
    """Else the next request, which goes to the owner, would be scored without them."""
    url, _ = service
    sent = {"user_id": 8, "events": [{**EVENT, "event_ts": END_MS}]}
    for new in (1, 0):
        told = httpx.post(f"{url}/v1/events", json=sent, headers={"x-session-id": other_session(url, 8)})
        assert told.json() == {"received": 1, "new": new, "replica": owner_of(url, 8)}
        assert told.headers["x-replica"] != owner_of(url, 8)
    answer = post(url, 8, {"candidates": ITEMS, "request_ts": END_MS + 9}).json()
    assert answer["user_state"]["num_events"] == 65
    wrong = httpx.post(
        f"{url}/v1/events", json={**sent, "user_id": "eight"}, headers={"x-session-id": other_session(url, 8)}
    )
    assert (wrong.status_code, wrong.json()["error"]) == (422, "user_id: expected int64 values")
