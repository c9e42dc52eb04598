"""A client of the scoring service that sends each user's requests to the replica that holds the user's state.

    client = ScoringClient("http://127.0.0.1:8321", token=os.environ.get("LONGER_SCORING_TOKEN"))
    client.score(900, [1095275, 42], top_k=1)["scores"]

Needs `requests`, which Ray brings along.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import requests
import urllib3
from pydantic_core import to_json
from requests.adapters import HTTPAdapter

from longer.errors import UserError
from longer.patience import Patience, as_ms, each_answered
from longer.replica_urls import ReplicaUrls
from longer.ring import session_of

_ARROW = "application/vnd.apache.arrow.stream"
_REPEATED = (500, 503)
_PAUSE_S = 0.1
_PART_BYTES = 1 << 16
_CONNECT_WITHIN_S = 0.25
"""How long a replica is waited for before the call goes through the proxy instead."""
_REPLICAS_WITHIN_S = 1.0
_MOST_REPLICAS = 1_000
"""To which connections stay open; by default ten, past which each call would open its own."""
_NOT_FOUND, _FULL = 404, 503


class ScoringClient:
    """A user's calls go straight to the replica that holds the state, and those of several users to any, where the service has such
    addresses (`direct_host`) and they can be reached, else, and if not `direct`, through Serve's proxy at `url`.

    Every call is safe to repeat, so one that finds no connection, a full service (503) or a replica that dies with it (500) is,
    after a pause that grows, no shorter than the service asks for; so are those of a batch's requests that are answered 503.
    `timeout_s` is for all of it, and the service is told what is left; a thread should have a client of its own. Proxies and
    ~/.netrc are not looked at.

    A call that is refused raises a UserError with the service's reason; one that is not answered, a `requests` exception. One that
    is not answered in time is not repeated: the service may be at it still, and would only have more to do.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 2.0,
        max_retries: int = 2,
        direct: bool = True,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: a URL begins with http:// or https://, as http://127.0.0.1:8321 does")
        self._url, self._timeout_s, self._max_retries = url.rstrip("/"), timeout_s, max_retries
        self._session = requests.Session()
        self._session.trust_env = False  # ~/.netrc would replace the token
        self._session.mount("http://", HTTPAdapter(pool_connections=_MOST_REPLICAS))
        self.num_direct = 0  # calls that replicas answered themselves
        self._replicas = ReplicaUrls(self._url, self._ask_replicas) if direct else None
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
        content = self._send("POST", "score", sink.getvalue().to_pybytes(), user_id, self._patience(), _ARROW)
        return pa.ipc.open_stream(content).read_all()

    def score_batch(self, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result a request, in order: scores, or `error` and `status`."""

        def ask(some: Sequence[Mapping[str, Any]], patience: Patience) -> list[dict[str, Any]]:
            return json.loads(self._send("POST", "score:batch", to_json({"requests": some}), None, patience))["results"]

        return each_answered(ask, asked, self._patience(), requests.RequestException)

    def add_events(self, user_id: int | str, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many events were received, how many of them were new, and to which replica."""
        return self._post("events", {"user_id": user_id, "events": events}, user_id)

    def forget(self, user_id: int | str) -> dict[str, int]:
        """Makes every replica drop what it holds of the user."""
        return json.loads(self._send("DELETE", f"users/{_in_path(user_id)}", b"", user_id, self._patience()))

    def _patience(self) -> Patience:
        return Patience(self._timeout_s, self._max_retries)

    def _post(self, path: str, body: dict[str, Any], user_id: int | str) -> dict[str, Any]:
        return json.loads(self._send("POST", path, to_json(body), user_id, self._patience()))

    def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        user_id: int | str | None,
        patience: Patience,
        content_type: str = "application/json",
    ) -> bytes:
        headers = {"content-type": content_type}
        if user_id is not None:
            headers["x-session-id"] = session_of(user_id)
        if self._replicas:
            told = self._straight(self._replicas, method, path, body, headers, patience)
            if told is not None:
                return told
        while True:
            try:
                answer, content = self._attempt(method, path, body, headers, patience)
                if answer.status_code not in _REPEATED or not patience.pauses(_least_pause_s(answer)):
                    break
            except requests.Timeout:
                raise
            except requests.ConnectionError:
                if not patience.pauses(_PAUSE_S):
                    raise
        return self._content(answer, content)

    def _straight(
        self,
        replicas: ReplicaUrls,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        patience: Patience,
    ) -> bytes | None:
        """What the user's own replica answers, or any for several users; None if it has no room or is not to be reached, for the
        proxy to do so, or if it is to be asked again, once that may be."""
        found = replicas.of(headers.get("x-session-id"))
        if found is None:
            return None
        try:
            answer, content = self._attempt(method, path, body, headers, patience, found.url)
        except requests.RequestException as error:
            replicas.avoid(found.url)
            if isinstance(error, requests.ReadTimeout):
                raise
            return None
        if answer.headers.get("x-replica") != found.replica:  # another one that has got the port, or one without room
            if answer.status_code == _FULL:
                replicas.spare(found.url, _least_pause_s(answer))
            else:
                replicas.avoid(found.url)
            return None
        if answer.status_code in _REPEATED and patience.pauses(_least_pause_s(answer)):
            return None
        self.num_direct += 1
        return self._content(answer, content)

    def _ask_replicas(self) -> dict[str, str | None] | None:
        try:
            answer = self._session.get(f"{self._url}/v1/replicas", timeout=min(self._timeout_s / 2, _REPLICAS_WITHIN_S))
            if answer.status_code == _NOT_FOUND:  # a service that does not tell
                return {}
            return answer.json()["urls"] if answer.status_code == 200 else None
        except requests.RequestException:
            return None

    def _content(self, answer: requests.Response, content: bytes) -> bytes:
        is_refused = answer.status_code >= 400 and answer.status_code != requests.codes.internal_server_error
        if is_refused and (reason := _reason(answer, content)):
            raise UserError(f"{self._url}: {reason} ({answer.status_code})")
        answer.raise_for_status()
        return content

    def _attempt(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        patience: Patience,
        replica_url: str | None = None,
    ) -> tuple[requests.Response, bytes]:
        """The answer and its content, of the replica there or through the proxy; `requests.ReadTimeout` when the time is over,
        however much of it has come."""
        left_s = patience.left_s()
        times = {
            "x-timeout-ms": as_ms(left_s),
            "x-request-timeout-seconds": f"{left_s:.3f}",
        }  # the replica's, and the proxy's
        url = f"{replica_url or self._url}/v1/{path}"
        content = bytearray()
        asked = self._session.prepare_request(requests.Request(method, url, {**headers, **times}, data=body))
        asked.url = url  # as it is: `requests` would take the user `..` for the folder above
        in_time = urllib3.Timeout(total=left_s, connect=_CONNECT_WITHIN_S if replica_url else None)
        with self._session.send(asked, timeout=in_time, stream=True) as answer:
            try:
                while part := answer.raw.read1(_PART_BYTES, decode_content=True):
                    content += part
                    if patience.is_over:
                        raise requests.ReadTimeout(f"{url}: not all of the answer came in time")
                    if answer.raw.connection and answer.raw.connection.sock:
                        answer.raw.connection.sock.settimeout(patience.left_s())
            except urllib3.exceptions.ReadTimeoutError as error:
                raise requests.ReadTimeout(error) from None
            except urllib3.exceptions.HTTPError as error:
                raise requests.ConnectionError(error) from None
        return answer, bytes(content)


def _in_path(user_id: int | str) -> str:
    """Percent-encoded, dots too: proxies would follow those of the users `.` and `..`."""
    return quote(str(user_id), safe="").replace(".", "%2E")


def _reason(answer: requests.Response, content: bytes) -> Any:
    """The service's; none where another server, or this one at another path, says something else."""
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return None
    try:
        said = json.loads(content)
    except ValueError:
        return None
    return said.get("error") if isinstance(said, dict) else None


def _least_pause_s(answer: requests.Response) -> float:
    asked = answer.headers.get("retry-after", "")
    return int(asked) if asked.isdigit() else _PAUSE_S
