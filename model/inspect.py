"""Inspector: looks into the decoder while it computes, with the same ops and the same weights.

Every inspection is a generator: it computes a little, at most CHUNK tokens or the logits of ROWS
tokens, and yields what it has found, or None. The engine goes on with it between two steps. The K/V
of its tokens lie in a cache of their own that goes with the generator, so the block pool and the
prefix index never see it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from model.attention import AttentionMetadata
from model.decoder import Decoder
from model.engine.messages import (
    AttentionInspection,
    AttentionRows,
    CacheComparison,
    CacheInspection,
    ForwardInspection,
    Inspect,
    Inspected,
    LayerView,
    PositionView,
)
from model.kv import KVCache
from model.ops.tap import Tap
from model.sampling.logprobs import raw_logprobs

CHUNK = 64  # tokens of a forward pass between two yields
ROWS = 16  # of the vocabulary's width: a softmax of more is out of the core's cache, and slower
_DIGITS = 8  # of weights: rounded, 512 of them still add up to 1 within 3e-6


class Inspector:
    """Inspections of one decoder. `block_size` is that of the engine's own KV cache."""

    def __init__(self, decoder: Decoder, block_size: int) -> None:
        self._decoder = decoder
        self._block_size = block_size

    def run(self, message: Inspect) -> Iterator[Inspected | None]:
        """Raises ValueError, when it is begun, for tokens, layers or heads that the model has
        not."""
        config, ids = self._decoder.config, message.token_ids
        if not ids or min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ValueError(f"token ids must be from 0 to {config.vocab_size - 1}, at least one")
        match message.what:
            case ForwardInspection(top_k, layers):
                _check(layers, config.num_layers, "layer")
                yield from self._forward(message.inspect_id, ids, top_k, layers)
            case AttentionInspection(layer, heads, queries):
                _check([layer], config.num_layers, "layer")
                _check(heads, config.num_heads, "head")
                _check(queries, len(ids), "query")
                yield from self._attention(message.inspect_id, ids, layer, heads, queries)
            case CacheInspection(max_tokens):
                yield from self._cache(message.inspect_id, ids, max_tokens)

    def _forward(
        self, inspect_id: int, ids: list[int], top_k: int, layers: list[int]
    ) -> Iterator[Inspected | None]:
        sequence = _Sequence(self._decoder, len(ids), self._block_size)
        for start in range(0, len(ids), CHUNK):
            end = min(start + CHUNK, len(ids))
            seen = _Residuals()
            tap = Tap(residual=seen.add) if layers else None
            hidden = sequence.compute(ids[:end], start, tap)
            yield None
            for first in range(start, end, ROWS):
                last = min(first + ROWS, end)
                logits = self._decoder.logits(hidden[first - start : last - start])
                widths = (hidden.shape[-1], logits.shape[-1])
                views = _positions(logits, ids[first + 1 : last + 1], top_k)
                yield Inspected(inspect_id, widths=widths, positions=views)
                for layer in layers:
                    rows = slice(first - start, last - start)
                    yield Inspected(inspect_id, layers=[seen.view(layer, rows, self._decoder)])

    def _attention(
        self, inspect_id: int, ids: list[int], layer: int, heads: list[int], queries: list[int]
    ) -> Iterator[Inspected | None]:
        config = self._decoder.config
        length = max(queries) + 1  # what comes after the last query changes nothing
        sequence = _Sequence(self._decoder, length, self._block_size)
        found: list[torch.Tensor] = []
        scale = 1.0

        def keep(index: int, q: torch.Tensor, times: float) -> None:
            nonlocal scale
            if index == layer:
                scale = times
                found.append(q.clone())

        for start in range(0, length, CHUNK):
            sequence.compute(ids[: min(start + CHUNK, length)], start, Tap(queries=keep))
            yield None
        # In float64, so that what is told is off by its rounding alone.
        q = torch.cat(found).double()  # [length, H, D]
        keys, values = (x.double() for x in sequence.read(layer, length))  # [length, K, D]
        sizes = values.norm(dim=-1)
        window = config.sliding_window[layer]
        for head in heads:
            kv_head = head // (config.num_heads // config.num_kv_heads)
            for first in range(0, len(queries), CHUNK):
                rows = AttentionRows(head)
                for query in queries[first : first + CHUNK]:
                    scores = keys[: query + 1, kv_head] @ q[query, head] * scale
                    seen = scores.clone()
                    if window is not None:
                        seen[: max(query + 1 - window, 0)] = float("-inf")
                    weights = seen.softmax(-1)
                    shares = weights * sizes[: query + 1, kv_head]
                    rows.scores.append(scores.round(decimals=_DIGITS).tolist())
                    rows.weights.append(weights.round(decimals=_DIGITS).tolist())
                    # Where all values are zero nobody has a share.
                    shares = shares / shares.sum().clamp_min(1e-300)
                    rows.values_share.append(shares.round(decimals=_DIGITS).tolist())
                yield Inspected(inspect_id, rows=[rows])

    def _cache(
        self, inspect_id: int, prompt: list[int], max_tokens: int
    ) -> Iterator[Inspected | None]:
        # The last token drawn is not computed any more.
        sequence = _Sequence(self._decoder, len(prompt) + max_tokens - 1, self._block_size)
        drawn: list[list[int]] = []
        clocks: list[float] = []
        for cached in (True, False):
            ids, computed, seconds = list(prompt), 0, 0.0
            for _ in range(max_tokens):
                for start in range(computed if cached else 0, len(ids), CHUNK):
                    end = min(start + CHUNK, len(ids))
                    begun = self._now()
                    hidden = sequence.compute(ids[:end], start)
                    if end == len(ids):
                        logits = self._decoder.logits(hidden[-1:])
                    seconds += self._now() - begun
                    yield None
                computed = len(ids)
                ids.append(int(logits[0].argmax()))
            drawn.append(ids[len(prompt) :])
            clocks.append(seconds)
        comparison = CacheComparison(drawn[0], clocks[0], clocks[1], drawn[0] == drawn[1])
        yield Inspected(inspect_id, comparison=comparison)

    def _now(self) -> float:
        """Seconds, with all that was begun being finished."""
        if self._decoder.ops.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.ops.device)
        return time.perf_counter()


class _Sequence:
    """One sequence alone in a KV cache of its own, of `max_len` tokens."""

    def __init__(self, decoder: Decoder, max_len: int, block_size: int) -> None:
        self._decoder = decoder
        self._device = decoder.ops.device
        self._kv = KVCache(decoder.config, -(-max_len // block_size), block_size, decoder.ops)
        self._blocks = torch.arange(self._kv.num_blocks, device=self._device)

    def compute(self, ids: list[int], start: int, tap: Tap | None = None) -> torch.Tensor:
        """The tokens from `start` on, whose predecessors are in the cache -> hidden states
        [len(ids) - start, hidden]."""
        positions = torch.arange(start, len(ids), device=self._device)
        meta = AttentionMetadata(
            positions=positions,
            slot_mapping=positions,  # block i of the table is block i of the cache
            block_tables=self._blocks[None],
            query_start=[0, len(ids) - start],
            seq_lens=[len(ids)],
        )
        token_ids = torch.tensor(ids[start:], device=self._device)
        return self._decoder.forward(token_ids, self._kv, meta, tap)

    def read(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` keys and values of a layer, [count, K, D] fp32."""
        return self._decoder.ops.read_kv(self._kv.layer(layer), self._blocks, count)


class _Residuals:
    """The residual stream of one chunk on its way through the layers."""

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []  # the embedding; then two for each layer

    def add(self, x: torch.Tensor) -> None:
        self._seen.append(x.clone())

    def view(self, layer: int, rows: slice, decoder: Decoder) -> LayerView:
        """What a layer did to some rows, and what the head would say of them then."""
        before, middle, after = (x[rows] for x in self._seen[2 * layer : 2 * layer + 3])
        probs = decoder.lens(after).softmax(-1)
        top = probs.max(-1)
        return LayerView(
            layer,
            list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            after.float().norm(dim=-1).tolist(),
            (middle - before).float().norm(dim=-1).tolist(),
            (after - middle).float().norm(dim=-1).tolist(),
        )


def _positions(logits: torch.Tensor, targets: list[int], top_k: int) -> list[PositionView]:
    """What each row of [n, vocab] says of the next token. `targets` are the tokens that came; it is
    one shorter where nothing came after the last row. Raises ValueError when the logits are no
    numbers."""
    entropies = torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
    if any(entropy != entropy for entropy in entropies):
        raise ValueError("the model's logits are not numbers")
    rows = len(entropies)
    told = raw_logprobs(logits, [*targets, 0][:rows], [top_k] * rows)
    views = []
    for i, one in enumerate(told):
        values = logits[i, [token for token, _ in one.top]].tolist()
        top = [
            (token, logit, logprob) for (token, logprob), logit in zip(one.top, values, strict=True)
        ]
        next_ = (one.logprob, one.rank) if i < len(targets) else None
        views.append(PositionView(top, entropies[i], next_))
    return views


def _check(asked: list[int], count: int, what: str) -> None:
    if any(not 0 <= one < count for one in asked):
        raise ValueError(f"a {what} is from 0 to {count - 1}, got {asked}")
