"""Tap: somebody who looks on while the decoder computes.

Ops that compute step by step are wrapped in `TappedOps`; ops that run a recorded program stop it at
the same places. Without a tap neither happens, so looking costs nothing while nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tap:
    """What it is shown is not to be changed, and is gone when the call returns.

    `residual(x)` gets the residual stream, [T, hidden]: after the embedding, then in each layer
    after attention and after the feed-forward part. `queries(layer, q, scale)` gets the rotated
    queries, [T, H, D]: the score of a key is `scale` * q.k. The layer's keys and values of these
    tokens are in the KV cache by then."""

    residual: Callable[[torch.Tensor], None] | None = None
    queries: Callable[[int, torch.Tensor, float], None] | None = None


class TappedOps:
    """`ops`, with a tap on what they return."""

    def __init__(self, ops: Any, tap: Tap) -> None:
        self._ops = ops
        self._tap = tap
        self._layer = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def embed(self, *arguments: Any) -> torch.Tensor:
        return self._shown(self._ops.embed(*arguments))

    def add(self, *arguments: Any) -> torch.Tensor:
        return self._shown(self._ops.add(*arguments))

    def rope_and_write_kv(self, *arguments: Any) -> torch.Tensor:
        q: torch.Tensor = self._ops.rope_and_write_kv(*arguments)
        if self._tap.queries is not None:
            self._tap.queries(self._layer, q, q.shape[-1] ** -0.5)
        self._layer += 1
        return q

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        if self._tap.residual is not None:
            self._tap.residual(x)
        return x
