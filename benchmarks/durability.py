"""What durable logging costs: 16 streams whose log is stored against 16 whose log is not.

    python benchmarks/durability.py

Three kinds of streams alternate against one server, on the same prompts: plain chat completions
(nothing is stored), the same with `resumable: true` (prompt, tokens and end are stored), and turns
of sessions (those and the turns). Tokens/s are over the time in which all streams decode: from the
last first token to the first last one. A table, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.peers import HEADWATER, Work, find_program
from benchmarks.running import started
from model.hub import resolve
from server.bench.origin import origin

STREAMS = 16
NUM_TOKENS = 160
ROUNDS = 9
KINDS = ("plain", "resumable", "session")


async def stream(client: httpx.AsyncClient, kind: str, number: int) -> list[float]:
    """When the tokens of one answer came."""
    text = f"Tell me story number {number} of the river and the {number + 3} stones."
    body: dict[str, Any] = {
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    if kind == "session":
        session = (await client.post("/v1/sessions", json={})).json()["id"]
        path, body = f"/v1/sessions/{session}/turns", body | {"input": text}
    else:
        path = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": text}], "resumable": kind != "plain"}
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        return [
            time.perf_counter()
            async for line in response.aiter_lines()
            if line.startswith("data: {") and ('"content":"' in line or '"token_ids"' in line)
        ]


async def round_of(url: str, kind: str, number: int) -> float:
    """Tokens/s of STREAMS streams together."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        first = number * STREAMS
        streams = await asyncio.gather(*(stream(client, kind, first + i) for i in range(STREAMS)))
    start = max(s[1] for s in streams)
    end = min(s[-1] for s in streams)
    return sum(sum(start < at <= end for at in s) for s in streams) / (end - start)


def main() -> int:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    files = resolve("smollm2-135m")
    work = Work(files.weights[0], lambda: files.folder, os.cpu_count() or 1)
    with started(HEADWATER, find_program(HEADWATER, None), work) as server:
        url = server.url
        asyncio.run(round_of(url, "plain", 0))  # warm
        for number in range(rounds):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                rates[kind].append(asyncio.run(round_of(url, kind, number + 1)))
    table = Table(title=f"{STREAMS} streams, median of {rounds} alternating rounds")
    for column in ("streams", "tokens/s", "against plain"):
        table.add_column(column, justify="right")
    ratios = {
        kind: statistics.median(a / b for a, b in zip(rates[kind], rates["plain"], strict=True))
        for kind in KINDS
    }
    for kind in KINDS:
        table.add_row(kind, f"{statistics.median(rates[kind]):.1f}", f"{ratios[kind]:.3f}")
    Console().print(table)
    document = {"benchmark": "durability", "streams": STREAMS, "tokens": NUM_TOKENS}
    print(json.dumps(document | {"tokens_per_s": rates, "against_plain": ratios} | origin()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
