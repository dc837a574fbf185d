"""The error tree, and the one JSON shape of the wire.

HeadwaterError
|- InvalidRequest           400  invalid_value
|  |- UnsupportedParameter  400  unsupported_parameter
|  |  `- NoThreads          400  unsupported_parameter  (with Anthropic's details)
|  |- ContextLengthExceeded 400  context_length_exceeded
|  |- NotFound              404  not_found
|  |  `- StreamExpired      404  stream_expired
|  |- MethodNotAllowed      405  invalid_value
|  |- RequestTimeout        408  invalid_value
|  |- Conflict              409  invalid_value
|  |  |- SessionBusy         409  session_busy  (with x-should-retry: false)
|  |  `- IdempotencyConflict 409  idempotency_conflict
|  |- RequestTooLarge       413  request_too_large
|  |  `- HeadersTooLarge    431  request_too_large
|  `- UnsupportedMediaType  415  unsupported_media_type
|- AuthenticationError      401  invalid_api_key  (with WWW-Authenticate)
|- PermissionDenied         403  forbidden
|- RateLimited              429  rate_limited  (with Retry-After)
|- Overloaded               503  (with Retry-After)
|  |- QueueFull             503  queue_full
|  |- EngineStarting        503  engine_starting
|  |- EngineRestarting      503  engine_restarting
|  `- ServerDraining        503  server_draining  (with Connection: close)
`- ServerError              500  internal
   `- EngineCrash           500  engine_crash

{"error": {"message": ..., "type": ..., "code": ..., "param": ...}}
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from model.engine.messages import RequestError


class HeadwaterError(Exception):
    """What a client is told: `message` says what is wrong, what was expected, what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal"
    details: ClassVar[dict[str, Any] | None] = None  # what Anthropic's SDK goes by

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, also of an error frame in a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
            }
        }

    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class InvalidRequest(HeadwaterError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    default_code = "unsupported_parameter"


class NoThreads(UnsupportedParameter):
    """Anthropic's message threads, which send only what is new. Its SDK reads `details`, and where
    it may, it sends the whole conversation from then on."""

    details: ClassVar[dict[str, Any] | None] = {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }

    def __init__(self) -> None:
        super().__init__(
            "`thread` is not supported: no conversation is kept on this route; send all of its "
            'messages, without `thread` (the SDK does so with `unsupported_request_behavior="'
            'continue_unthreaded"`), or use the sessions of this server',
            param="thread",
        )


class ContextLengthExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class NotFound(InvalidRequest):
    status = 404
    default_code = "not_found"


class StreamExpired(NotFound):
    default_code = "stream_expired"


class Conflict(InvalidRequest):
    status = 409


class SessionBusy(Conflict):
    """The official clients send a 409 again by themselves, and would be answered twice."""

    default_code = "session_busy"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class IdempotencyConflict(Conflict):
    default_code = "idempotency_conflict"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class MethodNotAllowed(InvalidRequest):
    status = 405


class RequestTimeout(InvalidRequest):
    status = 408


class RequestTooLarge(InvalidRequest):
    status = 413
    default_code = "request_too_large"


class HeadersTooLarge(RequestTooLarge):
    status = 431


class UnsupportedMediaType(InvalidRequest):
    status = 415
    default_code = "unsupported_media_type"


class AuthenticationError(HeadwaterError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class PermissionDenied(HeadwaterError):
    """Never for what belongs to somebody else: that is NotFound."""

    status = 403
    type = "permission_error"
    default_code = "forbidden"


class RateLimited(HeadwaterError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limited"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class Overloaded(HeadwaterError):
    status = 503
    type = "overloaded_error"
    default_code = "queue_full"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class QueueFull(Overloaded):
    default_code = "queue_full"


class EngineStarting(Overloaded):
    default_code = "engine_starting"


class EngineRestarting(Overloaded):
    default_code = "engine_restarting"


class ServerDraining(Overloaded):
    """With its connection, so that a balancer sends the next request elsewhere."""

    default_code = "server_draining"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Connection": "close"}


class ServerError(HeadwaterError):
    pass


class EngineCrash(ServerError):
    default_code = "engine_crash"


def from_engine(error: RequestError) -> HeadwaterError:
    """The engine's word on one request, as an exception of this tree."""
    if error.code == "context_length_exceeded":
        return ContextLengthExceeded(error.message)
    if error.type == "invalid_request_error":
        return InvalidRequest(error.message, code=error.code)
    return ServerError(error.message, code=error.code)
