"""The load generator against a real server that speaks the wire in several dialects."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from rich.console import Console
from tokenizers import Tokenizer

from model.hub import resolve
from server.bench import BenchError, LoadResult, LoadSpec, as_json, print_table, run_load
from server.bench.prompts import Prompts
from server.bench.report import Percentiles, RequestTiming, percentile, summarise

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["One", " two", " three", " four"]
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 16},
}


def event(document: Any) -> str:
    return f"data: {json.dumps(document)}\n\n"


def delta(finish: str | None = None, **fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


class Wire:
    """The server: the first part of the path is the dialect. It keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.schedules: list[list[float]] = []  # when each text was sent, after the request's start
        self.barrier = 0
        self._waiting = 0
        self._together = asyncio.Event()
        self.most_at_once = 0

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        started = time.perf_counter()
        _, dialect, *rest = scope["path"].split("/")
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        if rest == ["v1", "models"]:
            return await self._plain(send, 200, '{"data": [{"id": "served"}]}')
        self.requests.append(("/".join(rest), headers, json.loads(body)))
        if dialect == "busy":
            error = {"error": {"message": "full", "type": "overloaded_error", "code": "queue_full"}}
            return await self._plain(send, 503, json.dumps(error))
        if dialect == "broken":
            return await self._plain(send, 500, "<h1>oops</h1>")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for piece in getattr(self, f"_{dialect}")(started):
            await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _plain(self, send: Any, status: int, text: str) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _openai(self, _: float) -> AsyncIterator[str]:
        yield ": ping\n\n" + event(delta(role="assistant", content=""))
        for word in WORDS:
            yield event(delta(content=word)) + ": ping\n\n"
        yield event(delta("stop")) + event({"choices": [], "usage": USAGE}) + "data: [DONE]\n\n"

    async def _crlf(self, _: float) -> AsyncIterator[str]:
        """No role chunk, CRLF, `event:` lines, usage null until the last chunk that has both."""
        for word in WORDS:
            chunk = delta(content=word) | {"usage": None, "error": None}
            yield "event: message\r\n" + event(chunk).replace("\n", "\r\n")
        yield event(delta("length") | {"usage": USAGE}).replace("\n", "\r\n")

    async def _bare(self, _: float) -> AsyncIterator[str]:
        """No ids, no usage, no `[DONE]`, no space after the colon."""
        for word in WORDS:
            yield event(delta(content=word)).replace("data: ", "data:")
        yield event(delta("stop", content="")).replace("data: ", "data:")

    async def _bytes(self, started: float) -> AsyncIterator[str]:
        """Frames cut anywhere."""
        whole = "".join([piece async for piece in self._openai(started)])
        for place in range(0, len(whole), 3):
            yield whole[place : place + 3]

    async def _grouped(self, _: float) -> AsyncIterator[str]:
        yield event(delta(content="One two"))
        yield event(delta("stop", content=" three four") | {"usage": USAGE})

    async def _thinking(self, _: float) -> AsyncIterator[str]:
        yield event(delta(reasoning_content="hm")) + event(delta(content="Yes"))
        yield event(delta("stop"))

    async def _text(self, _: float) -> AsyncIterator[str]:
        for word in WORDS:
            yield event({"choices": [{"text": word, "finish_reason": None}]})
        yield event({"choices": [{"text": "", "finish_reason": "stop"}], "usage": USAGE})

    async def _failing(self, _: float) -> AsyncIterator[str]:
        yield event(delta(content="One"))
        yield event({"error": {"code": "engine_crash", "message": "gone"}}) + "data: [DONE]\n\n"

    async def _cut(self, _: float) -> AsyncIterator[str]:
        yield event(delta(content="One"))

    async def _garbage(self, _: float) -> AsyncIterator[str]:
        yield "data: {nonsense\n\ndata: [DONE]\n\n"

    async def _timed(self, started: float) -> AsyncIterator[str]:
        """A model of known speed: the role at once, the first text after 60 ms, then 20 ms each."""
        schedule: list[float] = []
        self.schedules.append(schedule)
        yield event(delta(role="assistant", content=""))
        for number in range(11):
            await asyncio.sleep(0.06 if number == 0 else 0.02)
            schedule.append(time.perf_counter() - started)
            yield event(delta(content=f" {number}"))
        yield event(delta("stop")) + "data: [DONE]\n\n"

    async def _together_(self, _: float) -> AsyncIterator[str]:
        self._waiting += 1
        self.most_at_once = max(self.most_at_once, self._waiting)
        if self._waiting == self.barrier:
            self._together.set()
        await self._together.wait()
        yield event(delta("stop", content="x"))
        self._waiting -= 1


class Server:
    def __init__(self, wire: Wire, url: str) -> None:
        self.wire = wire
        self.url = url

    def load(self, dialect: str, **options: Any) -> LoadResult:
        defaults = {"concurrency": (1,), "num_requests": 3, "warmup": 0, "prompt_tokens": (20,)}
        spec = LoadSpec(url=f"{self.url}/{dialect}", **(defaults | options))
        return asyncio.run(run_load(spec))


@pytest.fixture
def server() -> Iterator[Server]:
    wire = Wire()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(wire, log_level="warning", lifespan="off", ws="none")
        instance = uvicorn.Server(config)
        thread = threading.Thread(target=instance.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Server(wire, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            instance.should_exit = True
            thread.join()


# ----------------------------------------------------------------------------------- dialects


@pytest.mark.parametrize(
    ("dialect", "tokens", "tokens_from", "cached"),
    [
        ("openai", 4, "usage", 48),
        ("crlf", 4, "usage", 48),
        ("bytes", 4, "usage", 48),
        ("bare", 4, "deltas", None),
        ("grouped", 4, "usage", 48),
        ("thinking", 2, "deltas", None),
    ],
)
def test_chat_dialects(
    server: Server, dialect: str, tokens: int, tokens_from: str, cached: int | None
) -> None:
    (level,) = server.load(dialect).levels
    assert (level.num_requests, level.num_ok, level.errors) == (3, 3, {})
    assert level.completion_tokens == 3 * tokens
    assert level.tokens_from == tokens_from
    assert level.cached_tokens == cached
    assert level.prompt_tokens == (120 if cached else None)
    assert level.tokens_per_delta == (2.0 if dialect == "grouped" else 1.0)
    assert level.ttft is not None and level.latency is not None and level.inter_token is not None
    assert 0 < level.ttft.p50 <= level.latency.p50
    # `seconds` have four decimals
    assert abs(3 * tokens / level.tokens_per_s - level.seconds) <= 0.00005 + 1e-6


def test_text_completions(server: Server) -> None:
    (level,) = server.load("text", endpoint="completions", num_requests=2, turns=2).levels
    assert (level.num_ok, level.completion_tokens) == (4, 16)
    first, second = (body["prompt"] for _, _, body in server.wire.requests[:2])
    assert second.startswith(first + "One two three four ")
    assert {path for path, _, _ in server.wire.requests} == {"v1/completions"}


@pytest.mark.parametrize(
    ("dialect", "code"),
    [
        ("busy", "queue_full"),
        ("broken", "http_500"),
        ("failing", "engine_crash"),
        ("cut", "stream_cut"),
        ("garbage", "bad_chunk"),
    ],
)
def test_failures_are_counted_by_code(server: Server, dialect: str, code: str) -> None:
    (level,) = server.load(dialect, turns=2).levels
    assert level.errors == {code: 3}  # a conversation ends with its first failure
    assert (level.num_requests, level.num_ok, level.completion_tokens) == (3, 0, 0)
    assert level.ttft is None and level.tokens_per_s == 0


def test_four_conversations_for_each_stream_unless_told(server: Server) -> None:
    levels = server.load("openai", num_requests=None, concurrency=(1, 3)).levels
    assert [level.num_requests for level in levels] == [4, 12]


def test_no_server_at_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(BenchError, match="no server answers"):
        asyncio.run(run_load(LoadSpec(url=url)))
    spec = LoadSpec(url=url, model="given", num_requests=2, warmup=0, concurrency=(2,))
    (level,) = asyncio.run(run_load(spec)).levels
    assert level.errors == {"connect_error": 2}


# ------------------------------------------------------------------------------ what is sent


def test_the_request(server: Server) -> None:
    server.load("openai", num_requests=1, api_key="secret-key", max_tokens=9, seed=5)
    ((path, headers, body),) = server.wire.requests
    assert path == "v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-key"
    assert body.pop("messages")[0]["role"] == "user"
    assert body == {
        "model": "served",
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    server.load("openai", num_requests=1, ignore_eos=True, model="mine")
    assert server.wire.requests[-1][2]["ignore_eos"] is True
    assert server.wire.requests[-1][2]["model"] == "mine"


def test_turns_carry_the_servers_own_answers(server: Server) -> None:
    (level,) = server.load("openai", num_requests=2, turns=3, warmup=1).levels
    assert level.num_requests == 6
    assert len(level.ttft_by_turn) == 3 and all(level.ttft_by_turn)
    assert len(server.wire.requests) == 9  # the warm-up's are sent and not counted
    first, second, third = (body["messages"] for _, _, body in server.wire.requests[3:6])
    assert [message["role"] for message in third] == ["user", "assistant"] * 2 + ["user"]
    assert second[:1] == first and third[:3] == second
    assert second[1] == {"role": "assistant", "content": "One two three four"}


def test_so_many_at_once_and_no_more(server: Server) -> None:
    server.wire.barrier = 4  # no request is answered before four are there
    (level,) = server.load("together_", concurrency=(4,), num_requests=8).levels
    assert level.num_ok == 8
    assert server.wire.most_at_once == 4


def test_prompts_are_of_the_wanted_length() -> None:
    tokenizer = Tokenizer.from_file(str(resolve().folder / "tokenizer.json"))
    prompts = Prompts(seed=1, lengths=(8, 128, 1000))
    for number in range(30):
        for turn in (0, 1):
            wanted = (8, 128, 1000)[number % 3]
            found = len(tokenizer.encode(prompts.message(number, turn)).ids)
            assert abs(found - wanted) <= max(2, wanted * 0.03)


def test_prompts_are_the_same_each_time_and_begin_differently() -> None:
    made = [Prompts(3, (16,)).message(number, 0) for number in range(2000)]
    assert made == [Prompts(3, (16,)).message(number, 0) for number in range(2000)]
    assert len({tuple(text.split()[:4]) for text in made}) == 2000
    assert made[0] != Prompts(4, (16,)).message(0, 0)


def test_a_shared_prefix() -> None:
    prompts = Prompts(3, (16,), shared_prefix=100)
    one, two = (prompts.message(number, 0).split() for number in (0, 1))
    assert len(one) == 116
    assert one[:100] == two[:100] and one[100] != two[100]
    assert len(prompts.message(0, 1).split()) == 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": ()},
        {"concurrency": (0,)},
        {"num_requests": 0},
        {"prompt_tokens": (5, 0)},
        {"max_tokens": 0},
        {"turns": 0},
        {"warmup": -1},
        {"timeout": 0.0},
        {"url": "localhost:8000"},
    ],
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoadSpec(**({"url": "http://localhost"} | wrong))


# -------------------------------------------------------------------------------- the numbers


def test_times_against_the_servers_own_clock(server: Server) -> None:
    (level,) = server.load("timed", num_requests=4, concurrency=(2,)).levels
    sent = server.wire.schedules
    assert level.completion_tokens == 44
    assert level.ttft is not None and level.inter_token is not None and level.latency is not None
    # The role chunk came at once; only the first text counts.
    firsts = sorted(schedule[0] for schedule in sent)
    assert percentile(firsts, 0.5) * 1000 <= level.ttft.p50 <= percentile(firsts, 0.5) * 1000 + 100
    gaps = sorted(b - a for s in sent for a, b in itertools.pairwise(s))
    assert level.inter_token.p50 == pytest.approx(percentile(gaps, 0.5) * 1000, abs=8)
    assert level.latency.p50 >= percentile(sorted(s[-1] for s in sent), 0.5) * 1000
    rates = sorted(10 / (s[-1] - s[0]) for s in sent)
    assert level.tokens_per_s_stream == pytest.approx(percentile(rates, 0.5), rel=0.2)


def test_a_known_schedule_exactly() -> None:
    def timing(start: float, first: float, gap: float, **fields: Any) -> RequestTiming:
        arrivals = [start + first + gap * number for number in range(5)]
        return RequestTiming(
            started=start, ended=arrivals[-1] + 0.5, arrivals=arrivals, finished=True, **fields
        )

    timings = [
        timing(0.0, 0.1, 0.01, turn=0, completion_tokens=5, prompt_tokens=30, cached_tokens=0),
        timing(1.0, 0.2, 0.02, turn=1, completion_tokens=10, prompt_tokens=50, cached_tokens=16),
        timing(2.0, 0.3, 0.03, turn=1),  # a server that forgot its usage
        timing(3.0, 9.9, 9.99, turn=0, error="queue_full"),
    ]
    level = summarise(2, timings, seconds=4.0)
    assert (level.num_requests, level.num_ok, level.errors) == (4, 3, {"queue_full": 1})
    assert level.ttft == Percentiles(200.0, 280.0, 298.0)
    assert level.ttft_by_turn == [
        Percentiles(100.0, 100.0, 100.0),
        Percentiles(250.0, 290.0, 299.0),
    ]
    assert level.inter_token == Percentiles(20.0, 30.0, 30.0)
    assert level.latency == Percentiles(780.0, 892.0, 917.2)
    assert (level.completion_tokens, level.tokens_from) == (20, "both")
    assert (level.prompt_tokens, level.cached_tokens) == (80, 16)
    assert level.tokens_per_s == 5.0
    # 4 tokens in 40 ms, 8 (two a delta) in 80 ms, 4 in 120 ms
    assert level.tokens_per_s_stream == 100.0
    assert level.tokens_per_delta == round(20 / 15, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(size: int) -> None:
    values = np.sort(np.random.default_rng(size).random(size))
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values.tolist(), share) == pytest.approx(np.quantile(values, share))


# --------------------------------------------------------------------------------- the report


def test_the_table_and_the_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/headwater", "bench", "--api-key", "secret-key"])
    result = server.load("bare", api_key="secret-key", turns=2)
    text = as_json(result, secret="secret-key")
    assert "\n" not in text and "secret-key" not in text
    document = json.loads(text)
    assert document["command"] == "headwater bench --api-key '***'"
    assert document["machine"]["cores"] >= 1 and document["machine"]["cpu"]
    assert document["spec"]["model"] == "served" and document["levels"][0]["num_ok"] == 6
    out = io.StringIO()
    print_table(result, Console(file=out, width=140))
    assert "6/6" in out.getvalue() and "served" in out.getvalue()
    assert "deltas were counted as tokens" in out.getvalue()
    assert "TTFT p50 by turn" in out.getvalue()


def test_the_script(server: Server) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), *options]
        return subprocess.run(script, capture_output=True, text=True, cwd=ROOT)

    options = ["--num-requests", "2", "--concurrency", "1,2", "--prompt-tokens", "8"]
    good = run("--url", f"{server.url}/openai", *options)
    assert good.returncode == 0, good.stderr
    document = json.loads(good.stdout.splitlines()[-1])
    assert [level["concurrency"] for level in document["levels"]] == [1, 2]
    assert run("--url", f"{server.url}/busy", *options).returncode == 1
    wrong = run("--url", "nowhere")
    assert "http_500" in run("--url", f"{server.url}/broken", *options).stdout
    assert wrong.returncode == 2 and "url must begin with" in wrong.stderr
