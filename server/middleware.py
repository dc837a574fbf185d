"""Pure ASGI middleware around all gates: request ids, a log line a request, bodies, faults. Nothing
buffers."""

from __future__ import annotations

import secrets
import time

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import HeadwaterError, RequestTooLarge, ServerError, UnsupportedMediaType
from server.metrics import Metrics
from server.responses import error_response, speaks_anthropic

log = structlog.get_logger()

MAX_BODY_BYTES = 8 * 1024 * 1024


def new_request_id() -> str:
    """What an answer has as `x-request-id`."""
    return f"req_{secrets.token_hex(16)}"


class RequestGate:
    """The outermost layer: gives every answer an `x-request-id`, and logs and counts what was
    answered. Bodies and prompts are never logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                # What is somebody's is in no cache of a browser when they have signed out.
                if all(name != b"cache-control" for name, _ in message["headers"]):
                    message["headers"] += [(b"cache-control", b"no-store")]
                if speaks_anthropic(scope["path"]):
                    message["headers"] += [(b"request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            owner = scope["state"].get("owner")
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                ms=round(1000 * (time.monotonic() - started), 1),
                request_id=request_id,
                **({"owner": owner.name} if owner is not None and owner.name else {}),
            )


class BodyGate:
    """Refuses bodies that are too large (413), compressed or not JSON (415), and reads an empty one
    as `{}`. What nobody thought of, in the layers below, is 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        error = _refusal(scope)
        if error is None:
            try:
                await self._app(scope, _body(scope, receive), noting)
                return
            except Exception:
                request_id = scope["state"]["request_id"]
                log.exception("unhandled", path=scope["path"][:200], request_id=request_id)
                if begun:  # too late for another answer: let the connection break
                    raise
            error = ServerError("something went wrong in the server; it is in its log")
        self._metrics.errors.labels(error.code).inc()
        await error_response(error, scope)(scope, receive, send)


def _takes_body(scope: Scope) -> bool:
    return scope["method"] in ("POST", "PUT", "PATCH")


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _refusal(scope: Scope) -> HeadwaterError | None:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        return RequestTooLarge(
            f"the body has {int(length)} bytes; at most {MAX_BODY_BYTES} are taken"
        )
    if not _takes_body(scope) or not _has_body(headers):
        return None
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity"):
        return UnsupportedMediaType(
            f"`Content-Encoding` {encoding.decode('latin-1')[:64]!r} is not taken; send the body "
            "as it is, without that header"
        )
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if media_type == b"application/json":
        return None
    said = media_type.decode("latin-1") or "nothing"
    return UnsupportedMediaType(
        f"the body must be JSON with `Content-Type: application/json`; the request says {said!r}"
    )


def _body(scope: Scope, receive: Receive) -> Receive:
    """`receive`, counted where the length is not known beforehand, and with `{}` for no body."""
    if not _takes_body(scope):
        return receive
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413)
        return message

    async def empty_object() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            message["body"] = b"{}"
        return message

    if _has_body(dict(scope["headers"])):
        return counted
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    scope["headers"] = [*others, (b"content-type", b"application/json")]
    return empty_object
