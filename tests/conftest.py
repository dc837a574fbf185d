"""Fixtures for all tests. Nothing here needs the network beyond what `headwater pull` fetched."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

# Before torch is imported anywhere: its threads must not spin while other processes want the core.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests start hundreds of Python processes: none of them must compile the project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# No test writes into the home of whoever runs it; started servers get folders of their own.
os.environ["HEADWATER_DATA"] = tempfile.mkdtemp(prefix="headwater-tests-")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.server import Server, serving
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer

Show = Callable[[str], None]


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HEADWATER_DATA"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 512 tokens with a tokenizer and ChatML, for servers that start fast."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny("llama", folder, max_position_embeddings=512)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with a context of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("wide-llama")
    make_tiny("llama", folder, max_position_embeddings=4096)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Iterator[Server]:
    """A real server process on a real socket with the tiny model, shared by all tests that leave
    it as they found it."""
    with serving(str(tiny_model), "--max-num-seqs", "32") as server:
        yield server


@pytest.fixture(scope="session")
def default_server() -> Iterator[Server]:
    """A real server process with the default model."""
    with serving("smollm2-135m") as server:
        yield server


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints a line, past pytest."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n    {line}")

    return write
