"""What the KV cache is worth: the same tokens with it and without it, in one process.

    python benchmarks/kv_cache.py

With the cache each step computes one new token; without it each step computes the whole sequence
again. Both run the same decoder, ops and weights, greedily, and must draw the same tokens. Times
are the sums of the forward passes (decoder and LM head); nothing else is in them. The result is the
median of several runs that take turns; a table, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from model.attention import AttentionMetadata
from model.decoder import Decoder
from model.engine.threads import usable_cores
from model.hub import DEFAULT_MODEL, HubError, resolve
from model.kv import KVCache
from model.ops.base import Ops
from model.ops.native import NativeOps
from model.ops.reference import ReferenceOps
from model.weights.load import load_weights
from server.bench.origin import origin

_BLOCK_SIZE = 16
_TEXT = (
    "A river begins high in the mountains, where rain and melting snow gather in small streams. "
    "The streams meet, the valley widens, and the water slows. Towns grew along its banks because "
    "people needed to drink, to travel and to turn their mills. "
)


class Sequence:
    """One sequence alone in a KV cache of its own."""

    def __init__(self, decoder: Decoder, ops: Ops, max_len: int) -> None:
        num_blocks = -(-max_len // _BLOCK_SIZE)
        self._decoder = decoder
        self._device = ops.device
        self._kv = KVCache(decoder.config, num_blocks, _BLOCK_SIZE, ops)
        self._blocks = torch.arange(num_blocks, device=ops.device)[None]

    def next_token(self, token_ids: list[int], start: int) -> tuple[int, float]:
        """Computes `token_ids[start:]`, with the keys before `start` in the cache. Returns the most
        probable next token and the seconds of the forward pass."""
        count = len(token_ids) - start
        positions = torch.arange(start, len(token_ids), device=self._device)
        meta = AttentionMetadata(
            positions=positions,
            slot_mapping=positions,  # block i of the table is block i of the cache
            block_tables=self._blocks,
            query_start=[0, count],
            seq_lens=[len(token_ids)],
        )
        ids = torch.tensor(token_ids[start:], device=self._device)
        self._synchronize()
        begun = time.perf_counter()
        hidden = self._decoder.forward(ids, self._kv, meta)
        logits = self._decoder.logits(hidden[-1:])
        self._synchronize()
        seconds = time.perf_counter() - begun
        return int(logits[0].argmax()), seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def generate(
    sequence: Sequence, prompt: list[int], count: int, *, cached: bool
) -> tuple[list[int], float]:
    """`count` greedy tokens after the prompt, and the seconds of all forward passes."""
    token_ids = list(prompt)
    total = 0.0
    computed = 0
    for _ in range(count):
        token, seconds = sequence.next_token(token_ids, computed if cached else 0)
        computed = len(token_ids)
        token_ids.append(token)
        total += seconds
    return token_ids[len(prompt) :], total


def measure(
    sequence: Sequence, prompt: list[int], count: int, runs: int
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each run with and without the cache, and whether all drew the same tokens."""
    for cached in (True, False):  # warm-up: kernels, allocator, clock speed
        generate(sequence, prompt, min(count, 8), cached=cached)
    seconds: dict[str, list[float]] = {"with_cache": [], "without_cache": []}
    drawn: set[tuple[int, ...]] = set()
    progress = Console(stderr=True)
    for run in range(1, runs + 1):
        for name, cached in (("with_cache", True), ("without_cache", False)):
            tokens, taken = generate(sequence, prompt, count, cached=cached)
            seconds[name].append(taken)
            drawn.add(tuple(tokens))
            progress.print(f"run {run} of {runs}, {name.replace('_', ' ')}: {taken:.2f} s")
    return seconds, len(drawn) == 1


def report(seconds: dict[str, list[float]], count: int, title: str) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON document."""
    table = Table(title=title, caption="median of the runs; forward passes only")
    for column in ("", "seconds", "min - max", "tokens/s"):
        table.add_column(column, justify="right")
    result: dict[str, Any] = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        result[name] = {
            "seconds": round(median, 4),
            "tokens_per_s": round(count / median, 2),
            "runs": [round(one, 4) for one in times],
        }
        spread = f"{min(times):.3f} - {max(times):.3f}"
        table.add_row(
            name.replace("_", " "), f"{median:.3f}", spread, f"{result[name]['tokens_per_s']:.1f}"
        )
    ratio = result["without_cache"]["seconds"] / result["with_cache"]["seconds"]
    result["speedup"] = round(ratio, 2)
    console = Console()
    console.print(table)
    console.print(f"the KV cache makes it {ratio:.1f} times faster")
    return result


def main() -> int:
    """0 when both ways drew the same tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--ops", choices=("native", "reference"), default="native")
    options = parser.parse_args()
    if min(options.prompt_tokens, options.tokens, options.runs) < 1:
        parser.error("--prompt-tokens, --tokens and --runs must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        files = resolve(options.model, console=Console(stderr=True))
    except HubError as error:
        print(f"kv_cache: {error}", file=sys.stderr)
        return 1
    max_len = options.prompt_tokens + options.tokens
    if max_len > files.config.max_position_embeddings:
        parser.error(f"the model has {files.config.max_position_embeddings} positions")
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    repeats = options.prompt_tokens // 40 + 1  # the text has more tokens than that
    prompt = tokenizer.encode(_TEXT * repeats, add_special_tokens=False).ids
    prompt = prompt[: options.prompt_tokens]
    ops: Ops = ReferenceOps(options.device)
    if options.ops == "native":
        ops = NativeOps(options.threads or usable_cores())
    decoder = Decoder(files.config, load_weights(files.weights, files.config, ops), ops)
    sequence = Sequence(decoder, ops, max_len)
    seconds, equal = measure(sequence, prompt, options.tokens, options.runs)
    title = f"{files.name}: {options.tokens} tokens after {len(prompt)}, {ops.id}"
    document = {
        "benchmark": "kv_cache",
        "model": files.name,
        "fingerprint": files.fingerprint,
        "ops": ops.id,
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(prompt),
        "tokens": options.tokens,
        **report(seconds, options.tokens, title),
        "tokens_equal": equal,
    }
    if not equal:
        print("kv_cache: the two ways drew different tokens", file=sys.stderr)
    print(json.dumps(document | origin()))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
