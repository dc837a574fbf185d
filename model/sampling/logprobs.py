"""Log-probabilities of the raw distribution: the softmax of the logits as the model gave them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.engine.messages import TokenLogprob
from model.sampling.ranking import exact_top, ranked_top

BLOCK = 256  # the vocabulary is summed in blocks of this many, so in one order in every batch
_CHUNK_ROWS = 32  # bounds the memory of a long prompt: 32 rows of 152k logits are 19 MB
_TOP = 64


def in_blocks(x: Tensor, fill: float) -> Tensor:
    """`x` [rows, vocab] as [rows, blocks, BLOCK], padded at the end with `fill`.

    A copy only where the vocabulary is not a multiple of BLOCK."""
    spare = -x.shape[-1] % BLOCK
    if spare:
        x = torch.nn.functional.pad(x, (0, spare), value=fill)
    return x.view(x.shape[0], -1, BLOCK)


def block_sums(weights: Tensor) -> Tensor:
    """Running sums over the blocks: [rows, blocks, BLOCK] fp32 -> [rows, blocks] float64.

    torch splits one long sum over its threads, and differently for one row than for sixteen. Sums
    of BLOCK are never split, and cumsum goes from left to right: the order is always the same."""
    return weights.sum(-1).double().cumsum(-1)


def raw_logprobs(
    logits: Tensor, targets: Sequence[int], top_ns: Sequence[int]
) -> list[TokenLogprob]:
    """One entry a row: the log-probability of `targets[i]` under softmax(logits[i]), its rank, and
    the `top_ns[i]` most probable tokens (the lowest id first among equals).

    `logits` is [n, vocab] fp32. Minus infinity stays -inf. A row with a NaN or +inf gives NaN: the
    caller looks at `logprob`. Raises ValueError when a target is outside the vocabulary."""
    n, vocab_size = logits.shape
    if len(targets) != n or len(top_ns) != n:
        raise ValueError(f"{n} rows of logits, {len(targets)} targets and {len(top_ns)} counts")
    wrong = [t for t in targets if not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
    result: list[TokenLogprob] = []
    for start in range(0, n, _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        result += _chunk(logits[part], targets[part], top_ns[part])
    return result


def _chunk(logits: Tensor, targets: Sequence[int], top_ns: Sequence[int]) -> list[TokenLogprob]:
    target = torch.tensor(targets, dtype=torch.int64, device=logits.device)[:, None]
    highest = logits.amax(-1, keepdim=True)
    sums = block_sums(in_blocks(logits - highest, float("-inf")).exp())[:, -1]
    chosen = logits.gather(-1, target)
    # Counting in float32 is exact up to 2**24, and several times faster than with booleans.
    flags = torch.empty_like(logits)
    above = torch.gt(logits, chosen, out=flags).sum(-1)
    equal = torch.eq(logits, chosen, out=flags).sum(-1)
    parts = (highest[:, 0], sums, chosen[:, 0], above, equal)
    scalars = torch.stack([part.double() for part in parts]).tolist()
    tops = _tops(logits, top_ns)
    result = []
    for i, (high, total, x, rank, ties) in enumerate(zip(*scalars, strict=True)):
        if ties > 1:  # equals with a lower id come first
            rank += int((logits[i, : targets[i]] == logits[i, targets[i]]).sum())
        # math.log on the host: the same bits whatever the number of rows.
        norm = high + math.log(total) if total >= 1.0 and math.isfinite(high) else math.nan
        top = [(token, value - norm) for token, value in tops[i]]
        result.append(TokenLogprob(targets[i], x - norm, int(rank), top))
    return result


def _tops(logits: Tensor, top_ns: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row the `top_ns[i]` highest (id, logit) in rank order."""
    result: list[list[tuple[int, float]]] = [[] for _ in top_ns]
    wanted = [i for i, n in enumerate(top_ns) if n > 0]
    if not wanted:
        return result
    vocab_size = logits.shape[-1]
    x = logits if len(wanted) == len(top_ns) else logits[wanted]
    values, ids = ranked_top(x, _TOP)
    for i, row_values, row_ids in zip(wanted, values.tolist(), ids.tolist(), strict=True):
        n = min(top_ns[i], vocab_size)
        if n > len(row_values) or (n < vocab_size and row_values[n - 1] == row_values[-1]):
            row_ids = exact_top(logits[i], n)
            row_values = logits[i][row_ids].tolist()
        result[i] = list(zip(row_ids[:n], row_values[:n], strict=True))
    return result
