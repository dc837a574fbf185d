"""What an inspection found, put together, and held against transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoder import Decoder
from model.engine.messages import (
    AttentionInspection,
    AttentionRows,
    ForwardInspection,
    Inspect,
    Inspected,
    Inspection,
    LayerView,
)
from model.inspect import Inspector


def found(decoder: Decoder, token_ids: list[int], what: Inspection) -> list[Inspected]:
    """The parts of an inspection that has ended."""
    parts = Inspector(decoder, 16).run(Inspect(1, token_ids, what))
    return [part for part in parts if part is not None]


def attention_rows(
    decoder: Decoder, token_ids: list[int], layer: int, queries: list[int] | None = None
) -> list[AttentionRows]:
    """The rows of each head, its chunks put together."""
    heads = list(range(decoder.config.num_heads))
    what = AttentionInspection(layer, heads, queries or list(range(len(token_ids))))
    whole = [AttentionRows(head) for head in heads]
    for part in found(decoder, token_ids, what):
        for some in part.rows:
            for name in ("scores", "weights", "values_share"):
                rows = getattr(whole[some.head], name)
                rows += getattr(some, name)
    return whole


def layer_views(decoder: Decoder, token_ids: list[int]) -> list[LayerView]:
    """All layers, their chunks put together."""
    layers = list(range(decoder.config.num_layers))
    whole = [LayerView(layer, [], [], [], []) for layer in layers]
    for part in found(decoder, token_ids, ForwardInspection(1, layers)):
        for some in part.layers:
            for name in ("lens", "residual", "attention", "feed_forward"):
                values = getattr(whole[some.layer], name)
                values += getattr(some, name)
    return whole


def square(rows: list[list[float]]) -> Tensor:
    """Rows of growing length as [n, n], zeros behind."""
    result = torch.zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        assert len(row) == i + 1
        result[i, : i + 1] = torch.tensor(row)
    return result


def check_rows(rows: Sequence[AttentionRows], attentions: Tensor, tolerance: float) -> None:
    """`rows` of all heads against [heads, n, n]; and they add up to one."""
    for one, expected in zip(rows, attentions, strict=True):
        torch.testing.assert_close(square(one.weights), expected, rtol=0, atol=tolerance)
        for row in one.weights + one.values_share:
            assert abs(sum(row) - 1) < 1e-5
