"""A client of the scoring service that sends each user's requests to the replica that holds the user's state.

    client = ScoringClient("http://127.0.0.1:8321", token=os.environ.get("LONGER_SCORING_TOKEN"))
    client.score(900, [1095275, 42], top_k=1)["scores"]

Needs `requests`, which Ray brings along.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import requests
from pydantic_core import to_json
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import ReadTimeoutError

from longer.errors import UserError

_ARROW = "application/vnd.apache.arrow.stream"


class _Retry(Retry):
    """But for a call that was not answered in time: the service may be at it still, and would only have more to do."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        *others: Any,
        **more: Any,
    ) -> "_Retry":
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, *others, **more)


class ScoringClient:
    """Every call is safe to repeat, so one that finds no connection, a full service (503) or a replica that dies with it (500) is,
    after the pause that the service asks for. `timeout_s` is for one attempt, and the service is told it; a thread should have a
    client of its own.

    A call that is refused raises a UserError with the service's reason; one that is not answered, a `requests` exception.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 1.0, max_retries: int = 2) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        retry = _Retry(
            max_retries,
            status_forcelist=[500, 503],
            allowed_methods=None,
            backoff_factor=0.1,
            backoff_jitter=0.1,
            raise_on_status=False,
        )
        self._session = requests.Session()
        self._session.mount(self._url, HTTPAdapter(max_retries=retry))
        self._session.headers["x-timeout-ms"] = str(max(int(timeout_s * 1000), 1))
        if token:
            self._session.headers["authorization"] = f"Bearer {token}"

    def score(self, user_id: int | str, candidates: Sequence[Any], **more: Any) -> dict[str, Any]:
        """The answer of POST /v1/score: candidates are ids, or objects with `id` and `features`; `more` are its other fields."""
        return self._post("score", {"user_id": user_id, "candidates": candidates, **more}, user_id)

    def score_table(self, user_id: int | str, candidates: pa.Table, **more: Any) -> pa.Table:
        """The same for a table with a column `id` and one a feature; gives `id`, one column a task, and the rest as metadata."""
        about = to_json({"user_id": user_id, **more})
        sink = pa.BufferOutputStream()
        plain = candidates.replace_schema_metadata({"request": about})
        with pa.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        content = self._send("POST", "score", sink.getvalue().to_pybytes(), user_id, _ARROW)
        return pa.ipc.open_stream(content).read_all()

    def score_batch(self, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result a request, in order: scores, or `error` and `status`."""
        return self._post("score:batch", {"requests": asked}, None)["results"]

    def add_events(self, user_id: int | str, events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """How many events were received, and how many of them were new."""
        return self._post("events", {"user_id": user_id, "events": events}, user_id)

    def forget(self, user_id: int | str) -> dict[str, int]:
        """Makes every replica drop what it holds of the user."""
        return json.loads(self._send("DELETE", f"users/{quote(str(user_id), safe='')}", b"", user_id))

    def _post(self, path: str, body: dict[str, Any], user_id: int | str | None) -> dict[str, Any]:
        return json.loads(self._send("POST", path, to_json(body), user_id))

    def _send(
        self, method: str, path: str, body: bytes, user_id: int | str | None, content_type: str = "application/json"
    ) -> bytes:
        headers = {"content-type": content_type}
        if user_id is not None:
            headers["x-session-id"] = quote(str(user_id), safe="")
        answer = self._session.request(
            method, f"{self._url}/v1/{path}", data=body, headers=headers, timeout=self._timeout_s
        )
        if answer.headers.get("content-type", "").startswith("application/json") and answer.status_code >= 400:
            raise UserError(f"{self._url}: {answer.json()['error']} ({answer.status_code})")
        answer.raise_for_status()
        return answer.content
