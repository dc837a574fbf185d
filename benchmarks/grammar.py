"""What a grammar costs: 16 streams with a JSON schema against the same without one.

    python -m benchmarks.grammar

One server with the default model. Rounds with and without alternate, since only ratios within a
run mean anything on a shared machine; each stream makes the same number of tokens, at temperature
1. Then what the first use of a schema under 4 KiB costs (it is tried in a process of its own, and
compiled): the same request, one token long, twice.
A table, then JSON as the last line.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.generate import MODEL, serve
from server.bench.origin import origin

STREAMS = 16
NUM_TOKENS = 128
ROUNDS = 6
NUM_FIRST_USES = 20


def schema(index: int, num_fields: int = 3) -> dict[str, Any]:
    """An array that no answer comes to the end of; each index is a schema of its own."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 10_000 + index},
        {"enum": ["red", "green", "blue"]},
    ]
    fields = {f"field{index}_{i}": kinds[i % len(kinds)] for i in range(num_fields)}
    item = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 100, "maxItems": 200}


def body(index: int, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"List {100 + index} things as JSON."}],
        "temperature": 1,
        "seed": index,
        **fields,
    }


def wanted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "things", "schema": schema}}


async def level(url: str, *, with_schema: bool) -> float:
    """Tokens/s of all streams together."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(index: int) -> int:
            format_ = {"response_format": wanted(schema(index % 4))} if with_schema else {}
            request = body(
                index,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                stream=True,
                stream_options={"include_usage": True},
                **format_,
            )
            last = ""
            async with http.stream("POST", "/v1/chat/completions", json=request) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        last = line
            return int(json.loads(last[6:])["usage"]["completion_tokens"])

        started = time.perf_counter()
        counts = await asyncio.gather(*(one(index) for index in range(STREAMS)))
        if set(counts) != {NUM_TOKENS}:
            raise SystemExit(f"an answer ended early: {counts}")
        return sum(counts) / (time.perf_counter() - started)


def first_uses(url: str) -> list[float]:
    """Seconds that the first use of a schema takes longer than the second. Its prompt was answered
    before, so that neither computes it."""
    seconds = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for index in range(NUM_FIRST_USES):
            new = schema(1000 + index, num_fields=52)
            if len(json.dumps(new)) > 4096:
                raise SystemExit(f"the schema has {len(json.dumps(new))} bytes")
            plain = body(index, max_tokens=1)
            asked = {**plain, "response_format": wanted(new)}
            took = []
            for request in (plain, asked, asked):
                started = time.perf_counter()
                http.post("/v1/chat/completions", json=request).raise_for_status()
                took.append(time.perf_counter() - started)
            seconds.append(took[1] - took[2])
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as data:
        process, url = serve(data)
        try:
            for with_schema in (False, True):  # warm: kernels, vocabulary, schemas
                asyncio.run(level(url, with_schema=with_schema))
            rounds = []
            for i in range(ROUNDS):
                order = (False, True) if i % 2 else (True, False)
                pair = {w: asyncio.run(level(url, with_schema=w)) for w in order}
                rounds.append((pair[False], pair[True]))
            firsts = first_uses(url)
        finally:
            process.terminate()
            process.wait()
    without, with_schema = (statistics.median(column) for column in zip(*rounds, strict=True))
    cost = 1 - statistics.median(b / a for a, b in rounds)
    table = Table(title=f"{MODEL}, {STREAMS} streams over HTTP, {NUM_TOKENS} tokens each")
    for column in ("what", "tokens/s, median", "each round"):
        table.add_column(column)
    for what, value, i in (("no grammar", without, 0), ("JSON schema", with_schema, 1)):
        table.add_row(what, f"{value:.0f}", ", ".join(f"{r[i]:.0f}" for r in rounds))
    console = Console()
    console.print(table)
    console.print(f"cost {cost:.1%}, the median of the rounds' own")
    console.print(
        f"first use of a schema: median {statistics.median(firsts) * 1e3:.0f} ms, "
        f"slowest of {len(firsts)} {max(firsts) * 1e3:.0f} ms"
    )
    document = {
        **origin(),
        "without_tokens_per_s": without,
        "schema_tokens_per_s": with_schema,
        "cost": cost,
        "rounds": rounds,
        "first_use_seconds": firsts,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
