"""DecoderConfig out of config.json and GGUF metadata: what is read, what is refused and how."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from model.config import UnsupportedModel, from_gguf, from_hf

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 512,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def hf(family: str, **changes: Any) -> dict[str, Any]:
    name = {"phi3": "Phi3"}.get(family, family.capitalize())
    return {**HF, "architectures": [f"{name}ForCausalLM"], "model_type": family, **changes}


def test_what_is_read() -> None:
    config = from_hf(HF)
    assert (config.family, config.head_dim, config.num_kv_heads) == ("llama", 16, 2)
    assert config.eos_token_ids == (2, 3)
    assert config.sliding_window == (None, None, None)
    assert not config.tie_word_embeddings
    assert (config.rope.kind, config.rope.theta, config.rope.rotary_dim) == ("none", 10_000.0, 16)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (hf("mistral"), (4096,) * 3),  # the default of the class
        (hf("mistral", sliding_window=None), (None,) * 3),
        (hf("mistral", sliding_window=8), (8,) * 3),
        (hf("phi3"), (None,) * 3),
        (hf("llama", sliding_window=8), (None,) * 3),
        (hf("qwen2", sliding_window=8), (None,) * 3),
        (hf("qwen2", use_sliding_window=True, sliding_window=8), (None,) * 3),
        (
            hf("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
            (None, None, 8),
        ),
        (
            hf(
                "qwen3",
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            (8, None, 8),
        ),
    ],
)
def test_sliding_windows(config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert from_hf(config).sliding_window == windows


def test_flags_of_the_families() -> None:
    flags = {
        family: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, c.head_dim)
        for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")
        for c in [from_hf(hf(family))]
    }
    assert flags == {
        "llama": (False, False, False, False, 16),
        "mistral": (False, False, False, False, 16),
        "qwen2": (True, False, False, False, 16),
        "qwen3": (False, False, False, True, 128),
        "phi3": (False, False, False, False, 16),
    }


def test_phi3_knows_longrope_by_its_older_names() -> None:
    factors = [1.0] * 8
    for kind in ("su", "yarn", "longrope"):
        scaling = {"type": kind, "short_factor": factors, "long_factor": factors}
        config = hf("phi3", rope_scaling=scaling, original_max_position_embeddings=64)
        rope = from_hf(config).rope
        assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == (
            "longrope",
            4,
            64,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported, only Llama"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"architectures": [], "model_type": "gpt2"}, "gpt2 is not supported"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported, only silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be positive"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer type"),
        ({"rope_theta": float("inf")}, "rope_theta must be positive and finite"),
        ({"partial_rotary_factor": 2.0}, "rotary dimension"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": 65}, "65 is not a multiple of 4"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number"),
        ({"vocab_size": -5}, "vocab_size must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1024"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number from 1"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": 512}, "special token 512 is outside the vocabulary of 512"),
        ({"eos_token_id": "2"}, "a token id must be a whole number"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message) as error:
        from_hf({**HF, **changes})
    assert "\n" not in str(error.value)


def test_longrope_wants_factors_of_the_right_length() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}
    with pytest.raises(UnsupportedModel, match="short_factor must have 8 values, got 7"):
        from_hf(hf("phi3", rope_scaling=scaling))


def test_gguf_metadata() -> None:
    config = from_gguf(GGUF, ["token_embd.weight", "blk.0.attn_q.bias"])
    assert (config.family, config.head_dim, config.num_layers) == ("llama", 16, 3)
    assert config.tie_word_embeddings
    assert config.qkv_bias
    assert not from_gguf(GGUF, ["output.weight"]).tie_word_embeddings
    assert config.eos_token_ids == (2,)


def test_gguf_ends_of_turn() -> None:
    """The ids that the file names, and control tokens known to end a turn; never plain text."""
    tokens = ["a"] * 512
    tokens[7], tokens[8] = "<|im_end|>", "<|end|>"
    types = [1] * 512
    types[7] = 3
    metadata = {
        **GGUF,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eot_token_id": 5,
    }
    assert from_gguf(metadata).eos_token_ids == (2, 5, 7)


def test_gguf_rope_scaling() -> None:
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": 8,
    }
    rope = from_gguf({**GGUF, **yarn}).rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 64)
    assert (rope.theta, rope.rotary_dim) == (5e5, 8)
    old = from_gguf({**GGUF, "llama.rope.scale_linear": 2.0}).rope
    assert (old.kind, old.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "GGUF architecture 'gemma' is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.block_count": 0}, "block_count must be a whole number"),
        ({"llama.attention.head_count": [4, 4, 8]}, "differs by layer"),
        ({"llama.attention.value_length": 32}, "keys and values of different widths"),
        ({"llama.rope.scaling.type": "linear"}, "needs rope.scaling.factor"),
        ({"llama.rope.scaling.type": "mystery"}, "rope scaling 'mystery'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks 'attention.layer_norm_rms_eps"),
    ],
)
def test_gguf_that_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        from_gguf({**GGUF, **changes})


def test_it_does_not_import_torch() -> None:
    code = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
