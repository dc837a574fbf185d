"""Times of single requests -> percentiles of a level -> a table and one JSON document."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from server.bench.origin import origin

if TYPE_CHECKING:
    from rich.console import Console

    from server.bench import LoadSpec


@dataclass
class RequestTiming:
    """One request as it was seen. Times in seconds of `time.perf_counter`. `arrivals` has the time
    of each delta with text in it, `pieces` their texts; token numbers are the server's (`usage`),
    None when it sent none. `error` is a code, None when the request ended well."""

    turn: int
    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def text(self) -> str:
        """What the model said."""
        return "".join(self.pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: the server's number, else the deltas with text."""
        return self.completion_tokens if self.completion_tokens is not None else len(self.arrivals)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first delta, by the time from it to the last delta."""
        if len(self.arrivals) < 2 or self.arrivals[-1] <= self.arrivals[0]:
            return None
        first = self.num_tokens / len(self.arrivals)  # tokens that came with the first delta
        return (self.num_tokens - first) / (self.arrivals[-1] - self.arrivals[0])


class Percentiles(msgspec.Struct, frozen=True):
    """In milliseconds."""

    p50: float
    p90: float
    p99: float


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One concurrency. Times in ms, None when nothing was measured. All but `errors` and
    `num_requests` is about the requests that ended well.

    `ttft`: from sending to the first text. `inter_token`: between deltas with text, of all streams.
    `latency`: from sending to the end. `tokens_per_s_stream`: the median stream after its first
    delta; `tokens_per_s`: all tokens by the level's `seconds`. `tokens_from`: "usage" (the server
    counted), "deltas" (it did not: one delta is taken for one token), "both". `cached_tokens` is
    None when the server says nothing of it."""

    concurrency: int
    num_requests: int
    num_ok: int
    errors: dict[str, int]
    seconds: float
    ttft: Percentiles | None
    ttft_by_turn: list[Percentiles | None]
    inter_token: Percentiles | None
    latency: Percentiles | None
    tokens_per_s_stream: float | None
    tokens_per_s: float
    prompt_tokens: int | None
    completion_tokens: int
    cached_tokens: int | None
    tokens_from: str
    tokens_per_delta: float | None


class LoadResult(msgspec.Struct, frozen=True):
    """What was asked (without the key) and what came of it, level by level."""

    spec: LoadSpec
    levels: list[Level]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending numbers, interpolated linearly between the two nearest ranks (as numpy does)."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _percentiles(seconds: Iterable[float]) -> Percentiles | None:
    ordered = sorted(seconds)
    if not ordered:
        return None
    p50, p90, p99 = (round(percentile(ordered, q) * 1000, 3) for q in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99)


def summarise(concurrency: int, timings: list[RequestTiming], seconds: float) -> Level:
    """The level's numbers from its requests, which took `seconds` together."""
    good = [one for one in timings if one.error is None]
    spoken = [one for one in good if one.arrivals]
    first = {id(one): one.arrivals[0] - one.started for one in spoken}
    turns = max((one.turn for one in timings), default=0) + 1
    gaps = [b - a for one in good for a, b in zip(one.arrivals, one.arrivals[1:], strict=False)]
    rates = sorted(rate for one in good if (rate := one.tokens_per_s) is not None)
    tokens = sum(one.num_tokens for one in good)
    deltas = sum(len(one.arrivals) for one in good)
    counted = {one.completion_tokens is not None for one in good}
    return Level(
        concurrency=concurrency,
        num_requests=len(timings),
        num_ok=len(good),
        errors=dict(Counter(one.error for one in timings if one.error is not None)),
        seconds=round(seconds, 4),
        ttft=_percentiles(first.values()),
        ttft_by_turn=[
            _percentiles(first[id(one)] for one in spoken if one.turn == turn)
            for turn in range(turns)
        ],
        inter_token=_percentiles(gaps),
        latency=_percentiles(one.ended - one.started for one in good),
        tokens_per_s_stream=round(percentile(rates, 0.5), 2) if rates else None,
        tokens_per_s=round(tokens / seconds, 2) if seconds > 0 else 0.0,
        prompt_tokens=_total(one.prompt_tokens for one in good),
        completion_tokens=tokens,
        cached_tokens=_total(one.cached_tokens for one in good),
        tokens_from="both" if len(counted) > 1 else "usage" if True in counted else "deltas",
        tokens_per_delta=round(tokens / deltas, 3) if deltas else None,
    )


def _total(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def as_json(result: LoadResult, *, secret: str | None = None) -> str:
    """One line of JSON: the result with the machine, the commit and the command it comes from.
    `secret` (the API key) is taken out of the command."""
    document: dict[str, Any] = {"benchmark": "serve", **msgspec.to_builtins(result)}
    return msgspec.json.encode(document | origin(secret)).decode()


def print_table(result: LoadResult, console: Console | None = None) -> None:
    """The result for people; on stdout unless another console is given."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    console = console or RichConsole()
    spec = result.spec
    lengths = ", ".join(map(str, spec.prompt_tokens))
    table = Table(
        title=f"{spec.model} at {spec.url}: ~{lengths} prompt tokens, up to {spec.max_tokens} new"
        + (f", {spec.turns} turns" if spec.turns > 1 else ""),
        caption="times in ms: p50 / p90 / p99",
    )
    for title in ("streams", "ok", "TTFT", "inter-token", "latency", "tok/s a stream", "tok/s"):
        table.add_column(title, justify="right")
    table.add_column("cached", justify="right")
    for level in result.levels:
        table.add_row(
            str(level.concurrency),
            f"{level.num_ok}/{level.num_requests}",
            _triple(level.ttft),
            _triple(level.inter_token),
            _triple(level.latency),
            "-" if level.tokens_per_s_stream is None else f"{level.tokens_per_s_stream:.1f}",
            f"{level.tokens_per_s:.1f}",
            _cached(level),
        )
    console.print(table)
    for level in result.levels:
        for note in _notes(level):
            console.print(f"{level.concurrency} streams: {note}", markup=False)


def _triple(times: Percentiles | None) -> str:
    if times is None:
        return "-"
    return " / ".join(
        f"{t:.1f}" if t < 100 else f"{t:.0f}" for t in (times.p50, times.p90, times.p99)
    )


def _cached(level: Level) -> str:
    if level.cached_tokens is None or not level.prompt_tokens:
        return "-"
    return f"{100 * level.cached_tokens / level.prompt_tokens:.0f}%"


def _notes(level: Level) -> list[str]:
    """What a reader has to know to read the numbers rightly."""
    notes = [f"{count} failed with {code}" for code, count in sorted(level.errors.items())]
    if level.num_ok and level.tokens_from != "usage":
        notes.append("the server sent no usage (or not always): deltas were counted as tokens")
    elif level.tokens_per_delta is not None and level.tokens_per_delta > 1.05:
        notes.append(
            f"a delta carries {level.tokens_per_delta:.2f} tokens on average, so inter-token times "
            "are times between deltas"
        )
    if len(level.ttft_by_turn) > 1:
        by_turn = ", ".join("-" if t is None else f"{t.p50:.1f}" for t in level.ttft_by_turn)
        notes.append(f"TTFT p50 by turn, in ms: {by_turn}")
    return notes
