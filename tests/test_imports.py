"""The rules of the two packages, checked on every import statement:

`model` goes from token ids to token ids: nothing of the server, of HTTP or of text in it.
`server` never imports torch; of `model` it may import the messages and what finds a model.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODEL_NEVER = {
    "server",
    "fastapi",
    "starlette",
    "uvicorn",
    "sse_starlette",
    "pydantic",
    "tokenizers",
    "transformers",
    "jinja2",
    "sqlalchemy",
}
# The grammar compiler's vocabulary is the one exception; it comes with grammars.
SERVER_NEVER = {"torch", "transformers", "numpy", "gguf", "safetensors"}
SERVER_MAY_OF_MODEL = (
    "model.engine.messages",
    "model.engine.request",  # the types that messages carry
    "model.hub",
    "model.hub.cache",
    "model.hub.memory",
)
NOBODY = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            yield node.module or "", node.lineno


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("model"), ids=lambda p: str(p.relative_to(ROOT)))
def test_model_knows_no_text_and_no_server(path: Path) -> None:
    for name, line in imports(path):
        assert name.split(".")[0] not in MODEL_NEVER | NOBODY, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", files("server"), ids=lambda p: str(p.relative_to(ROOT)))
def test_server_knows_no_tensors(path: Path) -> None:
    for name, line in imports(path):
        root = name.split(".")[0]
        assert root not in SERVER_NEVER | NOBODY, f"{path}:{line} imports {name}"
        if root == "model":
            assert name in SERVER_MAY_OF_MODEL, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("module", ["server.cli", "server.app", "model.hub", "server.bench"])
def test_no_torch_in_the_api_process(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
