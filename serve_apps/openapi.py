"""Pieces of the service's OpenAPI document: bodies are read by hand, so what they are is said by hand."""

from typing import Any

from pydantic import BaseModel

from serve_apps.bodies import ErrorAnswer

_ERRORS = {
    400: "The body is not what its content type says, or ended early.",
    401: "The service asks for a bearer token.",
    408: "The body did not come in time.",
    413: "More candidates, events, users or bytes than one call may bring.",
    415: "The body is of another content type than the ones here.",
    422: "A field is missing or wrong.",
    503: "Too many requests are waiting, or the tables cannot be read: try again after `Retry-After` seconds.",
    504: "Not answered in time.",
}


_BINARY = {"schema": {"type": "string", "format": "binary"}}


_HEADERS = {
    "x-session-id": (
        "The user's id: requests of one session reach the replica that holds its state.",
        {"type": "string"},
    ),
    "x-timeout-ms": (
        "How long an answer is worth waiting for, in milliseconds.",
        {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    ),
}


def about_call(*headers: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a call may or must bring: these headers, a token if the service asks for one, and a body."""
    parameters = [
        {"name": name, "in": "header", "required": False, "description": _HEADERS[name][0], "schema": _HEADERS[name][1]}
        for name in headers
    ]
    return {"parameters": parameters, "security": [{}, {"bearer": []}], **(body or {})}


def with_security(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the scheme that its calls refer to."""
    document.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document


def errors(*more: int) -> dict[int | str, dict[str, Any]]:
    """The errors that every call may be answered with, and `more`."""
    return {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in (400, 401, 422, 504, *more)}


def responds(model: type[BaseModel], *binary: str) -> dict[int | str, dict[str, Any]]:
    """The answer of a call that went well, in JSON or in these content types."""
    return {200: {"model": model, "content": dict.fromkeys(binary, _BINARY)}}


def body_of(model: type[BaseModel], *binary: str) -> dict[str, Any]:
    """A required body, in JSON with its parts written out where they are used, or in these content types."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, parts)}, **dict.fromkeys(binary, _BINARY)}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}
