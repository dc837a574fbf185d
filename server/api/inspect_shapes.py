"""What the inspect routes answer, for `/openapi.json`. The answers themselves are made as plain
values: an attention map has hundreds of thousands of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Shape = list[Count]
Rows = Annotated[
    list[list[list[float]]],
    Field(description="[heads][queries][keys from 0 to the query]"),
]


class InspectedToken(BaseModel):
    """`text` shows the token alone: bytes that are half a character as U+FFFD. `start` and `end`
    are its place in the UTF-8 of the whole text."""

    id: Count
    text: str
    bytes: list[Annotated[int, Field(ge=0, le=255)]]
    start: Count
    end: Count
    special: bool


class InspectTokens(BaseModel):
    tokens: list[InspectedToken]
    rendered: str
    count: Count
    max_model_len: Count
    room: Count


class LikelyToken(BaseModel):
    id: Count
    text: str
    logit: float
    prob: Share


class ActualToken(BaseModel):
    """The token that came next; rank 1 is the most probable."""

    id: Count
    text: str
    prob: Share
    logprob: float
    rank: Annotated[int, Field(ge=1)]


class InspectedPosition(BaseModel):
    """`entropy` is in nats."""

    position: Count
    id: Count
    text: str
    top: list[LikelyToken]
    entropy: float
    next: ActualToken | None


class LensToken(BaseModel):
    id: Count
    text: str
    prob: Share


class Norms(BaseModel):
    """Of each position: the residual stream behind the layer, and what was added to it."""

    residual: list[float]
    attention: list[float]
    feed_forward: list[float]


class InspectedLayer(BaseModel):
    layer: Count
    lens: list[LensToken]
    norms: Norms


class Shapes(BaseModel):
    input_ids: Shape
    hidden: Shape
    logits: Shape


class InspectForward(BaseModel):
    """`layers` is there when it was asked for."""

    tokens: list[InspectedToken]
    shapes: Shapes
    positions: list[InspectedPosition]
    layers: list[InspectedLayer] = []


class InspectAttention(BaseModel):
    """`heads` and `queries` say what the first two axes of the arrays are."""

    tokens: list[InspectedToken]
    layer: Count
    heads: list[Count]
    queries: list[Count]
    scores: Rows
    weights: Rows
    values_share: Rows


class Clock(BaseModel):
    seconds: float
    tokens_per_s: float


class InspectCache(BaseModel):
    """`tokens` were drawn after `prompt_tokens`; the clocks have the forward passes only."""

    prompt_tokens: Count
    tokens: Count
    with_cache: Clock
    without_cache: Clock
    speedup: float
    tokens_equal: bool
    text: str


class Parameters(BaseModel):
    """An LM head that is the embedding itself (`tied_embeddings`) has none of its own."""

    total: Count
    embedding: Count
    attention: Count
    feed_forward: Count
    norms: Count
    lm_head: Count


class Projections(BaseModel):
    """[outputs, inputs] of each matrix of a block."""

    q: Shape
    k: Shape
    v: Shape
    output: Shape
    gate: Shape
    up: Shape
    down: Shape


class InspectModel(BaseModel):
    model: str
    family: str
    blocks: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    hidden: Count
    feed_forward: Count
    vocabulary: Count
    context_length: Count
    parameters: Parameters
    tied_embeddings: bool
    projections: Projections
    kv_bytes_per_token: Count
    kv_layout: str
    quantization: str
    fingerprint: str
    dtype: str
    kernels: str
