"""/v1/inspect: how the served model makes text, while it does."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.engine.messages import (
    AttentionInspection,
    CacheInspection,
    ForwardInspection,
    Inspected,
    Inspection,
    LayerView,
    ModelInfo,
    PositionView,
)
from server.api.answers import finite
from server.api.inspect_bodies import AttentionBody, CacheBody, ForwardBody, TextBody
from server.api.inspect_shapes import (
    InspectAttention,
    InspectCache,
    InspectForward,
    InspectModel,
    InspectTokens,
)
from server.api.leaving import unless_left
from server.off_loop import off_loop
from server.owners import Owner
from server.responses import json_response
from server.services import Caller, Services, Shared
from server.text.tokenizer import Tokenizer

router = APIRouter(prefix="/v1/inspect")

Looked = TypeVar("Looked", bound=Inspection, covariant=True)


@router.post("/tokens", operation_id="inspect_tokens", response_model=InspectTokens)
async def inspect_tokens(body: TextBody, services: Shared) -> Response:
    """The tokens of a text, or of messages, with their bytes and their places."""
    model = services.client.check_ready()
    ids = await body.prompt(services)
    tokens = await off_loop(4 * len(ids), lambda: token_list(services.tokenizer, ids))
    return json_response(
        {
            "tokens": tokens,
            "rendered": services.tokenizer.decode(ids, skip_special=False),
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "room": max(model.max_model_len - len(ids), 0),
        }
    )


@router.post("/forward", operation_id="inspect_forward", response_model=InspectForward)
async def inspect_forward(
    body: ForwardBody, request: Request, services: Shared, owner: Caller
) -> Response:
    """What the model says after each token, and on the way through its layers."""
    return await _answer(services, request, owner, body, _forward)


@router.post("/attention", operation_id="inspect_attention", response_model=InspectAttention)
async def inspect_attention(
    body: AttentionBody, request: Request, services: Shared, owner: Caller
) -> Response:
    """How much each token looks at those before it, in one layer."""
    return await _answer(services, request, owner, body, _attention)


@router.post("/kv-cache", operation_id="inspect_kv_cache", response_model=InspectCache)
async def inspect_kv_cache(
    body: CacheBody, request: Request, services: Shared, owner: Caller
) -> Response:
    """The same greedy tokens, drawn with the KV cache and without it, by the clock."""
    return await _answer(services, request, owner, body, _cache)


@router.get("/model", operation_id="inspect_model", response_model=InspectModel)
async def inspect_model(services: Shared) -> Response:
    """The shape of the served model."""
    model = services.client.check_ready()
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return json_response(
        {
            "model": model.name,
            "family": model.family,
            "blocks": model.num_layers,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "hidden": hidden,
            "feed_forward": inner,
            "vocabulary": model.vocab_size,
            "context_length": model.max_model_len,
            "parameters": {"total": model.num_parameters, **model.parameters},
            "tied_embeddings": not model.parameters["lm_head"],
            "projections": {
                "q": [q, hidden],
                "k": [kv, hidden],
                "v": [kv, hidden],
                "output": [hidden, q],
                "gate": [inner, hidden],
                "up": [inner, hidden],
                "down": [hidden, inner],
            },
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "kv_layout": model.kv_layout,
            "quantization": model.quantization,
            "fingerprint": model.fingerprint,
            "dtype": model.dtype,
            "kernels": model.ops,
        }
    )


# ------------------------------------------------------------------------------------- details


class _Asked(Protocol[Looked]):
    """The body of a route that looks into the model."""

    async def inspection(
        self, services: Services, model: ModelInfo
    ) -> tuple[list[int], Looked]: ...


async def _answer(
    services: Services,
    request: Request,
    owner: Owner,
    body: _Asked[Looked],
    tell: Callable[[Tokenizer, list[int], Looked, list[Inspected]], dict[str, Any]],
) -> Response:
    """Look, and `tell` what was found. When the client leaves first, that ends the inspection, and
    the 499 that is then 'answered' shows in the log only. Raises what `Inspections.run` raises."""
    ids, what = await body.inspection(services, services.client.check_ready())
    parts = await unless_left(request, services.inspections.run(owner, ids, what))
    if parts is None:
        return Response(status_code=499)
    return await asyncio.to_thread(
        lambda: json_response(tell(services.tokenizer, ids, what, parts))
    )


def token_list(tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """The tokens with their bytes, and where these are in the UTF-8 of the text that they spell."""
    spelled = [tokenizer.bytes_of(id_) for id_ in ids]
    ends = list(itertools.accumulate(map(len, spelled)))
    # Some tokenizers put a space in front of a text, which decoding takes away.
    whole = b"".join(spelled).decode("utf-8", "replace")
    lead = int(whole != tokenizer.decode(ids, skip_special=False))
    return [
        {
            "id": id_,
            "text": tokenizer.piece(id_),
            "bytes": list(data),
            "start": max(end - len(data) - lead, 0),
            "end": max(end - lead, 0),
            "special": id_ in tokenizer.special_ids,
        }
        for id_, data, end in zip(ids, spelled, ends, strict=True)
    ]


def _forward(
    tokenizer: Tokenizer, ids: list[int], what: ForwardInspection, parts: list[Inspected]
) -> dict[str, Any]:
    views = [view for part in parts for view in part.positions]
    hidden, vocab = next(part.widths for part in parts if part.widths is not None)
    answer: dict[str, Any] = {
        "tokens": token_list(tokenizer, ids),
        "shapes": {
            "input_ids": [1, len(ids)],
            "hidden": [1, len(ids), hidden],
            "logits": [1, len(ids), vocab],
        },
        "positions": [_position(tokenizer, ids, i, view) for i, view in enumerate(views)],
    }
    if what.layers:
        by_layer: dict[int, list[LayerView]] = {layer: [] for layer in what.layers}
        for part in parts:
            for view in part.layers:
                by_layer[view.layer].append(view)
        answer["layers"] = [_layer(tokenizer, views) for views in by_layer.values()]
    return answer


def _position(tokenizer: Tokenizer, ids: list[int], i: int, view: PositionView) -> dict[str, Any]:
    following = None
    if view.next is not None:
        logprob, rank = view.next
        following = {
            "id": ids[i + 1],
            "text": tokenizer.piece(ids[i + 1]),
            "prob": _prob(logprob),
            "logprob": finite(logprob),
            "rank": rank + 1,
        }
    return {
        "position": i,
        "id": ids[i],
        "text": tokenizer.piece(ids[i]),
        "top": [
            {
                "id": id_,
                "text": tokenizer.piece(id_),
                "logit": finite(logit),
                "prob": _prob(logprob),
            }
            for id_, logit, logprob in view.top
        ],
        "entropy": view.entropy,
        "next": following,
    }


def _prob(logprob: float) -> float:
    return min(math.exp(logprob), 1.0)


def _layer(tokenizer: Tokenizer, views: list[LayerView]) -> dict[str, Any]:
    """One layer, its chunks of positions put together."""
    return {
        "layer": views[0].layer,
        "lens": [
            {"id": id_, "text": tokenizer.piece(id_), "prob": prob}
            for view in views
            for id_, prob in view.lens
        ],
        "norms": {
            "residual": [norm for view in views for norm in view.residual],
            "attention": [norm for view in views for norm in view.attention],
            "feed_forward": [norm for view in views for norm in view.feed_forward],
        },
    }


def _attention(
    tokenizer: Tokenizer, ids: list[int], what: AttentionInspection, parts: list[Inspected]
) -> dict[str, Any]:
    names = ("scores", "weights", "values_share")
    rows: dict[str, dict[int, list[list[float]]]] = {
        name: {head: [] for head in what.heads} for name in names
    }
    for part in parts:
        for some in part.rows:
            for name in names:
                rows[name][some.head] += getattr(some, name)
    return {
        "tokens": token_list(tokenizer, ids),
        "layer": what.layer,
        "heads": what.heads,
        "queries": what.queries,
        **{name: list(rows[name].values()) for name in names},
    }


def _cache(
    tokenizer: Tokenizer, ids: list[int], what: CacheInspection, parts: list[Inspected]
) -> dict[str, Any]:
    comparison = parts[-1].comparison
    assert comparison is not None
    count, seconds = what.max_tokens, comparison.seconds_with

    def clock(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "tokens_per_s": count / seconds}

    return {
        "prompt_tokens": len(ids),
        "tokens": count,
        "with_cache": clock(seconds),
        "without_cache": clock(comparison.seconds_without),
        "speedup": comparison.seconds_without / seconds,
        "tokens_equal": comparison.tokens_equal,
        "text": tokenizer.decode(comparison.token_ids, skip_special=False),
    }
