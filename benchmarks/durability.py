"""What durable logging costs: 16 streams whose log is stored against 16 whose log is not.

    python -m benchmarks.durability

Three kinds of streams alternate against one server: plain chat completions (nothing is stored),
the same with `resumable: true` (prompt, tokens and end are stored), and turns of sessions (those
and the turns). Prompts are of one length, and no two are the same. All streams of a round begin at
once, and the time is from the first request to the last byte: it includes the prompts, the commit
before a stream's first byte, and the one before its end. Tokens are those that the server says it
made.
A table, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
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
ROUNDS = 10
KINDS = ("plain", "resumable", "session")


async def request(client: httpx.AsyncClient, kind: str, number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a stream; its session is made here, outside the measured time."""
    text = f"Tell me story number {10_000 + number} of the river and its stones."
    body: dict[str, Any] = {
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    if kind == "session":
        session = (await client.post("/v1/sessions", json={})).json()["id"]
        return f"/v1/sessions/{session}/turns", body | {"input": text}
    return "/v1/chat/completions", body | {
        "messages": [{"role": "user", "content": text}],
        "stream_options": {"include_usage": True},
        "resumable": kind == "resumable",
    }


async def num_tokens(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> int:
    """How many tokens the stream's answer had, read to the end."""
    usage = None
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if '"usage":{' in line:
                usage = json.loads(line.removeprefix("data: "))["usage"]
    if usage is None:
        raise RuntimeError(f"a stream of {path} ended without its usage")
    return int(usage["completion_tokens"])


async def round_of(url: str, kind: str, number: int) -> float:
    """Tokens/s of STREAMS streams together."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        first = number * STREAMS
        requests = [await request(client, kind, first + i) for i in range(STREAMS)]
        begun = time.perf_counter()
        counts = await asyncio.gather(*(num_tokens(client, *each) for each in requests))
        return sum(counts) / (time.perf_counter() - begun)


def summary(values: list[float]) -> dict[str, float]:
    """Median, the quartiles around it, and the extremes."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": median,
        "low_quartile": low,
        "high_quartile": high,
        "lowest": min(values),
        "highest": max(values),
    }


def shown(values: dict[str, float], digits: int) -> tuple[str, str]:
    """The median, and how far the rounds scatter, for a table."""
    median, *rest = (f"{value:.{digits}f}" for value in values.values())
    return median, "{} to {} ({} to {})".format(*rest)


def main() -> int:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each kind [{ROUNDS}]")
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error("--rounds must be 2 or more: one round says nothing of how they scatter")
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    files = resolve("smollm2-135m")
    work = Work(files.weights[0], lambda: files.folder, os.cpu_count() or 1)
    with started(HEADWATER, find_program(HEADWATER, None), work) as server:
        done = itertools.count()
        for kind in KINDS:
            asyncio.run(round_of(server.url, kind, next(done)))  # warm
        for number in range(rounds):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                rates[kind].append(asyncio.run(round_of(server.url, kind, next(done))))
    tokens_per_s = {kind: summary(rates[kind]) for kind in KINDS}
    ratios = {
        kind: summary([a / b for a, b in zip(rates[kind], rates["plain"], strict=True)])
        for kind in KINDS
    }
    table = Table(title=f"{STREAMS} streams, {rounds} rounds in turn: median, quartiles (extremes)")
    for column in ("streams", "tokens/s", "scatter", "against plain", "scatter"):
        table.add_column(column, justify="right")
    for kind in KINDS:
        table.add_row(kind, *shown(tokens_per_s[kind], 1), *shown(ratios[kind], 3))
    Console().print(table)
    document = {"benchmark": "durability", "streams": STREAMS, "tokens": NUM_TOKENS}
    document |= {"tokens_per_s": tokens_per_s, "against_plain": ratios, "rounds": rates}
    print(json.dumps(document | origin()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
