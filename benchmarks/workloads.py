"""The work that every server gets: prompts, streams, and the numbers that are read off them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from benchmarks.running import Server
from server.bench.prompts import Prompts
from server.bench.report import RequestTiming, percentile
from server.bench.stream import read_stream

_TIMEOUT = 180.0
_FOUND_TOKENS = 16  # a first word may be shared by chance, a block may not
SHORT, LONG = 100, 4000  # prompt tokens of a short and of a long stream


class WorkloadError(Exception):
    """A server did not do the work; the message says what it did."""


@dataclass(frozen=True)
class Metric:
    """A number that a workload gives: what it is, in which unit, and which way is better."""

    title: str
    unit: str
    higher_is_better: bool


class Workload(Protocol):
    """`run` is given prompts that no server has seen, and returns a value for each metric it could
    measure. `streams` is how many answers it wants at once."""

    @property
    def streams(self) -> int: ...

    @property
    def rounds(self) -> int: ...

    @property
    def metrics(self) -> dict[str, Metric]: ...

    async def run(self, client: Client, seed: int) -> dict[str, float]: ...


class Client:
    """Completions of one server. `count` gives the number of tokens of a prompt."""

    def __init__(self, server: Server, count: Callable[[str], int]) -> None:
        self._server = server
        self.count = count

    async def stream(self, prompt: str, max_tokens: int, timing: RequestTiming) -> RequestTiming:
        """One greedy stream, noted in `timing` as it comes. Raises WorkloadError."""
        body: dict[str, Any] = {
            "model": self._server.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._server.peer.body,
        }
        url = f"{self._server.url}/v1/completions"
        await read_stream(url, msgspec.json.encode(body), {}, timing, _TIMEOUT)
        if timing.error is not None:
            raise WorkloadError(f"a request failed with {timing.error}")
        if not timing.arrivals:
            raise WorkloadError("a request was answered without any text")
        if (timing.cached_tokens or 0) > _FOUND_TOKENS:
            raise WorkloadError(f"it found {timing.cached_tokens} tokens of a prompt in its cache")
        return timing

    async def complete(self, prompt: str, max_tokens: int) -> RequestTiming:
        """One greedy stream, when it is over. Raises WorkloadError."""
        return await self.stream(prompt, max_tokens, _timing())


def _timing() -> RequestTiming:
    return RequestTiming(turn=0, started=0.0)


def tokens_per_delta(timing: RequestTiming) -> float:
    return timing.num_tokens / len(timing.arrivals) if timing.arrivals else 1.0


def common_rate(timings: Sequence[RequestTiming]) -> float | None:
    """Tokens per second of all streams together while all of them decode: from the last stream's
    first token to the first stream's last one. None when less than a fifth of all tokens come in
    that time: the server does not run the streams side by side, and the rest would be chance."""
    start = max(one.arrivals[0] for one in timings)
    end = min(one.arrivals[-1] for one in timings)
    if end <= start:
        return None
    tokens = sum(
        tokens_per_delta(one) * sum(start < at <= end for at in one.arrivals) for one in timings
    )
    if 5 * tokens < sum(one.num_tokens for one in timings):
        return None
    return tokens / (end - start)


def gaps_within(arrivals: Sequence[float], start: float, end: float) -> list[float]:
    """The times between neighbours that lie in or reach into start .. end."""
    pairs = itertools.pairwise(arrivals)
    return [b - a for a, b in pairs if b > start and a < end]


def inter_token_ms(timing: RequestTiming) -> float:
    """The mean time between tokens of one stream, in ms: several may have come in one read."""
    rate = timing.tokens_per_s
    if rate is None:
        raise WorkloadError("a stream's tokens came all at once")
    return 1000 / rate


@dataclass(frozen=True)
class Decode:
    """So many streams at once, `tokens` each after a short prompt."""

    streams: int
    tokens: int = 128
    rounds: int = 3

    @property
    def metrics(self) -> dict[str, Metric]:
        n = self.streams
        many = f"{n} streams" if n > 1 else "1 stream"
        found = {f"decode_{n}": Metric(f"decode, {many}", "tokens/s", True)}
        if n > 1:
            whole = Metric(f"{many}, prefill and all", "tokens/s", True)
            found[f"throughput_{n}"] = whole
        return found

    async def run(self, client: Client, seed: int) -> dict[str, float]:
        prompts = Prompts(seed, [SHORT])
        work = [client.complete(prompts.message(i, 0), self.tokens) for i in range(self.streams)]
        timings = await asyncio.gather(*work)
        seconds = max(one.ended for one in timings) - min(one.started for one in timings)
        found = {}
        rate = common_rate(timings)
        if rate is not None:
            found[f"decode_{self.streams}"] = rate
        if self.streams > 1:
            tokens = sum(one.num_tokens for one in timings)
            found[f"throughput_{self.streams}"] = tokens / seconds
        return found


@dataclass(frozen=True)
class Prefill:
    """One long prompt on an idle server: its tokens by the time to the first token."""

    prompt_tokens: int = 2000
    rounds: int = 3
    streams: int = 1

    @property
    def metrics(self) -> dict[str, Metric]:
        return {"prefill": Metric(f"prefill of {self.prompt_tokens} tokens", "tokens/s", True)}

    async def run(self, client: Client, seed: int) -> dict[str, float]:
        prompt = Prompts(seed, [self.prompt_tokens]).message(0, 0)
        timing = await client.complete(prompt, 4)
        return {"prefill": client.count(prompt) / (timing.arrivals[0] - timing.started)}


@dataclass(frozen=True)
class Interference:
    """Streams that decode while a long prompt is computed beside them."""

    streams: int = 8
    prompt_tokens: int = LONG
    rounds: int = 3
    room: int = 2000  # tokens of a stream, more than it gets: it is ended, not waited for

    @property
    def metrics(self) -> dict[str, Metric]:
        beside = f"beside a prefill of {self.prompt_tokens}"
        return {
            "interference_p99": Metric(f"p99 inter-token, {self.streams} {beside}", "ms", False),
            "interference_ttft": Metric(
                f"TTFT of that prefill of {self.prompt_tokens}", "s", False
            ),
        }

    async def run(self, client: Client, seed: int) -> dict[str, float]:
        prompts = Prompts(seed, [SHORT])
        timings = [_timing() for _ in range(self.streams)]
        work = [
            asyncio.ensure_future(client.stream(prompts.message(i, 0), self.room, timing))
            for i, timing in enumerate(timings)
        ]
        try:
            while min(len(one.arrivals) for one in timings) < 4:
                await _either(work, asyncio.sleep(0.005))
            # A conversation number beyond theirs: it begins unlike them.
            prompt = Prompts(seed, [self.prompt_tokens]).message(self.streams, 0)
            # Some tokens more than one, so that the others' gaps at its first token are closed.
            late = await client.complete(prompt, 8)
        finally:
            for one in work:
                one.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        first = late.arrivals[0]
        gaps = sorted(g for one in timings for g in gaps_within(one.arrivals, late.started, first))
        if not gaps:
            raise WorkloadError("the streams ended before the long prompt was computed")
        return {
            "interference_p99": 1000 * percentile(gaps, 0.99),
            "interference_ttft": first - late.started,
        }


async def _either(work: Sequence[asyncio.Future[RequestTiming]], wait: Any) -> None:
    """Waits, unless one of the streams has failed or ended already."""
    await wait
    for one in work:
        if one.done():
            one.result()  # raises what it failed with
            raise WorkloadError("a stream ended before the measurement began")


@dataclass(frozen=True)
class Growth:
    """The time between tokens of one stream, early in its context and late."""

    tokens: int = 64
    prompt_tokens: int = LONG
    rounds: int = 3
    streams: int = 1

    @property
    def metrics(self) -> dict[str, Metric]:
        return {
            "inter_token_short": Metric(f"inter-token at {SHORT} tokens", "ms", False),
            "inter_token_long": Metric(f"inter-token at {self.prompt_tokens} tokens", "ms", False),
        }

    async def run(self, client: Client, seed: int) -> dict[str, float]:
        prompts = Prompts(seed, [SHORT, self.prompt_tokens])
        short = await client.complete(prompts.message(0, 0), self.tokens)
        long = await client.complete(prompts.message(1, 0), self.tokens)
        return {
            "inter_token_short": inter_token_ms(short),
            "inter_token_long": inter_token_ms(long),
        }


def workloads(*, quick: bool) -> list[Workload]:
    """All of them; `quick` is a smoke run whose numbers say little."""
    if quick:
        return [
            Decode(1, 32, rounds=1),
            Decode(4, 32, rounds=1),
            Decode(16, 32, rounds=1),
            Prefill(500, rounds=1),
            Interference(8, 1000, rounds=1),
            Growth(16, 1000, rounds=1),
        ]
    return [
        Decode(1, rounds=5),
        Decode(4),
        Decode(16),
        Decode(32),
        Prefill(),
        Interference(),
        Growth(),
    ]
