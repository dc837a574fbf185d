"""The metadata of a GGUF file to a DecoderConfig."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from model.config import checked
from model.config.types import SUPPORTED, DecoderConfig, RopeConfig, RopeKind, UnsupportedModel

_FAMILIES = ("llama", "qwen2", "qwen3", "phi3")

# Ends of a turn that GGUF converters leave out of `eos_token_id`; llama.cpp ends on them as well.
_GGUF_END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>"})
_GGUF_CONTROL = 3


def from_gguf(
    metadata: Mapping[str, Any], tensor_names: Collection[str] | None = None
) -> DecoderConfig:
    """The configuration in a GGUF file's metadata. What only the tensors tell (tied head, biases)
    is taken from `tensor_names` when given; the weights' loader goes by the tensors in any case.

    Raises UnsupportedModel as `from_hf` does.
    """
    family = metadata.get("general.architecture")
    if family not in _FAMILIES:
        raise UnsupportedModel(
            f"GGUF architecture {family!r} is not supported, only {', '.join(_FAMILIES)}"
        )
    prefix = f"{family}."
    own = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
    if own.get("expert_count"):
        raise UnsupportedModel(f"mixtures of experts are not supported, only {SUPPORTED}")
    hidden_size = checked.integer(own, "embedding_length", None, checked.MAX_WIDTH)
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = own.get(key)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise UnsupportedModel(f"{key} that differs by layer is not supported")
            own[key] = value[0]
    num_heads = checked.integer(own, "attention.head_count", None, 4096)
    head_dim = checked.head_dim(own, "attention.key_length", hidden_size, num_heads)
    if checked.integer(own, "attention.value_length", head_dim, 1024) != head_dim:
        raise UnsupportedModel("keys and values of different widths are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    num_layers = checked.integer(own, "block_count", None, 1024)
    max_positions = checked.integer(own, "context_length", None, checked.MAX_TOKENS)
    window = checked.optional_integer(own, "attention.sliding_window")
    names = frozenset(tensor_names or ())
    vocab_size = checked.integer(own, "vocab_size", len(tokens) or None, checked.MAX_TOKENS)
    bos = checked.token_ids(metadata.get("tokenizer.ggml.bos_token_id"))
    return DecoderConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=checked.integer(own, "attention.head_count_kv", num_heads, 4096),
        head_dim=head_dim,
        intermediate_size=checked.integer(own, "feed_forward_length", None, checked.MAX_WIDTH),
        rms_norm_eps=checked.number(own, "attention.layer_norm_rms_epsilon", None),
        max_position_embeddings=max_positions,
        rope=_gguf_rope(own, head_dim, max_positions),
        tie_word_embeddings=bool(names) and "output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names if names else family == "qwen2",
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        qk_norm=family == "qwen3",
        sliding_window=(window if family in ("llama", "phi3") else None,) * num_layers,
        eos_token_ids=_gguf_end_ids(metadata, tokens, vocab_size),
        bos_token_id=bos[0] if bos else None,
    )


def _gguf_end_ids(
    metadata: Mapping[str, Any], tokens: Sequence[Any], vocab_size: int
) -> tuple[int, ...]:
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type") or []
    spelt = [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _GGUF_CONTROL and token in _GGUF_END_TOKENS and token_id < vocab_size
    ]
    return checked.token_ids([token_id for token_id in named if token_id is not None] + spelt)


def _gguf_rope(own: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    theta = checked.number(own, "rope.freq_base", 10_000.0)
    rotary_dim = checked.integer(own, "rope.dimension_count", head_dim, 1024)
    kind = own.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(
            f"rope scaling {kind!r} is not supported, only linear, yarn and longrope"
        )
    original = checked.optional_integer(own, "rope.scaling.original_context_length")
    factor = checked.optional_number(own, "rope.scaling.factor")
    if factor is None:
        factor = checked.optional_number(own, "rope.scale_linear")  # the key of early files
        if factor is not None and "rope.scaling.type" not in own:
            kind = "linear" if factor != 1.0 else "none"
    if kind in ("linear", "yarn") and factor is None:
        raise UnsupportedModel(f"rope scaling {kind} needs rope.scaling.factor")
    attention = checked.optional_number(own, "rope.scaling.attn_factor")
    if kind == "yarn" and factor is not None and attention is not None:
        # llama.cpp multiplies yarn's own magnitude by this one.
        attention *= 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        kind=cast(RopeKind, kind),
        factor=factor if factor is not None else max_positions / (original or max_positions),
        original_max_position_embeddings=original or max_positions,
        beta_fast=checked.number(own, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=checked.number(own, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention,
    )
