"""Writing a Hugging Face folder as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from model.config import DecoderConfig

Array = npt.NDArray[np.float32]

NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    if name == "model.norm.weight":
        return "output_norm.weight"
    parts = name.split(".")
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{block}{NAMES[parts[-2]]}.{parts[-1]}"


def permute(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """llama.cpp's order of the rows of q and k: halves become neighbours."""
    shape = values.shape
    halves = values.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def write_metadata(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rope.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)


def write_gguf(
    folder: Path,
    config: DecoderConfig,
    path: Path,
    encode: Callable[[str, Array], tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]],
    extra: dict[str, Array] | None = None,
) -> None:
    """`encode` gives each matrix's stored rows and type; vectors stay F32."""
    architecture = "llama" if config.family == "mistral" else config.family
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, config)
    for name, values in load_file(folder / "model.safetensors").items():
        if architecture == "llama" and ".q_proj." in name:
            values = permute(values, config.num_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permute(values, config.num_kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
            continue
        data, kind = encode(name, values)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
