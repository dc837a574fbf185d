"""JSON answers: one encoder, one shape of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from server.errors import HeadwaterError, InvalidRequest

_encoder = msgspec.json.Encoder()


def json_response(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`document` as JSON."""
    return Response(
        _encoder.encode(document), status, headers=headers, media_type="application/json"
    )


def error_response(error: HeadwaterError) -> Response:
    """The wire's error shape, with Retry-After where it helps."""
    return json_response(error.body(), error.status, error.headers())


def validation_error(error: RequestValidationError) -> InvalidRequest:
    """pydantic's word on a body or a query, naming the field."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where)
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")).strip()
        return InvalidRequest(f"the body is not valid JSON{': ' + reason if reason else ''}")
    message = first["msg"].removeprefix("Value error, ")
    if not param:
        return InvalidRequest(f"the body must be a JSON object: {message}")
    return InvalidRequest(f"`{param}`: {message}", param=param)
