"""Arrow streams become requests or one line, whatever their bytes; a small body never becomes a large one."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.serving.scorer import ScoreRequest, ScoreResult
from serve_apps.arrow_body import arrow_answer, parse_arrow_body
from serve_apps.protocol import Asked, BodyError, Limits

LIMITS = Limits(max_candidates=1000, max_events=2, max_users=1)


def stream(columns: dict[str, Any], about: Any, compression: str | None = None, batch_rows: int = 400) -> bytes:
    table = pa.table(columns).replace_schema_metadata({"request": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, batch_rows)
    return sink.getvalue().to_pybytes()


COLUMNS = {"id": np.arange(900), "price": pa.array([None, *range(899)], pa.float32()), "brand": ["b"] * 900}
ABOUT = {"user_id": 7, "request_ts": 5, "top_k": 3, "events": [{"item_id": 1, "event_ts": 2}]}


def test_a_stream_asks_what_the_same_json_would() -> None:
    asked = parse_arrow_body(stream(COLUMNS, ABOUT), LIMITS)
    request = asked.request
    assert (request.user_id, request.request_ts, asked.top_k) == (7, 5, 3)
    assert request.events == {"item_id": [1], "event_ts": [2], "action": [None]}
    assert request.item_ids == pa.array(range(900))
    assert request.item_features["price"][:2].to_pylist() == [None, 0.0]
    assert set(request.item_features) == {"price", "brand"}


def test_an_answer_has_the_best_candidates_and_the_rest_beside_them() -> None:
    asked = Asked(ScoreRequest(7, pa.array(["a", "b", "c"])), 2)
    result = ScoreResult({"click": np.array([0.1, 0.9, 0.5], np.float32)}, 5, "hit", 12, 4)
    table = pa.ipc.open_stream(arrow_answer(asked, result, "m1")).read_all()
    assert table["id"].to_pylist() == ["b", "c"]
    assert table["click"].type == pa.float32()
    answer = json.loads(table.schema.metadata[b"answer"])
    assert answer == {
        "model_version": "m1",
        "user_state": {"source": "hit", "num_events": 12, "last_event_ts": 4},
    }


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "body: not an Arrow IPC stream"),
        (b"secret" * 99, 400, "body: not an Arrow IPC stream"),
        (stream(COLUMNS, ABOUT)[:-2000], 400, "body: not an Arrow IPC stream"),
        (stream(COLUMNS, ABOUT, "zstd"), 400, "body: not an Arrow IPC stream of plain columns"),
        (stream({"id": pa.array(["a"]).dictionary_encode()}, ABOUT), 400, "body: not an Arrow IPC stream of plain"),
        (stream({"id": [[1]]}, ABOUT), 422, "body: not an Arrow IPC stream of plain columns"),
        (stream({"id": pa.nulls(10)}, ABOUT), 422, "body: not an Arrow IPC stream of plain columns"),
        (stream({"id": np.arange(1001)}, ABOUT), 413, "candidates: at most 1000"),
        (stream({"id": pa.array([], pa.int64())}, ABOUT), 422, "candidates: expected a column `id`"),
        (stream({"item": [1]}, ABOUT), 422, "candidates: expected a column `id`"),
        (stream({"id": pa.array([1, None])}, ABOUT), 422, "candidates: an id is null"),
        (stream({"id": [1]}, {}), 422, "user_id: missing"),
        (
            stream({"id": [1]}, {**ABOUT, "candidates": ["secret"]}),
            422,
            "body: expected an object with no other fields",
        ),
        (stream({"id": [1]}, {**ABOUT, "events": ABOUT["events"] * 3}), 413, "events: at most 2"),
    ],
)
def test_a_bad_stream_has_one_line_without_its_values(body: bytes, status: int, reason: str) -> None:
    with pytest.raises(BodyError) as caught:
        parse_arrow_body(body, LIMITS)
    assert (caught.value.status, "secret" in str(caught.value)) == (status, False)
    assert str(caught.value).startswith(reason)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_stream_is_more_than_a_bad_request(data: st.DataObject) -> None:
    body = bytearray(stream(COLUMNS, ABOUT))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(0, 2000), st.integers(0, len(body) - 1)))
        body[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    try:
        asked = parse_arrow_body(bytes(body[: data.draw(st.integers(len(body) // 2, len(body)))]), LIMITS)
    except BodyError:
        return
    assert len(asked.request.item_ids) <= 1000
    assert isinstance(asked.request.item_ids, pa.Array)
    asked.request.item_ids.to_pylist()
