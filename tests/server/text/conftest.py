"""Tokenizers for the tests of text: the default model's, and small ones of both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_tokenizers import byte_level_metadata, from_metadata, sentencepiece_metadata

from model import hub
from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return from_metadata(byte_level_metadata())


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return from_metadata(sentencepiece_metadata())


@pytest.fixture(scope="session")
def default_folder() -> Path:
    return hub.resolve("smollm2-135m").folder


@pytest.fixture(scope="session")
def smollm2(default_folder: Path) -> Tokenizer:
    return Tokenizer.load(default_folder)
