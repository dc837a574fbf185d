"""GET /health (alive), /ready (takes requests), /metrics, /version"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

import server
from server.responses import json_response
from server.services import Shared

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", operation_id="health")
async def health() -> Response:
    """200 as long as this process answers."""
    return json_response({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", operation_id="ready")
async def ready(services: Shared) -> Response:
    """200 when the engine takes requests and does them, else 503 with the reason."""
    reason = services.client.unready_reason() or services.client.stuck_reason()
    if reason is None:
        return json_response({"status": "ready", "model": services.files.name})
    state = services.client.state
    status = "unready" if state == "ready" else state
    headers = {"Retry-After": "1"}
    if services.client.draining:
        headers["Connection"] = "close"
    return json_response({"status": status, "reason": reason}, 503, headers)


@router.get("/metrics", operation_id="metrics")
async def metrics(services: Shared) -> Response:
    """Prometheus' text format."""
    return Response(
        services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.head("/version", include_in_schema=False)
@router.get("/version", operation_id="version")
async def version(services: Shared) -> Response:
    """The server's version and the model it serves."""
    return json_response({"version": server.__version__, "model": services.files.name})
