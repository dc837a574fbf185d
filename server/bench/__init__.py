"""The load generator: streams of an OpenAI-compatible server, timed token by token.

It works against any such server. It shares the machine with the server it measures, so all but
reading the streams waits until the load is over.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import msgspec

from server.bench.prompts import Prompts
from server.bench.report import (
    Level,
    LoadResult,
    RequestTiming,
    as_json,
    print_table,
    summarise,
)
from server.bench.stream import read_stream

__all__ = ["BenchError", "LoadResult", "LoadSpec", "as_json", "main", "print_table", "run_load"]


class BenchError(Exception):
    """The load cannot be run at all; one line says why and what to do."""


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. Each level of `concurrency` runs `num_requests` conversations (None: four for
    each stream) of `turns` requests each, so many of them at once. `prompt_tokens` is the length of
    each user message, or several lengths taken in turn; lengths are approximate, the answer says
    the true ones. `shared_prefix` tokens come first in every prompt and are equal in all; otherwise
    no two prompts begin alike. `warmup` conversations run first and are not counted. `model` None
    asks the server. `timeout`: seconds without a byte. Raises ValueError for what cannot be run."""

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: tuple[int, ...] = (1, 4, 16)
    num_requests: int | None = None
    prompt_tokens: tuple[int, ...] = (128,)
    max_tokens: int = 128
    turns: int = 1
    temperature: float = 0.0
    seed: int = 0
    warmup: int = 1
    ignore_eos: bool = False
    shared_prefix: int = 0
    endpoint: Literal["chat", "completions"] = "chat"
    timeout: float = 300.0

    def __post_init__(self) -> None:
        counts = {
            "concurrency": min(self.concurrency, default=0),
            "num_requests": 1 if self.num_requests is None else self.num_requests,
            "prompt_tokens": min(self.prompt_tokens, default=0),
            "max_tokens": self.max_tokens,
            "turns": self.turns,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.warmup < 0 or self.shared_prefix < 0 or self.timeout <= 0:
            raise ValueError("warmup and shared_prefix cannot be negative, timeout must be above 0")
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url must begin with http:// or https://, not {self.url!r}")


def main(
    *,
    url: str,
    concurrency: Sequence[int] = (1, 4, 16),
    prompt_tokens: int | Sequence[int] = 128,
    api_key: str | None = None,
    **options: Any,
) -> int:
    """Runs the load and prints the table, then the JSON as the last line; the other options are
    LoadSpec's. The key is HEADWATER_API_KEY unless given. Returns the exit code: 0, 1 when a
    request failed, 2 for wrong use, 130 when interrupted."""
    lengths = (prompt_tokens,) if isinstance(prompt_tokens, int) else tuple(prompt_tokens)
    api_key = api_key or os.environ.get("HEADWATER_API_KEY")
    try:
        spec = LoadSpec(
            url=url,
            concurrency=tuple(concurrency),
            prompt_tokens=lengths,
            api_key=api_key,
            **options,
        )
        result = asyncio.run(run_load(spec))
    except (ValueError, BenchError) as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
    print_table(result)
    sys.stdout.write(as_json(result, secret=api_key) + "\n")
    return 1 if any(level.errors for level in result.levels) else 0


async def run_load(spec: LoadSpec) -> LoadResult:
    """Runs every level after the other. Failed requests are counted, not raised.

    Raises BenchError when the server cannot be reached at all."""
    base = spec.url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
    model = spec.model or await _served_model(f"{base}/v1/models", headers)
    spec = msgspec.structs.replace(spec, model=model)
    prompts = Prompts(spec.seed, spec.prompt_tokens, spec.shared_prefix)
    numbers = itertools.count()
    load = _Load(base, headers, spec, prompts)
    if spec.warmup:
        await load.run(min(spec.warmup, spec.concurrency[0]), spec.warmup, numbers)
    levels: list[Level] = []
    for concurrency in spec.concurrency:
        started = time.perf_counter()
        timings = await load.run(concurrency, spec.num_requests or 4 * concurrency, numbers)
        seconds = time.perf_counter() - started
        levels.append(summarise(concurrency, timings, seconds))
    return LoadResult(spec=msgspec.structs.replace(spec, api_key=None), levels=levels)


async def _served_model(where: str, headers: dict[str, str]) -> str:
    try:
        async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
            answer = await client.get(where)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise BenchError(
            f"{where} answered {error.response.status_code}; name the model, or give the API key"
        ) from error
    except httpx.HTTPError as error:
        raise BenchError(
            f"no server answers at {where} ({type(error).__name__}); start it, or check the address"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{where} lists no model; name the one to load") from error


class _Load:
    """Conversations against one server."""

    def __init__(
        self, base: str, headers: dict[str, str], spec: LoadSpec, prompts: Prompts
    ) -> None:
        path = "/v1/chat/completions" if spec.endpoint == "chat" else "/v1/completions"
        self._url = base + path
        self._headers = headers
        self._spec = spec
        self._prompts = prompts

    async def run(
        self, concurrency: int, num_conversations: int, numbers: Iterator[int]
    ) -> list[RequestTiming]:
        """`concurrency` workers share `num_conversations`; a worker starts the next one when its
        last has ended (a closed loop)."""
        waiting = iter([next(numbers) for _ in range(num_conversations)])
        timings: list[RequestTiming] = []

        async def worker() -> None:
            for number in waiting:
                await self._converse(number, timings)

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, num_conversations)):
                workers.create_task(worker())
        return timings

    async def _converse(self, number: int, timings: list[RequestTiming]) -> None:
        history: list[dict[str, str]] = []
        text = ""
        for turn in range(self._spec.turns):
            said = self._prompts.message(number, turn)
            if self._spec.endpoint == "chat":
                history.append({"role": "user", "content": said})
                timing = await self._request(turn, {"messages": history})
                history.append({"role": "assistant", "content": timing.text})
            else:
                text += f" {said}" if turn else said
                timing = await self._request(turn, {"prompt": text})
                text += timing.text
            timings.append(timing)
            if timing.error is not None:
                return  # later turns would not have the history they are meant to have

    async def _request(self, turn: int, prompt: dict[str, Any]) -> RequestTiming:
        spec = self._spec
        body: dict[str, Any] = {
            "model": spec.model,
            **prompt,
            "max_tokens": spec.max_tokens,
            "temperature": spec.temperature,
            "seed": spec.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if spec.ignore_eos:  # not OpenAI's: only sent when it is asked for
            body["ignore_eos"] = True
        timing = RequestTiming(turn=turn, started=0.0)
        content = msgspec.json.encode(body)
        await read_stream(self._url, content, self._headers, timing, spec.timeout)
        if timing.error is None and not timing.finished:
            timing.error = "stream_cut"
        return timing
