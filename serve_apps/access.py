"""Who may ask, for how long and how much; and what a caller is told when something is wrong."""

import asyncio
import hashlib
import hmac
import logging

from fastapi import Request
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import ClientDisconnect

from longer.errors import StorageError, UserError
from serve_apps.protocol import BodyError

SESSION_HEADER, TIMEOUT_HEADER = "x-session-id", "x-timeout-ms"
_BODY_WITHIN_S = 2.0
_logger = logging.getLogger("ray.serve")


class AnyText(PathConvertor):
    """What is left of a path, line breaks too: a user id may be any text."""

    regex = "(?s:.*)"


register_url_convertor("any_text", AnyText())


class Gate:
    """The token, the longest time and the largest body of a service."""

    def __init__(self, token: str | None, timeout_s: float, max_body_bytes: int) -> None:
        self._token_digest = hashlib.sha256(token.encode()).digest() if token else None
        self._timeout_s, self._max_body_bytes = timeout_s, max_body_bytes

    def check_token(self, authorization: str | None) -> None:
        """BodyError 401 without the token. Digests are compared, in constant time, so that neither content nor length shows."""
        if self._token_digest is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if not hmac.compare_digest(digest, self._token_digest) or scheme.lower() != "bearer":
            raise BodyError(401, "authorization: send this service's token as `Authorization: Bearer TOKEN`")

    def time_left_s(self, given: str | None) -> float:
        """The time that the caller gives, in milliseconds as sent, or the longest allowed."""
        if given is None:
            return self._timeout_s
        if not (given.isascii() and given.isdigit() and len(given) < 10 and int(given)):
            raise BodyError(422, f"{TIMEOUT_HEADER}: expected a positive integer, in milliseconds")
        return min(int(given) / 1000, self._timeout_s)

    def check_size(self, num_bytes: int) -> None:
        """BodyError 413 for a body of more bytes than are allowed."""
        if num_bytes > self._max_body_bytes:
            raise BodyError(413, f"body: at most {self._max_body_bytes} bytes: send fewer candidates in a request")

    async def body(self, request: Request) -> bytes:
        """The whole body; BodyError if it is said to be too large, as soon as it is, or when its sender has gone or is too slow: a
        call has one of the replica's places from its head on."""
        stated = request.headers.get("content-length", "")
        self.check_size(int(stated[:18]) if stated.isascii() and stated.isdigit() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_WITHIN_S):
                async for chunk in request.stream():
                    body += chunk
                    self.check_size(len(body))
        except ClientDisconnect:
            raise BodyError(400, "body: the connection closed before its end") from None
        except TimeoutError:
            raise BodyError(408, f"body: not all of it came within {_BODY_WITHIN_S:g} s") from None
        return bytes(body)


def content_type_of(request: Request, *known: str) -> str:
    """The body's content type, the first of `known` if none is stated; a BodyError if it is none of them."""
    stated = request.headers.get("content-type", known[0]).partition(";")[0].strip().lower()
    if stated not in known:
        raise BodyError(415, f"content-type: expected {' or '.join(known)}")
    return stated


def id_of(text: str, user_id_type: str) -> int | str:
    """A user id in a path."""
    is_number = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 21
    return checked_id(int(text) if user_id_type != "string" and is_number else text, user_id_type)


def checked_id(user_id: int | str | None, user_id_type: str) -> int | str:
    """The user id, if it is one of this type and not empty."""
    if user_id is None or user_id == "" or isinstance(user_id, str) != (user_id_type == "string"):
        raise BodyError(422, f"user_id: expected {user_id_type}")
    return user_id


def status_of(error: UserError) -> int:
    """The HTTP status that goes with an error."""
    if isinstance(error, StorageError):
        return 503
    return error.status if isinstance(error, BodyError) else 422


def reason_of(error: UserError) -> str:
    """What the caller is told. A table's path is for the log, not for callers."""
    if isinstance(error, StorageError):
        _logger.error("%s", error)
        return "the sequence table cannot be read at the moment: try again later"
    return str(error)
