"""The servers that are compared: how each is started, and what it has to be told.

A peer is optional and is given by path. What a server needs to do the same work as the others
stands here and nowhere else: as many threads, no limit below what the workloads need, nothing kept
of old prompts, greedy decoding that does not stop early where the server can be told so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_STREAMS = 32
CONTEXT = 4608  # tokens a stream may have: the longest prompt and its answer
_HERE = Path(__file__).parent
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Work:
    """What every server gets: the GGUF file, a folder with the same weights as bf16 safetensors
    (made when a peer cannot read the file), and the number of threads."""

    gguf: Path
    folder: Callable[[], Path]
    threads: int


@dataclass(frozen=True)
class Peer:
    """A server program. `command(work, program, port)` starts it. `body` is added to each request.
    `ready` answers 200 when it can work. `model` None: the first that it lists. `concurrent` False:
    it answers one request after the other, so it is not measured with several streams. `note` is
    what a reader must know.
    """

    name: str
    option: str
    command: Callable[[Work, str, int], list[str]]
    body: dict[str, Any] = field(default_factory=dict)
    ready: str = "/health"
    model: Callable[[Work], str] | None = None
    concurrent: bool = True
    note: str = ""


def _headwater(work: Work, program: str, port: int) -> list[str]:
    serve = [program, "-m", "server.cli", "serve", str(work.gguf)]
    options = ["--threads", str(work.threads), "--disk-cache", "off", "--log-level", "error"]
    return [*serve, "--port", str(port), *options]


def _llama_server(work: Work, program: str, port: int) -> list[str]:
    threads = str(work.threads)
    return [
        *(program, "--model", str(work.gguf), "--host", _HOST, "--port", str(port)),
        *("--threads", threads, "--threads-batch", threads),
        # A cache of its own for each stream: with one for all, each stream reads all streams' keys.
        *("--parallel", str(MAX_STREAMS), "--ctx-size", str(MAX_STREAMS * CONTEXT)),
        *("--no-kv-unified", "--cache-ram", "0"),
    ]


def _llama_cpp_python(work: Work, program: str, port: int) -> list[str]:
    threads = str(work.threads)
    return [
        *(program, "-m", "llama_cpp.server", "--model", str(work.gguf)),
        *("--host", _HOST, "--port", str(port), "--n_ctx", str(CONTEXT)),
        *("--n_threads", threads, "--n_threads_batch", threads),
        *("--logits_all", "false", "--interrupt_requests", "false"),
    ]


def _openvino(work: Work, program: str, port: int) -> list[str]:
    script = str(_HERE / "serve_openvino.py")
    return [program, script, str(work.gguf), "--port", str(port), "--threads", str(work.threads)]


def _transformers(work: Work, program: str, port: int) -> list[str]:
    serve = [program, "-m", "transformers.cli.transformers", "serve", str(work.folder())]
    return [*serve, "--host", _HOST, "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]


def _vllm(work: Work, program: str, port: int) -> list[str]:
    return [
        *(program, "serve", str(work.folder()), "--host", _HOST, "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(CONTEXT)),
        *("--max-num-seqs", str(MAX_STREAMS), "--no-enable-prefix-caching"),
    ]


def _folder_name(work: Work) -> str:
    return str(work.folder())


_UNPENALISED = {"repetition_penalty": 1.0}  # nobody else has one by default

HEADWATER = Peer("headwater", "", _headwater, {"ignore_eos": True, **_UNPENALISED}, ready="/ready")
PEERS = (
    Peer("llama-server", "--llama-server", _llama_server, {"ignore_eos": True}),
    Peer(
        "llama-cpp-python",
        "--llama-cpp-python",
        _llama_cpp_python,
        ready="/v1/models",
        concurrent=False,
        note="cannot be told to ignore the end of the text; answers one request at a time",
    ),
    Peer(
        "openvino",
        "--openvino",
        _openvino,
        {"ignore_eos": True},
        ready="/v1/models",
        note="GenAI's continuous batching on the same file, behind benchmarks/serve_openvino.py",
    ),
    Peer(
        "transformers",
        "--transformers",
        _transformers,
        model=_folder_name,
        concurrent=False,
        note="`transformers serve` with the file's weights as bf16; one request at a time",
    ),
    Peer(
        "vllm",
        "--vllm",
        _vllm,
        {"ignore_eos": True, **_UNPENALISED},
        model=_folder_name,
        note="the file's weights as bf16",
    ),
)


def find_program(peer: Peer, given: str | None) -> str:
    """The program to start. Raises LookupError, with the reason, when the peer is absent."""
    if peer is HEADWATER:
        return sys.executable
    if given is None:
        raise LookupError(f"not given ({peer.option} PATH)")
    # Not resolved: the python of a venv is a link, and following it leaves the venv.
    path = Path(given).expanduser().absolute()
    if not path.is_file():
        raise LookupError(f"there is no file {given}")
    return str(path)
