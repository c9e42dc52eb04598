"""Bodies become requests or one line that repeats nothing of them."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longer.grpc_client import _score_request as score_message
from longer.serving.requests import LAST_MS
from longer.serving.scorer import ScoreRequest, ScoreResult
from serve_apps.arrow_body import parse_arrow_body
from serve_apps.messages import parse_score
from serve_apps.protocol import (
    Asked,
    BodyError,
    Limits,
    as_json,
    parse_events_body,
    parse_score_batch_body,
    parse_score_body,
    score_answer,
)

LIMITS = Limits(max_candidates=3, max_events=2, max_users=2)


def parse(body: Any) -> Asked:
    return parse_score_body(json.dumps(body).encode(), LIMITS)


def test_ids_and_objects_mix() -> None:
    asked = parse({"user_id": 7, "candidates": [1, {"id": 2, "features": {"price": 3, "brand": "b"}}]})
    assert asked.request == ScoreRequest(7, [1, 2], {"price": [None, 3], "brand": [None, "b"]})
    assert asked.top_k is None


def test_features_of_the_request_come_with_it_whatever_the_protocol() -> None:
    features = {"device": "phone", "page": 2, "ratio": 0.5, "unknown": None}
    json_body = {"user_id": 7, "candidates": [1], "request_features": features}
    arrow = pa.table({"id": [1]}).replace_schema_metadata(
        {"request": json.dumps({"user_id": 7, "request_features": features})}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, arrow.schema) as writer:
        writer.write_table(arrow)
    message = score_message(7, [1], request_features=features)
    for asked in (
        parse(json_body),
        parse_arrow_body(sink.getvalue().to_pybytes(), LIMITS),
        parse_score(message, LIMITS),
    ):
        assert asked.request.request_features == features


@pytest.mark.parametrize("when", ["2024-01-01T00:00:00Z", "2024-01-01T02:00:00+02:00", 1_704_067_200_000])
def test_times_are_iso_or_milliseconds(when: Any) -> None:
    assert parse({"user_id": "u", "candidates": ["a"], "request_ts": when}).request.request_ts == 1_704_067_200_000


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"user_id": 7, "candid', 400, "body: not valid JSON"),
        (b"\xff\xfe", 400, "body: not valid JSON"),
        (b"[1]", 422, "body: expected an object with no other fields than"),
        ({"user_id": 7, "candidates": [1], "secret": 1}, 422, "body: expected an object with no other fields than"),
        ({"candidates": [1]}, 422, "user_id: missing"),
        ({"user_id": ["secret"], "candidates": [1]}, 422, "user_id: expected an integer or a string"),
        ({"user_id": True, "candidates": [1]}, 422, "user_id: expected an integer or a string"),
        ({"user_id": 7, "candidates": []}, 422, "candidates: the list is empty"),
        ({"user_id": 7, "candidates": [{"secret": 1}]}, 422, "candidates: expected a list of item ids"),
        ({"user_id": 7, "candidates": [1.5]}, 422, "candidates: expected a list of item ids"),
        ({"user_id": 7, "candidates": [1] * 4}, 413, "candidates: at most 3 in a request"),
        ({"user_id": 7, "candidates": [1], "request_ts": "secret"}, 422, "request_ts: expected ISO 8601"),
        ({"user_id": 7, "candidates": [1], "request_ts": "2024-01-01T00:00:00"}, 422, "request_ts: expected ISO 8601"),
        ({"user_id": 7, "candidates": [1], "request_ts": 10**30}, 422, "request_ts: expected ISO 8601"),
        ({"user_id": 7, "candidates": [1], "events": [{"item_id": 1, "event_ts": 2}] * 3}, 413, "events: at most 2"),
        (
            {"user_id": 7, "candidates": [1], "events": [{"item_id": "secret"}]},
            422,
            "events: expected a list of objects",
        ),
        (
            {
                "user_id": 7,
                "candidates": [1],
                "events": [{"item_id": 1, "event_ts": 2, "features": {"action": "secret"}}],
            },
            422,
            "events: expected a list of objects",
        ),
        (
            {"user_id": 7, "candidates": [{"id": 1, "features": {f"secret{n}": 1 for n in range(300)}}]},
            422,
            "candidates: more than 256 different features",
        ),
        ({"user_id": 7, "candidates": [{"id": 1, "features": {"a": True}}]}, 422, "candidates: expected a list"),
        ({"user_id": 7, "candidates": [1], "top_k": 0}, 422, "top_k: expected a positive integer"),
    ],
)
def test_a_bad_body_has_one_line_without_its_values(body: Any, status: int, reason: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BodyError) as caught:
        parse_score_body(sent, LIMITS)
    assert caught.value.status == status
    assert str(caught.value).startswith(reason)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_top_k_are_the_best_by_the_first_task_and_tasks_stay_aligned() -> None:
    scores = {"click": np.array([0.1, 0.9, 0.5], np.float32), "buy": np.array([1, 2, 3], np.float32)}
    result = ScoreResult(scores, 5, "hit", 12, 4)
    response = json.loads(as_json(score_answer(Asked(ScoreRequest(7, [10, 20, 30]), 2), result, "m1")))
    assert response["candidates"] == [20, 30]
    assert response["scores"]["buy"] == [2, 3]
    assert np.float32(response["scores"]["click"][0]) == np.float32(0.9)
    assert response["user_state"] == {"source": "hit", "num_events": 12, "last_event_ts": 4}


def test_scores_lose_nothing_in_json() -> None:
    of_two_tasks = np.random.default_rng(1).random((500, 2), np.float32)  # a task's scores are not side by side
    result = ScoreResult({"a": of_two_tasks[:, 0], "b": of_two_tasks[:, 1]}, 5, "hit", 12, 4)
    told = json.loads(as_json(score_answer(Asked(ScoreRequest("u", list(range(500))), None), result, "m1")))["scores"]
    assert np.array_equal(np.array([told["a"], told["b"]], np.float32).T, of_two_tasks)


@given(st.integers(0, LAST_MS))
@example(1_083_369_600_001)  # in the spring of 2004 the nearest float is less
def test_an_iso_time_is_its_millisecond(time_ms: int) -> None:
    """An event that is sent is the one in the log, not another a millisecond before."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    asked = parse({"user_id": "u", "candidates": ["a"], "request_ts": moment.isoformat()})
    assert asked.request.request_ts == time_ms


def test_events_become_columns_of_the_log_and_what_an_event_lacks_is_null() -> None:
    events = [{"item_id": 1, "event_ts": 5, "action": "buy"}, {"item_id": 2, "event_ts": 6, "features": {"price": 1.5}}]
    asked = parse_events_body(json.dumps({"user_id": "u", "events": events}).encode(), LIMITS)
    assert asked.user_id == "u"
    assert asked.events == {"item_id": [1, 2], "event_ts": [5, 6], "action": ["buy", None], "price": [None, 1.5]}


def test_a_batch_is_refused_whole_if_one_of_its_requests_is_none() -> None:
    good = {"user_id": 7, "candidates": [1]}
    assert len(parse_score_batch_body(json.dumps({"requests": [good, good]}).encode(), LIMITS)) == 2
    for requests, status in (([good] * 3, 413), ([good, {**good, "candidates": []}], 422), ([], 422)):
        with pytest.raises(BodyError) as caught:
            parse_score_batch_body(json.dumps({"requests": requests}).encode(), LIMITS)
        assert caught.value.status == status
