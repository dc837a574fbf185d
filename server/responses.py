"""JSON answers: one encoder, one shape of errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response
from starlette.types import Scope

from server.errors import HeadwaterError, InvalidRequest

_encoder = msgspec.json.Encoder()

_ANTHROPIC_TYPES = {
    404: "not_found_error",
    413: "request_too_large",
    431: "request_too_large",
    500: "api_error",
}


def json_response(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`document` as JSON."""
    return Response(
        _encoder.encode(document), status, headers=headers, media_type="application/json"
    )


def speaks_anthropic(path: str) -> bool:
    """Whether what is at `path` answers in Anthropic's words."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_error(error: HeadwaterError, request_id: str) -> dict[str, Any]:
    """The error in Anthropic's shape, also for a frame in a stream."""
    type = _ANTHROPIC_TYPES.get(error.status, error.type)
    told: dict[str, Any] = {"type": type, "message": error.message}
    if error.details is not None:
        told["details"] = error.details
    return {"type": "error", "error": told, "request_id": request_id}


def error_response(error: HeadwaterError, scope: Scope) -> Response:
    """The error in the shape that the path's clients expect, with Retry-After where it helps."""
    body = error.body()
    if speaks_anthropic(scope["path"]):
        body = anthropic_error(error, scope["state"]["request_id"])
    return json_response(body, error.status, error.headers())


def _is_choice(part: int | str) -> bool:
    """Whether pydantic means one of several types that a field may have, and no field."""
    name = str(part)
    return name in ("str", "constrained-str") or name.startswith(("list[", "function-", "literal["))


def unreadable_body(cause: BaseException | None) -> InvalidRequest | None:
    """Why no JSON could be read, where it is not the syntax; None for other reasons."""
    match cause:
        case UnicodeDecodeError():
            reason = f"byte {cause.start} is not UTF-8"
        case RecursionError():
            reason = "its arrays and objects are nested too deep"
        case ValueError():
            reason = f"an integer has more than {sys.get_int_max_str_digits()} digits"
        case _:
            return None
    return InvalidRequest(f"the body is not JSON that can be read: {reason}")


def validation_error(error: RequestValidationError) -> InvalidRequest:
    """pydantic's word on a body or a query, naming the field."""
    first = error.errors()[0]
    if any(_is_choice(part) for part in first["loc"]):
        # Of those, one that only has a bound too low, else the one that came furthest.
        first = max(error.errors(), key=lambda one: (one["type"] == "too_long", len(one["loc"])))
    where = [
        str(part)
        for part in first["loc"]
        if part not in ("body", "query", "path") and not _is_choice(part)
    ]
    key = where[-1:] == ["[key]"]
    param = ".".join(where[:-1] if key else where)
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")).strip()
        return InvalidRequest(f"the body is not valid JSON{': ' + reason if reason else ''}")
    message = ("the key: " if key else "") + first["msg"].removeprefix("Value error, ")
    if not param and first["type"] == "value_error":
        return InvalidRequest(f"the body: {message}")
    if not param:
        return InvalidRequest(f"the body must be a JSON object: {message}")
    return InvalidRequest(f"`{param}`: {message}", param=param)
