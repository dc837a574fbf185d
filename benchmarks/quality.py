"""What packed weights and int8 activations cost: perplexity, KL, top-1 agreement on a fixed text.

    python -m benchmarks.quality --llama-cpp-python VENV/bin/python

The reference computes the same file's weights, dequantised, in fp32. Every window of the text
stands alone: its tokens see nothing before it. All positions but a window's last count. A table,
then JSON as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.divergence import Divergence
from model.attention import AttentionMetadata
from model.decoder import Decoder
from model.engine.threads import usable_cores
from model.hub import DEFAULT_MODEL, HubError, ModelFiles, resolve
from model.kv import KVCache
from model.ops.base import Ops
from model.ops.kernels import NoKernels
from model.ops.native import NativeOps
from model.ops.reference import ReferenceOps
from model.weights.load import load_weights
from server.bench.origin import origin

HERE = Path(__file__).parent
TEXT = HERE / "text.txt"
WINDOW = 512
_BLOCK_SIZE = 16

Logits = Callable[[list[int]], torch.Tensor]
"""Token ids of a window -> the logits of all its positions, [len, vocab] fp32."""


def windows(token_ids: list[int], size: int = WINDOW) -> list[list[int]]:
    """Pieces of `size` tokens; the last may be shorter, but has at least two."""
    pieces = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    return [piece for piece in pieces if len(piece) > 1]


def logits_of(files: ModelFiles, ops: Ops) -> Logits:
    """Our decoder over these ops, with a cache for one window."""
    decoder = Decoder(files.config, load_weights(list(files.weights), files.config, ops), ops)
    num_blocks = -(-WINDOW // _BLOCK_SIZE)
    kv = KVCache(files.config, num_blocks, _BLOCK_SIZE, ops)
    blocks = torch.arange(num_blocks)[None]

    def compute(token_ids: list[int]) -> torch.Tensor:
        positions = torch.arange(len(token_ids))
        meta = AttentionMetadata(
            positions=positions,
            slot_mapping=positions,  # block i of the table is block i of the cache
            block_tables=blocks,
            query_start=[0, len(token_ids)],
            seq_lens=[len(token_ids)],
        )
        return decoder.logits(decoder.forward(torch.tensor(token_ids), kv, meta))

    return compute


@contextlib.contextmanager
def llama_cpp_logits(python: str, gguf: Path, threads: int) -> Iterator[Logits]:
    """llama.cpp in a process of its own. Raises OSError when it does not start."""
    script = str(HERE / "logits_llama_cpp.py")
    process = subprocess.Popen(
        [python, script, str(gguf), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def receive(count: int) -> bytes:
        data = stdout.read(count)
        if len(data) != count:
            raise OSError(f"it ended early, with code {process.wait(10)}")
        return data

    def compute(token_ids: list[int]) -> torch.Tensor:
        stdin.write(np.array([len(token_ids), *token_ids], np.int32).tobytes())
        stdin.flush()
        data = receive(4 * len(token_ids) * vocab_size)
        rows = np.frombuffer(bytearray(data), np.float32)
        return torch.from_numpy(rows.reshape(len(token_ids), vocab_size))

    try:
        vocab_size = int(np.frombuffer(receive(4), np.int32)[0])
        yield compute
    finally:
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        process.terminate()
        process.wait(10)


def measure(
    pieces: list[list[int]], reference: Logits, others: dict[str, Logits]
) -> tuple[dict[str, Divergence], dict[str, float]]:
    """Each window by all; the reference comes first in both answers, under "reference". The second
    has the seconds that the logits took."""
    found = {name: Divergence() for name in ("reference", *others)}
    seconds = dict.fromkeys(found, 0.0)
    for piece in pieces:
        targets = torch.tensor(piece[1:])
        begun = time.perf_counter()
        expected = reference(piece)[:-1].log_softmax(-1)
        seconds["reference"] += time.perf_counter() - begun
        found["reference"].add(expected, expected, targets)
        for name, compute in others.items():
            begun = time.perf_counter()
            logits = compute(piece)[:-1]
            seconds[name] += time.perf_counter() - begun
            found[name].add(expected, logits, targets)
    return found, seconds


def report(found: dict[str, Divergence], title: str) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON document."""
    reference = found["reference"]
    document = {name: one.as_document(reference) for name, one in found.items()}
    table = Table(title=title, caption="KL in nats, against the reference, with standard error")
    table.add_column("")
    for column in ("perplexity", "of reference", "mean KL", "KL p99", "top-1 agreement"):
        table.add_column(column, justify="right")
    for name, one in document.items():
        table.add_row(
            name,
            f"{one['perplexity']:.3f}",
            f"{100 * (one['perplexity_ratio'] - 1):+.2f} %",
            f"{one['mean_kl']:.5f} ± {one['mean_kl_error']:.5f}",
            f"{one['kl_p99']:.4f}",
            f"{100 * one['top1_agreement']:.2f} %",
        )
    Console().print(table)
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="an alias or a GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, help="only so many of the text")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--llama-cpp-python", metavar="PATH", help="the python of a venv with it")
    return parser


@torch.inference_mode()
def main() -> int:
    """0 when Headwater's ops were measured; llama.cpp may be absent."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    try:
        files = resolve(options.model, console=Console(stderr=True))
        native = NativeOps(options.threads)
        text = options.text.read_text()
    except (HubError, NoKernels, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids[: options.tokens]
    pieces = windows(token_ids)
    if not pieces:
        print("quality: the text has fewer than two tokens", file=sys.stderr)
        return 1
    others = {"headwater": logits_of(files, native)}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if options.llama_cpp_python is None:
            absent["llama.cpp"] = "not given (--llama-cpp-python PATH)"
        else:
            peer = llama_cpp_logits(options.llama_cpp_python, files.weights[0], options.threads)
            try:
                others["llama.cpp"] = stack.enter_context(peer)
            except OSError as error:
                absent["llama.cpp"] = str(error)
        found, seconds = measure(pieces, logits_of(files, ReferenceOps()), others)
    counted = found["reference"].count
    result = report(found, f"{files.name}: {counted} tokens of {options.text.name}")
    for name, reason in absent.items():
        print(f"{name} is absent: {reason}")
    document = {
        "benchmark": "quality",
        "model": files.name,
        "fingerprint": files.fingerprint,
        "ops": native.id,
        "threads": options.threads,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": WINDOW,
        "tokens": counted,
        "results": result,
        "absent": absent,
        "seconds": {name: round(taken, 2) for name, taken in seconds.items()},
    }
    print(json.dumps(document | origin()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
