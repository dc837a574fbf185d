"""Decoder: embed -> N x (norm, attention, norm, feed-forward) -> norm -> LM head.

Written once over the ops. It knows tokens and tensors; not requests, not sampling, not devices.
"""

from __future__ import annotations

from typing import Any

import torch

from model.attention import AttentionMetadata
from model.config import DecoderConfig
from model.kv import KVCache
from model.ops.base import Ops
from model.ops.tap import Tap
from model.rope import RopeTable
from model.weights.load import DecoderWeights, LayerWeights


class Decoder:
    """A Llama-family decoder."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        ops: Ops,
        max_model_len: int | None = None,
    ) -> None:
        """`max_model_len` bounds the positions (default: all the model knows) and, for longrope,
        chooses the factors."""
        self.config = config
        self.ops = ops
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.rope = RopeTable.build(
            config.rope, self.max_model_len, ops.device, weights.rope_factors
        )
        self._weights = weights
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    @torch.no_grad()
    def forward(
        self,
        token_ids: torch.Tensor,
        kv: KVCache,
        meta: AttentionMetadata,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """Compute the step's tokens and write their K/V; a `tap` may look on.

        token_ids: [num_tokens] int64, in the order of `meta`. Returns the hidden states after the
        final norm, [num_tokens, hidden].
        """
        return self.ops.run(self, token_ids, kv, meta, tap)

    def layers(self, ops: Any, token_ids: Any, kv: Any, meta: Any) -> Any:
        """The model, written over `ops`. What goes through it is the ops' own affair: tensors for
        ops that compute, placeholders for ops that record."""
        eps = self.config.rms_norm_eps
        x = ops.embed(token_ids, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            h = ops.rms_norm(x, layer.attention_norm, eps)
            x = ops.add(x, self._attention(ops, index, layer, h, kv.layer(index), meta))
            h = ops.rms_norm(x, layer.feed_forward_norm, eps)
            x = ops.add(x, ops.linear(ops.silu_and_mul(ops.linear(h, layer.gate_up)), layer.down))
        return ops.rms_norm(x, self._weights.final_norm, eps)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab] fp32."""
        return self.ops.logits(hidden, self._weights.lm_head)

    @torch.no_grad()
    def lens(self, residual: torch.Tensor) -> torch.Tensor:
        """The logit lens (nostalgebraist 2020): the final norm and the LM head over the residual
        stream between two layers, [rows, hidden] -> [rows, vocab] fp32."""
        norm, eps = self._weights.final_norm, self.config.rms_norm_eps
        return self.logits(self.ops.evaluate(lambda ops, x: ops.rms_norm(x, norm, eps), residual))

    def _attention(
        self, ops: Any, index: int, layer: LayerWeights, h: Any, kv_layer: Any, meta: Any
    ) -> Any:
        config = self.config
        q, k, v = ops.split_heads(ops.linear(h, layer.qkv), self._heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        q = ops.rope_and_write_kv(q, k, v, self.rope, kv_layer, meta)
        attended = ops.paged_attention(q, kv_layer, meta, config.sliding_window[index])
        return ops.linear(attended, layer.output)
