"""The types: DecoderConfig, its RopeConfig, and the error of all that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["none", "linear", "llama3", "yarn", "longrope"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SUPPORTED = "Llama, SmolLM2, Mistral, Qwen2, Qwen3 and Phi-3"


class UnsupportedModel(ValueError):
    """The model cannot be served; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base, how many of the head's dimensions turn, and the scaling.

    `factor` is None only for kind none. `short_factor` and `long_factor` have rotary_dim / 2 values
    (empty where a GGUF file keeps them as tensors). `attention_factor` None: the kind's own rule.
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "none"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. `sliding_window` has one entry a layer: the number of keys a token
    sees, itself included, or None for all."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        """Raises UnsupportedModel where two numbers do not fit each other."""
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even, got {self.head_dim}")
        rotary = self.rope.rotary_dim
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise UnsupportedModel(
                f"the rotary dimension must be even and at most head_dim {self.head_dim}, "
                f"got {rotary}"
            )
        for name, factors in (("short", self.rope.short_factor), ("long", self.rope.long_factor)):
            if factors and len(factors) != rotary // 2:
                raise UnsupportedModel(
                    f"rope {name}_factor must have {rotary // 2} values, got {len(factors)}"
                )
        if len(self.sliding_window) != self.num_layers:
            raise UnsupportedModel(
                f"{self.num_layers} layers but {len(self.sliding_window)} sliding windows"
            )
        for token_id in (
            *self.eos_token_ids,
            *([] if self.bos_token_id is None else [self.bos_token_id]),
        ):
            if not 0 <= token_id < self.vocab_size:
                raise UnsupportedModel(
                    f"special token {token_id} is outside the vocabulary of {self.vocab_size}"
                )
