"""kill -9, SIGSTOP and poison for the engine process: its streams go on as if nothing had been."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.listeners import (
    Answer,
    Ask,
    Listener,
    answers,
    engine_changed,
    listen,
    mixed_asks,
    wait_heard,
    wait_new_engine,
)
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.e2e

NUM_STREAMS = 16
POISON = 200  # in the tiny tokenizer a byte that no English text has
LOADING = -1

Show = Callable[[str], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints a line, past pytest."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n    {line}")

    return write


def undisturbed(server: Server, max_tokens: int, **fields: object) -> list[Answer]:
    """What all streams are to be compared with; another server's, so that no KV is shared."""
    got = answers(listen(server, mixed_asks(server, NUM_STREAMS, max_tokens, **fields)))
    assert all(answer.finish_reason == "length" for answer in got)
    assert len({answer.text for answer in got}) == NUM_STREAMS
    assert all(len(a.token_ids) == max_tokens for a in got[::2])
    assert [bool(a.logprobs) for a in got[:4]] == [False, True, True, False]
    return got


def instants(count: int, chooser: random.Random) -> list[int]:
    """When to kill: after so many more tokens of each stream, or while the next engine loads.

    An answer that does not get 8 tokens further between three deaths is taken for their cause, so
    there are never three short lives of an engine in a row. In a long one each stream gets these 8
    alone first, if need be. Dying while it loads is nobody's fault."""
    made: list[int] = []
    while len(made) < count:
        made += [chooser.randint(17, 24), chooser.randint(0, 6), LOADING]
        made += [chooser.randint(17, 24), chooser.randint(17, 24), chooser.randint(0, 6)]
    return made[:count]


def kill_engines(server: Server, listeners: list[Listener], when: list[int]) -> list[float]:
    """Kill one engine after the other. Returns when."""
    wait_until(lambda: all(each.status == 200 for each in listeners), 20, "they are not taken")
    killed = []
    pid, heard = 0, [0] * len(listeners)
    for instant in when:
        if instant == LOADING:
            wait_until(partial(engine_changed, server, pid), 30, "no new engine")
        else:
            if pid:
                wait_new_engine(server, pid)
            goals = [count + instant for count in heard]
            wait_until(partial(all_heard, listeners, goals), 90, "the tokens stay away")
        assert any(listener.is_alive() for listener in listeners), "all have ended already"
        engine = server.engine
        pid = engine.pid
        killed.append(time.monotonic())
        engine.kill()
        wait_until(lambda: not server.ready(), 2, "/ready does not turn 503")
        heard = [len(listener.times) for listener in listeners]
    return killed


def all_heard(listeners: list[Listener], counts: list[int]) -> bool:
    """Whether each one has that many tokens, or has ended."""
    return all(
        len(listener.times) >= count or not listener.is_alive()
        for listener, count in zip(listeners, counts, strict=True)
    )


def pauses(listeners: list[Listener], killed: list[float]) -> list[float]:
    """How long each stream was silent after each death that it saw the end of, in seconds."""
    found = []
    for when in killed:
        for listener in listeners:
            after = [t - when for t in listener.times if t > when + 0.1]
            if after and listener.times[0] <= when:
                found.append(after[0])
    return found


def check_kills(
    server: Server, expected: list[Answer], max_tokens: int, when: list[int], show: Show
) -> None:
    listeners = listen(server, mixed_asks(server, NUM_STREAMS, max_tokens))
    killed = kill_engines(server, listeners, when)
    assert answers(listeners) == expected
    assert server.metric("headwater_engine_restarts_total") == len(when)
    server.wait_idle()
    found = pauses(listeners, killed)
    show(
        f"{len(when)} kills of the engine under {NUM_STREAMS} streams, pause until a stream's next "
        f"token: median {statistics.median(found):.2f} s, longest {max(found):.2f} s"
    )


def test_streams_survive_kill_9_of_the_engine(
    tiny_server: Server, tiny_model: Path, show: Show
) -> None:
    chooser = random.Random(5)
    when = [chooser.randint(0, 6), LOADING, LOADING, chooser.randint(17, 24)]
    expected = undisturbed(tiny_server, 300)
    with serving(str(tiny_model)) as server:
        check_kills(server, expected, 300, when, show)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_streams_of_the_default_model_survive_20_kills(default_server: Server, show: Show) -> None:
    expected = undisturbed(default_server, 400)
    with serving("smollm2-135m") as server:
        check_kills(server, expected, 400, instants(20, random.Random(6)), show)


def test_a_stopped_engine_is_replaced_and_its_streams_go_on(
    tiny_server: Server, tiny_model: Path, show: Show
) -> None:
    expected = undisturbed(tiny_server, 300)
    timeout = 4.5
    with serving(str(tiny_model), env={"HEADWATER_ENGINE_TIMEOUT": str(timeout)}) as server:
        listeners = listen(server, mixed_asks(server, NUM_STREAMS, 300))
        wait_heard(listeners, 50 * NUM_STREAMS)
        engine = server.engine
        engine.suspend()
        stopped = time.monotonic()
        unready = wait_until(lambda: not server.ready(), 4, "/ready stays 200")
        assert httpx.get(f"{server.url}/health").status_code == 200
        wait_until(lambda: gone(engine), timeout + 2, "the stopped engine lives")
        killed = time.monotonic() - stopped
        assert killed > timeout - 1.1  # the last heartbeat may be a second old
        wait_new_engine(server, engine.pid)
        assert answers(listeners) == expected
        assert server.metric("headwater_engine_restarts_total") == 1
        silent = killed + statistics.median(pauses(listeners, [stopped + killed]))
        show(
            f"SIGSTOP: not ready after {unready:.1f} s, killed after {killed:.1f} s, streams go on "
            f"after {silent:.1f} s"
        )


def gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def check_poison(
    tiny_server: Server, tiny_model: Path, fault: str, env: dict[str, str], show: Show
) -> None:
    """Fifteen healthy streams, and one whose prompt kills each engine that computes it."""
    never = {"logit_bias": {str(POISON): -100}}
    expected = undisturbed(tiny_server, 200, **never)
    expected.pop(3)
    with serving(str(tiny_model), env={"HEADWATER_FAULT": f"{fault}:{POISON}", **env}) as server:
        asks = mixed_asks(server, NUM_STREAMS, 200, **never)
        asks.pop(3)
        listeners = listen(server, asks)
        wait_heard(listeners, 10 * len(listeners))
        (poison,) = listen(
            server, [Ask("/v1/completions", {"prompt": [5, 6, POISON], "max_tokens": 50})]
        )
        started = time.monotonic()
        assert answers(listeners) == expected
        assert answers([poison]) == [Answer(error="engine_crash")]
        took = time.monotonic() - started
        assert server.metric("headwater_engine_restarts_total") == 3
        assert server.process.poll() is None
        wait_until(server.ready, 10, "the server does not serve on")
        healthy = answers(listen(server, asks[1:2]))
        assert healthy == expected[1:2]
        server.wait_idle()
        show(f"{fault}: one poison and {len(asks)} healthy streams, all ended after {took:.1f} s")


def test_a_poison_ends_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    check_poison(tiny_server, tiny_model, "die", {}, show)


@pytest.mark.slow
def test_a_poison_that_hangs_ends_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    check_poison(tiny_server, tiny_model, "hang", {"HEADWATER_ENGINE_TIMEOUT": "2"}, show)
