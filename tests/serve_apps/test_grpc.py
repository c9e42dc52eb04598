"""The service over gRPC through Serve's own proxy: what HTTP answers, with its limits, its token and its reasons."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import json_format

from longer.client import ScoringClient
from longer.errors import UserError
from longer.grpc_client import GrpcScoringClient
from longer.rpc import scoring_pb2 as pb
from longer.rpc.scoring_pb2_grpc import ScoringServicer, ScoringStub, add_ScoringServicer_to_server
from serve_apps.scoring import ScoringArgs
from tests.serve_apps.services import END_MS, HOST, Front
from tests.serving.tables import build_world

ROOT = Path(__file__).parents[2]
TOKEN = "open-sesame"
METADATA = (("application", "scoring"), ("authorization", f"Bearer {TOKEN}"), ("session_id", "5"))
USER = pb.Id(number=5)
ITEMS = pb.Ids(texts=["item1", "item5"])
EVENT = pb.Event(item_id=pb.Id(text="item2"), event_ts=END_MS, action="buy", features={"quantity": pb.Value(number=1)})


def test_the_generated_code_is_what_the_proto_file_makes(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, "longer/rpc/scoring.proto"]
    subprocess.run(command, cwd=ROOT / "platform", check=True)
    for name in ("scoring_pb2.py", "scoring_pb2.pyi", "scoring_pb2_grpc.py"):
        assert (tmp_path / "longer/rpc" / name).read_text() == (ROOT / "platform/longer/rpc" / name).read_text()


@pytest.fixture(scope="module")
def service(front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScoringStub, str, str]]:
    """A stub, the URL of the same service over HTTP, and its gRPC address."""
    world = build_world(tmp_path_factory.mktemp("grpc"))
    token = Path(world.path("token"))
    token.write_text(TOKEN)
    limits = {"max_candidates": 3, "max_events": 2, "max_body_bytes": 2000, "max_users": 3}
    args = ScoringArgs(checkpoint=world.path("checkpoints"), token_file=str(token), num_cpus=0.5, **limits)
    address = f"{HOST}:{front.rpc_port}"
    with front.running(args), grpc.insecure_channel(address) as channel:
        yield ScoringStub(channel), front.url, address


@pytest.mark.ray
def test_calls_are_answered_as_over_http(service: tuple[ScoringStub, str, str]) -> None:
    stub, url, _ = service
    prices = pb.Column(name="price", values=[pb.Value(number=2.5), pb.Value()])
    request = pb.ScoreRequest(
        user_id=USER, candidates=ITEMS, features=[prices], request_ts=END_MS + 1, events=[EVENT], top_k=2
    )
    answer = stub.Score(request, metadata=METADATA, timeout=30)
    body = {
        "user_id": 5,
        "candidates": [{"id": "item1", "features": {"price": 2.5}}, "item5"],
        "request_ts": END_MS + 1,
        "top_k": 2,
    }
    headers = {"authorization": f"Bearer {TOKEN}", "x-session-id": "5"}
    expected = httpx.post(f"{url}/v1/score", json=body, headers=headers, timeout=30).json()
    assert list(answer.candidates.texts) == expected["candidates"]
    np.testing.assert_allclose(answer.scores["label"].values, expected["scores"]["label"], atol=1e-5)
    assert answer.model_version == expected["model_version"]
    assert (answer.user_state.num_events, answer.user_state.last_event_ts) == (26, END_MS)
    assert expected["user_state"] == {"source": "hit", "num_events": 26, "last_event_ts": END_MS}
    again = stub.AddEvents(pb.AddEventsRequest(user_id=USER, events=[EVENT]), metadata=METADATA)
    assert (again.received, again.new) == (1, 0)
    assert stub.ForgetUser(pb.ForgetUserRequest(user_id=USER), metadata=METADATA) == pb.ForgetUserResponse(
        replicas=1, held=1
    )
    stats = httpx.get(f"{url}/v1/stats", headers=headers, timeout=30).json()
    assert stats["lost_affinity"]["no_session"] == 0


MISTAKES = {
    "no user": (pb.ScoreRequest(candidates=ITEMS), "INVALID_ARGUMENT", "user_id: expected an integer or a string"),
    "another type of user": (
        pb.ScoreRequest(user_id=pb.Id(text="x"), candidates=ITEMS),
        "INVALID_ARGUMENT",
        "user_id: expected int64 values",
    ),
    "no candidates": (pb.ScoreRequest(user_id=USER), "INVALID_ARGUMENT", "candidates: expected item ids"),
    "many candidates": (
        pb.ScoreRequest(user_id=USER, candidates=pb.Ids(texts=["a"] * 4)),
        "OUT_OF_RANGE",
        "candidates: at most 3",
    ),
    "many events": (
        pb.ScoreRequest(user_id=USER, candidates=ITEMS, events=[EVENT] * 9),
        "OUT_OF_RANGE",
        "events: at most 2",
    ),
    "a large message": (
        pb.ScoreRequest(user_id=USER, candidates=pb.Ids(texts=["a" * 3000])),
        "OUT_OF_RANGE",
        "body: at most 2000",
    ),
    "half a column": (
        pb.ScoreRequest(user_id=USER, candidates=ITEMS, features=[pb.Column(name="price", values=[pb.Value()])]),
        "INVALID_ARGUMENT",
        "features: expected a value for each candidate",
    ),
    "an event without a time": (
        pb.ScoreRequest(user_id=USER, candidates=ITEMS, events=[pb.Event(item_id=pb.Id(text="item2"))]),
        "INVALID_ARGUMENT",
        "events",
    ),
    "a negative time": (
        pb.ScoreRequest(user_id=USER, candidates=ITEMS, request_ts=-1),
        "INVALID_ARGUMENT",
        "request_ts: expected",
    ),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_a_code_and_their_reason(service: tuple[ScoringStub, str, str], name: str) -> None:
    request, code, reason = MISTAKES[name]
    with pytest.raises(grpc.RpcError) as refused:
        service[0].Score(request, metadata=METADATA, timeout=30)
    assert (refused.value.code().name, refused.value.details()[: len(reason)]) == (code, reason)


@pytest.mark.ray
def test_token_and_deadline_hold_here_too(service: tuple[ScoringStub, str, str]) -> None:
    stub, _, _ = service
    request = pb.ScoreRequest(user_id=USER, candidates=ITEMS)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(request, metadata=METADATA[:1], timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.RpcError) as late:
        stub.Score(request, metadata=(*METADATA, ("x-timeout-ms", "1")), timeout=30)
    assert (late.value.code(), late.value.details()[:20]) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "not answered in time",
    )
    assert stub.Score(request, metadata=METADATA, timeout=30).user_state.num_events in (25, 26)


@pytest.mark.ray
def test_the_model_is_told_as_over_http_and_several_requests_have_their_bounds(
    service: tuple[ScoringStub, str, str],
) -> None:
    stub, url, _ = service
    told = json_format.MessageToDict(stub.Model(pb.ModelRequest(), metadata=METADATA), preserving_proto_field_name=True)
    expected = httpx.get(f"{url}/v1/model", headers={"authorization": f"Bearer {TOKEN}"}, timeout=30).json()
    assert not expected.pop("refused_rollout")  # nor is it in `told`, as false
    assert not expected.pop("request_features")
    assert told == {**expected, "history_events": str(expected["history_events"])}
    for requests, code in (
        ([], "INVALID_ARGUMENT"),
        ([pb.ScoreRequest(user_id=USER, candidates=ITEMS)] * 4, "OUT_OF_RANGE"),
    ):
        with pytest.raises(grpc.RpcError, match="requests: ") as refused:
            stub.ScoreBatch(pb.ScoreBatchRequest(requests=requests), metadata=METADATA, timeout=30)
        assert refused.value.code().name == code


@pytest.mark.ray
def test_a_body_is_refused_for_its_size_before_it_is_decoded_and_one_that_is_no_message_is_told(
    service: tuple[ScoringStub, str, str],
) -> None:
    with grpc.insecure_channel(service[2]) as channel:
        score = channel.unary_unary("/longer.scoring.v1.Scoring/Score")  # of bytes, whatever they are
        for body, code, reason in (
            (b"\xff" * 2001, "OUT_OF_RANGE", "body: at most 2000 bytes"),
            (b"\xff" * 2000, "INVALID_ARGUMENT", "body: not a ScoreRequest"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                score(body, metadata=METADATA, timeout=30)
            assert (refused.value.code().name, refused.value.details()[: len(reason)]) == (code, reason)


@pytest.mark.ray
def test_the_client_is_answered_what_the_http_client_is(service: tuple[ScoringStub, str, str]) -> None:
    _, url, address = service
    by_grpc = GrpcScoringClient(address, TOKEN, timeout_s=30)
    by_http = ScoringClient(url, TOKEN, timeout_s=30)
    event = {"item_id": "item2", "event_ts": END_MS, "action": "buy", "features": {"quantity": 1}}
    candidates = ["item1", {"id": "item5", "features": {"price": 2.5}}]
    for client in (by_grpc, by_http):
        client.forget(5)
        told = client.add_events(5, [event])
        assert (told["received"], told["new"]) == (1, 1)
    for about in ({"request_ts": END_MS + 1, "events": [event]}, {"request_ts": END_MS, "top_k": 1}):
        answer, expected = (client.score(5, candidates, **about) for client in (by_grpc, by_http))
        np.testing.assert_allclose(answer["scores"].pop("label"), expected["scores"].pop("label"), atol=1e-5)
        sources = [one["user_state"].pop("source") for one in (answer, expected)]
        assert answer == expected
        assert sources[1] in ("hit", "load")
    several = [{"user_id": user, "candidates": ["item1"], "request_ts": END_MS} for user in (6, "six", 7)]
    for one, expected in zip(by_grpc.score_batch(several), by_http.score_batch(several), strict=True):
        np.testing.assert_allclose(
            one.pop("scores", {}).get("label", []), expected.pop("scores", {}).get("label", []), atol=1e-5
        )
        sources = [told["user_state"].pop("source") for told in (one, expected) if "user_state" in told]
        assert one == expected
        assert len(sources) == 2 or one["status"] == 422
    unknown = by_grpc.score(10**9, ["item1"])
    assert unknown["user_state"] == {"source": "cold", "num_events": 0, "last_event_ts": None}
    assert by_grpc.forget(5)["held"] == 1
    with pytest.raises(UserError, match=r"candidates: expected string values \(INVALID_ARGUMENT\)"):
        by_grpc.score(5, [1])
    with pytest.raises(UserError, match="UNAUTHENTICATED"):
        GrpcScoringClient(address).score(5, ["item1"])
    stats = httpx.get(f"{url}/v1/stats", headers={"authorization": f"Bearer {TOKEN}"}, timeout=30).json()
    assert stats["lost_affinity"]["no_session"] == 0


class FullAtFirst(ScoringServicer):
    """Unavailable twice, then an answer that repeats the metadata."""

    def __init__(self) -> None:
        self.num_calls = 0

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self.num_calls += 1
        if self.num_calls < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "full")
        told = dict(context.invocation_metadata())
        return pb.ScoreResponse(model_version=f"{told['session_id']} {told['x-timeout-ms']} {told['application']}")

    def ScoreBatch(self, request: pb.ScoreBatchRequest, context: grpc.ServicerContext) -> pb.ScoreBatchResponse:
        """The users below the number of calls."""
        self.num_calls += 1
        users = [one.user_id.number for one in request.requests]
        refused = pb.ScoreResult(refusal=pb.Refusal(error=f"{users}", status=503))
        answered = [pb.ScoreResult(response=pb.ScoreResponse(model_version=f"{users} {user}")) for user in users]
        return pb.ScoreBatchResponse(
            results=[refused if user >= self.num_calls else one for user, one in zip(users, answered, strict=True)]
        )


def test_a_full_service_is_asked_again_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("longer.patience.time.sleep", pauses.append)
    with ThreadPoolExecutor(1) as pool:
        server, servicer = grpc.server(pool), FullAtFirst()
        add_ScoringServicer_to_server(servicer, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        client = GrpcScoringClient(address, timeout_s=5)
        session, left_ms, application = client.score("Zoë/1", [1])["model_version"].split()
        assert (session, application) == ("Zo%C3%AB%2F1", "scoring")
        assert 0 < int(left_ms) < 5000
        assert len(pauses) == 2
        assert 0.5 <= pauses[0] <= 0.75 < 1 <= pauses[1] <= 1.5
        servicer.num_calls = 0
        with pytest.raises(grpc.RpcError, match="full"):
            GrpcScoringClient(address, timeout_s=5, max_retries=1).score(1, [1])
        servicer.num_calls = 0
        told = client.score_batch([{"user_id": user, "candidates": [1]} for user in (0, 9, 2, 1)])
        assert [one.get("model_version") for one in told] == ["[0, 9, 2, 1] 0", None, "[9, 2] 2", "[9, 2, 1] 1"]
        assert (told[1]["error"], told[1]["status"]) == ("[9, 2]", 503)
        server.stop(None)
    with pytest.raises(grpc.RpcError):
        GrpcScoringClient("127.0.0.1:9", max_retries=0).score(1, [1])
