"""Ops: the primitive operations that the decoder is written over, and how weights are given to it.

The decoder never looks inside a `Weight` or a layer's KV tensor: each implementation stores them
as its kernels like (dense, packed blocks, interleaved). `model.ops.reference` is the oracle of all
others; an implementation of this protocol passes the same tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from model.attention import AttentionMetadata
from model.config import DecoderConfig
from model.ops.tap import Tap
from model.rope import RopeTable
from model.weights.raw_tensor import RawTensor

if TYPE_CHECKING:
    from model.decoder import Decoder
    from model.kv import KVCache


class Weight:
    """A prepared weight; opaque outside the ops that made it."""

    __slots__ = ()


class Ops(Protocol):
    """T is the number of tokens of the step; H, K and D are heads, KV heads and head_dim."""

    @property
    def id(self) -> str:
        """Everything about the implementation that could change a bit of K/V; for cache keys."""

    @property
    def reproducible(self) -> bool:
        """Whether a row's result never depends on the other rows, the chunk or the threads."""

    @property
    def device(self) -> torch.device:
        """Where activations and the KV cache live."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""

    @property
    def kv_layout(self) -> str:
        """Names the order and type of the bytes in a block of the KV cache; for cache keys."""

    # ------------------------------------------------------------------ loading

    def prepare_linear(
        self, parts: Sequence[RawTensor], biases: Sequence[RawTensor] = ()
    ) -> Weight:
        """A matrix [sum of the parts' rows, in]: q, k and v or gate and up are fused by rows.
        `biases` is empty or has one vector for each part."""

    def prepare_embedding(self, table: RawTensor, *, tied: bool) -> Weight:
        """The table [vocab, hidden] for `embed`, and for `logits` too when tied."""

    def prepare_vector(self, vector: RawTensor) -> Weight:
        """The weight of an `rms_norm`."""

    def allocate_kv(self, config: DecoderConfig, num_blocks: int, block_size: int) -> torch.Tensor:
        """The zeroed cache: [num_layers, 2, runs, n, ...], where block b is [:, :, b // n, b % n].
        Blocks of a run may lie interleaved in memory; the rest is the ops' own affair."""

    # ------------------------------------------------------------------ running

    def run(
        self,
        decoder: Decoder,
        token_ids: torch.Tensor,
        kv: KVCache,
        meta: AttentionMetadata,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """`decoder.layers` over these ops: [T] int64 -> hidden [T, hidden]. Ops that record run
        what they recorded. A tap changes no bit of it."""

    def evaluate(self, body: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
        """`body(ops, *inputs)`, written over the ops of `LayerOps`, on tensors [T, width]."""

    def read_kv(
        self, kv_layer: torch.Tensor, blocks: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` keys and values of one layer in these blocks ([n] int64), in order:
        both [count, K, D] fp32, exactly as attention reads them."""

    def logits(self, hidden: torch.Tensor, head: Weight) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab] fp32."""


class LayerOps(Protocol):
    """What `Decoder.layers` calls, as ops that compute see it."""

    def embed(self, token_ids: torch.Tensor, table: Weight) -> torch.Tensor:
        """[T] int64 -> [T, hidden]."""

    def rms_norm(self, x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x may be a strided view."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """[T, in] -> [T, out], with the bias if there is one."""

    def split_heads(
        self, qkv: torch.Tensor, counts: Sequence[int], head_dim: int
    ) -> tuple[torch.Tensor, ...]:
        """[T, sum(counts) * D] -> views [T, count, D]: q, k and v."""

    def rope_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: RopeTable,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """Rotate q [T, H, D] and k [T, K, D], write k and v to their cells, return the rotated q.

        Rotation pairs dimension i with i + rotary_dim / 2; the rest of the head passes."""

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Causal attention of q [T, H, D] over each sequence's keys -> [T, H * D].

        Scores are scaled by 1 / sqrt(D). With a window a token sees its last `sliding_window` keys,
        itself included."""

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * n] -> silu(first half) * second half, [T, n]."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual: [T, hidden] + [T, hidden]."""
