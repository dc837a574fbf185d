"""Tokens in rank order: the largest value first, the lowest id first among equals.

torch.topk leaves open which of several equal values it returns and in what order; here the order
is total, so a result never depends on the device, the batch or k.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUCKETS = 4096


def ranked_top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in rank order: values and ids, both [rows, min(k, vocab)].

    Only values above the last one returned are certain to be all there: others equal to the last
    may have been left out, and which of them is open.
    """
    ids = torch.topk(x, min(k, x.shape[-1]), dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = x.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def exact_top(x: Tensor, k: int) -> list[int]:
    """The ids of the k largest of `x` [vocab] in rank order, exact whatever is equal to what."""
    if k <= 0:
        return []
    edge = torch.topk(x, min(k, x.shape[0])).values[-1]
    candidates = (x >= edge).nonzero()[:, 0]
    order = x[candidates].sort(descending=True, stable=True).indices
    ids: list[int] = candidates[order[:k]].tolist()
    return ids


def shortest_prefix(x: Tensor, mass: Tensor, need: float) -> Tensor:
    """The shortest run of tokens in rank order whose mass is at least `need`, as a mask [vocab].

    `x` [vocab] orders the tokens, `mass` [vocab] float64 >= 0 is summed. All tokens when the whole
    mass is less than `need`; never none. It does not sort the vocabulary: a histogram over the
    range of `x` finds the bucket in which the sum crosses `need`, and only that one is sorted.
    """
    top = x.amax()
    low = torch.where(x > float("-inf"), x, top).amin().double()
    top = top.double()
    # All equal: everything is in bucket 0. -inf goes to the last bucket.
    scale = (_BUCKETS - 1) / (top - low).clamp(min=1e-300)
    bucket = ((top - x.double()) * scale).clamp_(max=_BUCKETS - 1).to(torch.int64)
    sums = torch.bincount(bucket, weights=mass, minlength=_BUCKETS).cumsum(0)
    edge = int((sums < need).sum())
    keep = bucket < edge
    if edge == _BUCKETS:
        return keep
    inside = (bucket == edge).nonzero()[:, 0]
    inside = inside[x[inside].sort(descending=True, stable=True).indices]
    before = float(sums[edge - 1]) if edge else 0.0
    count = int((before + mass[inside].cumsum(0) < need).sum()) + 1
    keep[inside[:count]] = True
    return keep
