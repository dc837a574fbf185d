"""Every stream is in the order of its wire, ends once, and says what the same request in one piece
says: random requests, read in pieces of random size, left, cancelled, and through the deaths of an
engine and the stop of the server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.fixtures.server import Server, serving, wait_until
from tests.server.api.stream_ask import Ask, compare
from tests.server.api.stream_cases import GOES_ON, WIRES, Case, Way, Wire, drawn
from tests.server.api.wires.checker import Answer
from tests.server.api.wires.responses import ResponseStream, whole_response

STREAMS = 12
NUM_INTERRUPTED = 8


@pytest.fixture(scope="module")
def client(wide_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=wide_server.url, timeout=60) as client:
        yield client


def check_response(case: Case, ask: Ask, whole: Answer) -> None:
    """What is stored of a response is what its stream ended with, or what it came to without its
    reader."""
    if case.wire not in ("responses", "background") or not case.body.get("store", True):
        return
    checker = ask.checker
    assert isinstance(checker, ResponseStream)
    if checker.ended:
        assert ask.found() == checker.response
    else:
        running = ("queued", "in_progress")
        wait_until(lambda: ask.found()["status"] not in running, 20, "it runs on")
        (left,) = whole_response(ask.found()).choices
        assert left.reason == "cancelled" or left == whole.choices[0]
        assert left.begins(whole.choices[0]) or left == whole.choices[0]


def check(client: httpx.Client, case: Case) -> None:
    ask = Ask(client, case)
    whole = ask.whole()
    with ask.stream() as pieces:
        ask.read(pieces, 1 << 30 if case.way == "read" else case.at)
        if case.way == "cancel":
            ask.cancel()
            ask.read(pieces)
    if case.way == "leave" and case.wire in GOES_ON and not ask.checker.ended:
        ask.checker.cut()
        ask.read_the_rest()
    left = case.way == "leave" and case.wire not in GOES_ON
    if not left:
        ask.checker.close()
        assert ask.checker.error is None
    if ask.checker.ended or case.wire not in ("responses", "background"):
        stopped = len(whole.choices) if left else int(case.way == "cancel")
        compare(case, ask.checker, whole, stopped=stopped)
    check_response(case, ask, whole)


def named(case: Case, work: Callable[[], None]) -> None:
    """Do the work; what goes wrong names the case."""
    try:
        work()
    except BaseException as error:
        error.add_note(f"drawn({case.number}) is {case}")
        raise


# ----------------------------------------------------------------------- many random requests


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "num_deaths"), [(60, 1), pytest.param(2000, 10, marks=pytest.mark.slow)]
)
def test_streams_are_in_order(
    wide_server: Server, client: httpx.Client, count: int, num_deaths: int
) -> None:
    restarts = wide_server.metric("headwater_engine_restarts_total")
    cases = [drawn(number) for number in range(count - num_deaths * NUM_INTERRUPTED)]
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda case: named(case, lambda: check(client, case)), cases))
    for death in range(num_deaths):
        interrupt(wide_server, client, 1_000_000 + death * NUM_INTERRUPTED)
    wide_server.wait_idle()
    assert wide_server.metric("headwater_engine_restarts_total") == restarts + num_deaths
    assert "unhandled" not in wide_server.log


@pytest.mark.parametrize("way", ["read", "cancel"])
def test_a_long_prompt_is_echoed_whole(client: httpx.Client, way: Way) -> None:
    """Its log-probabilities come in the pieces in which it is computed."""
    prompt = ["The river 日本 bends. " * 120, "Why? 😀 " * 90]
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 20, "seed": 1}
    check(client, Case(0, "completions", {**body, "stream": True, "ignore_eos": True}, way, at=3))


def read_on(ask: Ask, num_frames: int, begun: threading.Barrier) -> None:
    """Read so many frames, wait until all others have, and read on to the end."""
    try:
        with ask.stream() as pieces:
            ask.read(pieces, num_frames)
            begun.wait(60)
            ask.read(pieces)
    except BaseException:
        begun.abort()
        raise
    ask.checker.close()


def interrupt(server: Server, client: httpx.Client, first: int) -> None:
    """Some streams whose engine dies in their middle."""
    wires: list[Wire] = [*WIRES, "chat"]
    cases = [drawn(first + i, whole=True, on=wire) for i, wire in enumerate(wires)]
    asks = [Ask(client, case) for case in cases]
    wholes = [ask.whole() for ask in asks]
    begun = threading.Barrier(NUM_INTERRUPTED + 1)

    def run(case: Case, ask: Ask, whole: Answer) -> None:
        read_on(ask, 5 + 2 * case.body.get("n", 1), begun)
        assert ask.checker.error is None
        compare(case, ask.checker, whole)
        check_response(case, ask, whole)

    with ThreadPoolExecutor(NUM_INTERRUPTED) as pool:
        runs = [
            pool.submit(named, case, partial(run, case, ask, whole))
            for case, ask, whole in zip(cases, asks, wholes, strict=True)
        ]
        with suppress(threading.BrokenBarrierError):  # then one of them tells why
            begun.wait(60)
            server.engine.kill()
        for each in runs:
            each.result()
    told = [ask.checker.reader.comments for ask in asks]
    assert sum("the engine is being restarted" in comments for comments in told) > 0, told
    wait_until(server.ready, 30, "the engine is not back")


# ------------------------------------------------------------------------------- their failure


def test_all_streams_end_in_order_when_the_server_stops(wide_model: Path) -> None:
    env = {"HEADWATER_SHUTDOWN_GRACE": "0.1"}
    with (
        serving(str(wide_model), env=env) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(len(WIRES) + 1) as pool,
    ):
        cases = [_long(wire) for wire in WIRES]
        cases.append(replace(_long("responses"), body=_long("responses").body | {"store": False}))
        asks = [Ask(client, case) for case in cases]
        begun = threading.Barrier(len(asks) + 1)
        runs = [pool.submit(read_on, ask, 5, begun) for ask in asks]
        with suppress(threading.BrokenBarrierError):
            begun.wait(60)
            server.process.send_signal(signal.SIGTERM)
        for each in runs:
            each.result()
        for ask in asks:
            error = ask.checker.error
            assert error is not None
            code = error["type"] if "code" not in error else error["code"]
            assert code in ("server_draining", "overloaded_error")


def _long(wire: Wire) -> Case:
    body = drawn(1, whole=True, on=wire).body
    kept = ("input", "messages", "prompt", "stream", "resumable", "background")
    length = {"max_tokens": 3000} if wire in ("completions", "messages") else {}
    asked = {key: value for key, value in body.items() if key in kept}
    return Case(0, wire, asked | length | {"ignore_eos": True})
