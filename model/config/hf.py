"""A Hugging Face `config.json`, in the styles of transformers 4 and 5, to a DecoderConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from model.config import checked
from model.config.types import (
    FAMILIES,
    SUPPORTED,
    DecoderConfig,
    RopeConfig,
    RopeKind,
    UnsupportedModel,
)

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in a parsed `config.json`. The caller merges `eos_token_id` of
    generation_config.json into it. Defaults are those of transformers' configuration classes.

    Raises UnsupportedModel for other architectures, mixtures of experts, code in the repository,
    activations other than silu, pre-quantised checkpoints, dynamic rope scaling, and bad numbers.
    """
    if config.get("auto_map"):
        raise UnsupportedModel(
            "the model asks to run code from its repository (auto_map); only "
            f"{SUPPORTED} in their standard form are supported"
        )
    family = _hf_family(config)
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "the checkpoint is already quantised (quantization_config); use its original "
            "safetensors or a GGUF file"
        )
    activation = config.get("hidden_act", config.get("hidden_activation", "silu"))
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"activation {activation!r} is not supported, only silu")

    hidden_size = checked.integer(config, "hidden_size", None, checked.MAX_WIDTH)
    num_heads = checked.integer(config, "num_attention_heads", None, 4096)
    head_dim = checked.head_dim(config, "head_dim", hidden_size, num_heads, family == "qwen3")
    num_layers = checked.integer(config, "num_hidden_layers", None, 1024)
    max_positions = checked.integer(config, "max_position_embeddings", None, checked.MAX_TOKENS)
    attention_bias = family in ("llama", "qwen3") and checked.flag(config, "attention_bias", False)
    bos = checked.token_ids(config.get("bos_token_id"))
    return DecoderConfig(
        family=family,
        vocab_size=checked.integer(config, "vocab_size", None, checked.MAX_TOKENS),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=checked.integer(config, "num_key_value_heads", num_heads, 4096),
        head_dim=head_dim,
        intermediate_size=checked.integer(config, "intermediate_size", None, checked.MAX_WIDTH),
        rms_norm_eps=checked.number(config, "rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        max_position_embeddings=max_positions,
        rope=_hf_rope(config, family, head_dim, max_positions),
        tie_word_embeddings=checked.flag(config, "tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and checked.flag(config, "mlp_bias", False),
        qk_norm=family == "qwen3",
        sliding_window=_hf_windows(config, family, num_layers),
        eos_token_ids=checked.token_ids(config.get("eos_token_id")),
        bos_token_id=bos[0] if bos else None,
    )


def _hf_family(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    if names:
        family = next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)
    else:
        family = model_type if model_type in FAMILIES else None
    if family is None:
        found = ", ".join(map(str, names)) or str(model_type)
        raise UnsupportedModel(f"architecture {found} is not supported, only {SUPPORTED}")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UnsupportedModel(f"mixtures of experts are not supported, only {SUPPORTED}")
    return family


def _hf_windows(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    if family in ("mistral", "phi3"):
        # Mistral's class has a window of 4096; only an explicit null switches it off.
        default = 4096 if family == "mistral" else None
        source = {"sliding_window": config.get("sliding_window", default)}
        return (checked.optional_integer(source, "sliding_window"),) * num_layers
    if family == "llama" or not checked.flag(config, "use_sliding_window", False):
        return (None,) * num_layers
    window = checked.integer(config, "sliding_window", 4096, checked.MAX_TOKENS)
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise UnsupportedModel(f"max_window_layers must be 0 or more, got {first!r}")
        return tuple(window if index >= first else None for index in range(num_layers))
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModel(f"layer types {', '.join(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _hf_rope(
    config: Mapping[str, Any], family: str, head_dim: int, max_positions: int
) -> RopeConfig:
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModel("rope parameters that differ by layer type are not supported")
    merged = {**config, **{key: value for key, value in rope.items() if value is not None}}
    theta = checked.number(merged, "rope_theta", 10_000.0)
    rotary_dim = int(head_dim * checked.number(merged, "partial_rotary_factor", 1.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # older names of longrope in this family
        kind = "longrope"
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        factor = checked.number(rope, "factor", None)
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, kind="linear", factor=factor)
    if kind not in ("llama3", "yarn", "longrope"):
        raise UnsupportedModel(
            f"rope scaling {kind!r} is not supported, only linear, llama3, yarn and longrope"
        )
    # As transformers: the value beside the rope parameters goes before the one inside.
    original = checked.integer(
        {
            **rope,
            **{k: v for k, v in config.items() if k == "original_max_position_embeddings" and v},
        },
        "original_max_position_embeddings",
        4096 if family == "phi3" else max_positions,
        checked.MAX_TOKENS,
    )
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        kind=cast(RopeKind, kind),
        factor=checked.number(
            rope, "factor", None if kind == "llama3" else max_positions / original
        ),
        original_max_position_embeddings=original,
        low_freq_factor=checked.number(rope, "low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=checked.number(
            rope, "high_freq_factor", None if kind == "llama3" else 4.0
        ),
        beta_fast=checked.number(rope, "beta_fast", 32.0),
        beta_slow=checked.number(rope, "beta_slow", 1.0),
        mscale=checked.optional_number(rope, "mscale"),
        mscale_all_dim=checked.optional_number(rope, "mscale_all_dim"),
        truncate=checked.flag(rope, "truncate", True),
        attention_factor=checked.optional_number(rope, "attention_factor"),
        short_factor=checked.numbers(rope, "short_factor") if kind == "longrope" else (),
        long_factor=checked.numbers(rope, "long_factor") if kind == "longrope" else (),
    )
