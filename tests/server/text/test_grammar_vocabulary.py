"""A grammar sees the bytes that a reader will see; tokens that were added to a vocabulary are no
text to it, whether they are special or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level_metadata, from_metadata, sentencepiece_metadata

from model.gguf.tokenizer import tokenizer_json
from model.grammar import vocabulary
from server.text.tokenizer import Tokenizer


@pytest.mark.parametrize("padding", [0, 77])
@pytest.mark.parametrize("metadata", [byte_level_metadata(), sentencepiece_metadata()])
def test_the_bytes_of_small_vocabularies(
    tmp_path: Path, metadata: dict[str, Any], padding: int
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(metadata)))
    _compare(path, from_metadata(metadata), padding)


def test_the_bytes_of_the_default_model(default_folder: Path, smollm2: Tokenizer) -> None:
    _compare(default_folder / "tokenizer.json", smollm2, 0)


def _compare(path: Path, tokenizer: Tokenizer, padding: int) -> None:
    tokens = vocabulary(path, tokenizer.vocab_size + padding, (2,))
    assert tokens.vocab_size == tokenizer.vocab_size + padding
    added = {token["id"] for token in json.loads(path.read_text())["added_tokens"]}
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.token_bytes[token_id] == b"\xff":
            continue  # llguidance's own mark of special tokens; no text has this byte
        assert tokens.is_special_token(token_id) == (token_id in added)
        if token_id not in added:
            assert tokens.decode_bytes([token_id]) == tokenizer.token_bytes[token_id]
