"""What the service is compared with: a Serve deployment that does nothing, and servers of a process each.

python -m benchmarks.serving_arms.servers plain ARGUMENTS    FastAPI and torch, no cache, as most would write it
python -m benchmarks.serving_arms.servers echo ARGUMENTS     one answer for all, to see what the load generator can do
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.serving_arms.load import BODY_MS_HEADER
from serve_apps.affinity import ROUTER
from serve_apps.direct import DirectServer
from serve_apps.scoring import IN_ONE_LOOP

floor_api = FastAPI()
_MOST_ONGOING = 1000


@serve.deployment
@serve.ingress(floor_api)
class Floor:
    """Reads a body of the real size, says how long that took, and answers with one: what Serve, HTTP and FastAPI alone cost.

    At an address of its own too, as the service has it.
    """

    app: ASGIApp  # which Serve makes of `floor_api`

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._direct = DirectServer("127.0.0.1", None, _MOST_ONGOING, 1, lambda: None)
        self._direct.serve(self._straight, ends_within_s=1)

    async def _straight(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    async def own_url(self) -> tuple[str, str]:
        """As the service's replicas tell it each other."""
        return serve.get_replica_context().replica_id.unique_id, self._direct.url

    @floor_api.post("/v1/score")
    async def score(self, request: Request) -> Response:
        started_s = time.perf_counter()
        await request.body()
        headers = {BODY_MS_HEADER: f"{(time.perf_counter() - started_s) * 1000:.3f}"}
        return Response(self._answer, media_type="application/json", headers=headers)


def floor_app(answer: bytes, num_replicas: int, max_ongoing_requests: int) -> serve.Application:
    """With the service's router, limits and event loop."""
    return Floor.options(
        name="floor",
        num_replicas=num_replicas,
        max_ongoing_requests=max_ongoing_requests,
        request_router_config=ROUTER,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": IN_ONE_LOOP},
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(answer)


@dataclass(frozen=True)
class ServerArgs:
    """What a server's process is told."""

    port: int
    checkpoint: str = ""
    sequences: str = ""
    items: str = ""
    device: str = "cpu"
    torch_threads: int = 1
    answer: str = ""

    def command(self, kind: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.serving_arms.servers", kind, json.dumps(asdict(self))]


def plain_app(args: ServerArgs) -> FastAPI:
    """All histories in memory from the start, no reads at all; each request is a forward pass over its user's whole window."""
    import torch

    from longer.arrays import Candidates, RequestBatch
    from longer.data.items import ItemTable
    from longer.data.tables import SequenceTable
    from longer.model.inputs import to_tensors
    from longer.model.outputs import to_scores
    from longer.serving.history import HistorySource
    from longer.serving.requests import RequestReader, ScoreRequest
    from longer.training.checkpoints import load_model
    from serve_apps.protocol import ScoreBody

    torch.set_num_threads(args.torch_threads)
    model, info = load_model(args.checkpoint, args.device)
    source, table = HistorySource(args.sequences, info.schema), SequenceTable(args.sequences, info.schema)
    users = pa.concat_arrays([table.read_bucket(bucket)[0] for bucket in table.buckets])
    rows = zip(users.to_pylist(), source.read(users), strict=True)
    histories = {user_id: row.history for user_id, row in rows}
    items, reader = ItemTable(args.items, info.schema), RequestReader(info.schema, "ms")
    api = FastAPI()

    @api.post("/v1/score")
    async def answer(body: ScoreBody) -> dict[str, Any]:
        assert body.request_ts is not None
        history = histories[body.user_id]  # type: ignore[index]
        end = history.end_before(body.request_ts)
        window = history.window(end, model.windows)
        request = ScoreRequest(body.user_id, body.candidates)  # type: ignore[arg-type]
        [features] = reader.candidates([request], items)
        assert isinstance(features, dict)
        asked = Candidates(np.array([0, len(body.candidates)]), features)
        row, ends = np.zeros(1, np.int64), np.array([end])
        batch = RequestBatch(window, row, ends, np.array([body.request_ts]), asked, row)
        with torch.inference_mode():
            outputs = model(to_tensors(batch, args.device)).float().cpu().numpy()
        scores = {task: values.tolist() for task, values in to_scores(outputs, model.tasks).items()}
        return {"candidates": body.candidates, "scores": scores, "model_version": info.model_version}

    return api


async def echo(args: ServerArgs) -> None:
    """The least that an HTTP server can do in Python."""
    content = args.answer.encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.lower().splitlines() if line[:15] == b"content-length:"
                )
                await reader.readexactly(length)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", args.port, limit=1 << 20)
    async with server:
        await server.serve_forever()


def main() -> None:
    kind, arguments = sys.argv[1:]
    args = ServerArgs(**json.loads(arguments))
    if kind == "echo":
        asyncio.run(echo(args))
    else:
        import uvicorn

        uvicorn.run(plain_app(args), host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
