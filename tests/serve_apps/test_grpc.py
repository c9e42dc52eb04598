"""The service over gRPC through Serve's own proxy: what HTTP answers, with its limits, its token and its reasons."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from ray import serve
from ray.serve.config import gRPCOptions

from jobs.serve import free_port
from serve_apps.grpc import scoring_pb2 as pb
from serve_apps.grpc.scoring_pb2_grpc import ScoringStub
from serve_apps.scoring import ScoringArgs, build_app
from tests.serve_apps.services import END_MS
from tests.serving.tables import build_world

ROOT = Path(__file__).parents[2]
TOKEN = "open-sesame"
METADATA = (("application", "scoring"), ("authorization", f"Bearer {TOKEN}"), ("session_id", "5"))
USER = pb.Id(number=5)
ITEMS = pb.Ids(texts=["item1", "item5"])
EVENT = pb.Event(item_id=pb.Id(text="item2"), event_ts=END_MS, action="buy", features={"quantity": pb.Value(number=1)})


def test_the_generated_code_is_what_the_proto_file_makes(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, "serve_apps/grpc/scoring.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("scoring_pb2.py", "scoring_pb2.pyi", "scoring_pb2_grpc.py"):
        assert (tmp_path / "serve_apps" / "grpc" / name).read_text() == (ROOT / "serve_apps/grpc" / name).read_text()


@pytest.fixture(scope="module")
def service(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScoringStub, str]]:
    """A stub, and the URL of the same service over HTTP."""
    world = build_world(tmp_path_factory.mktemp("grpc"))
    token = Path(world.path("token"))
    token.write_text(TOKEN)
    limits = {"max_candidates": 3, "max_events": 2, "max_body_bytes": 2000}
    args = ScoringArgs(checkpoint=world.path("checkpoints"), token_file=str(token), num_cpus=0.5, **limits)
    port, rpc_port = free_port("127.0.0.1", 8399), free_port("127.0.0.1", 8398)
    servicer = "serve_apps.grpc.proxy.add_scoring"
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": port},
            grpc_options=gRPCOptions(port=rpc_port, grpc_servicer_functions=[servicer]),
        )
        serve.run(build_app(args), name="scoring", route_prefix="/")
        with grpc.insecure_channel(f"127.0.0.1:{rpc_port}") as channel:
            yield ScoringStub(channel), f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@pytest.mark.ray
def test_calls_are_answered_as_over_http(service: tuple[ScoringStub, str]) -> None:
    stub, url = service
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
    "a negative time": (
        pb.ScoreRequest(user_id=USER, candidates=ITEMS, request_ts=-1),
        "INVALID_ARGUMENT",
        "request_ts: expected",
    ),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_a_code_and_their_reason(service: tuple[ScoringStub, str], name: str) -> None:
    request, code, reason = MISTAKES[name]
    with pytest.raises(grpc.RpcError) as refused:
        service[0].Score(request, metadata=METADATA, timeout=30)
    assert (refused.value.code().name, refused.value.details()[: len(reason)]) == (code, reason)


@pytest.mark.ray
def test_token_and_deadline_hold_here_too(service: tuple[ScoringStub, str]) -> None:
    stub, _ = service
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
