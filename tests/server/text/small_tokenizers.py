"""Small tokenizers of both kinds, made the way a GGUF file's are."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from model.gguf.tokenizer import tokenizer_config, tokenizer_json
from server.text.tokenizer import Tokenizer

CONTROL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|user|>"]


def byte_level_metadata(**more: Any) -> dict[str, Any]:
    """A byte-level vocabulary of 256 bytes and a few merges, with four control tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "u s", "us e", "use r"]
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, "<tool>", *bytes_, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [4] + [1] * (len(tokens) - 5),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback and a few words."""
    words = ["▁hello", "hello", "▁h", "hell", "ello", "el", "lo", "▁w", "user", "us", "er"]
    letters = sorted(set("▁helowuser<|>_im:"))
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *words, *letters],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(i) for i in range(len(types) - 260)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    document = json.dumps(tokenizer_json(metadata)).encode()
    return Tokenizer(document, tokenizer_config(metadata))
