"""GET /v1/models and GET /v1/models/{id}: the one model that is served."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.errors import NotFound
from server.responses import json_response
from server.services import Services, Shared

router = APIRouter()


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models", operation_id="list_models")
async def list_models(services: Shared) -> Response:
    """The served model, in a list for the SDKs of OpenAI and of Anthropic."""
    name = services.files.name
    return json_response(
        {
            "object": "list",
            "data": [_card(services)],
            "first_id": name,
            "last_id": name,
            "has_more": False,
        }
    )


@router.get("/v1/models/{model_id:path}", operation_id="get_model")
async def get_model(model_id: str, services: Shared) -> Response:
    """The served model, by its id."""
    if model_id != services.files.name:
        raise NotFound(f"no model {model_id!r} here; this server serves {services.files.name!r}")
    return json_response(_card(services))


def _card(services: Services) -> dict[str, Any]:
    created = int(services.metrics.started)
    card: dict[str, Any] = {
        "id": services.files.name,
        "object": "model",
        "created": created,
        "owned_by": "headwater",
        # The same in Anthropic's words.
        "type": "model",
        "display_name": services.files.name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "lifecycle": "active",
        "sampling_defaults": services.sampling_defaults,
    }
    model = services.client.model
    if model is not None:
        card |= {
            "max_model_len": model.max_model_len,
            "context_length": model.max_model_len,
            "num_parameters": model.num_parameters,
            "quantization": model.quantization,
            "device": model.device,
            "dtype": model.dtype,
            "ops": model.ops,
            "reproducible": model.reproducible,
            "fingerprint": model.fingerprint,
        }
    return card
