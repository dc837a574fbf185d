"""kill -9, SIGSTOP and poison for the engine process: its streams go on as if nothing had been."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Show
from tests.e2e.listeners import (
    Answer,
    Ask,
    Listener,
    answers,
    engine_changed,
    listen,
    mixed_asks,
    new_session,
    wait_heard,
    wait_new_engine,
)
from tests.fixtures.server import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_STREAMS = 16
POISON = 200  # in the tiny tokenizer a byte that no English text has
LOADING = -1
FURTHER = 8


def undisturbed(server: Server, max_tokens: int, **fields: object) -> list[Answer]:
    """What all streams are to be compared with; another server's, so that no KV is shared."""
    got = answers(listen(server, mixed_asks(server, NUM_STREAMS, max_tokens, **fields)))
    assert all(answer.finish_reason == "length" for answer in got)
    assert len({answer.text for answer in got}) == NUM_STREAMS
    assert all(len(a.token_ids) == max_tokens for a in got[::2])
    assert [bool(a.logprobs) for a in got[:4]] == [False, True, True, False]
    return got


def instants(count: int, show: Show) -> list[int]:
    """When to kill, at random: after so many more tokens of each stream (often before the first
    one), or while the next engine loads.

    Two deaths in a row at which none got further make three without a step in between: they are,
    rightly, laid to those who were there. Such a series is drawn again. A stream has got further
    for sure when it heard more than what was on its way when the engine died."""
    seed = random.randrange(1 << 32)
    show(f"the instants of the kills are those of seed {seed}")
    chooser = random.Random(seed)
    while True:
        made = [LOADING if chooser.random() < 0.25 else chooser.randrange(25) for _ in range(count)]
        lived = [instant >= FURTHER for instant in made if instant != LOADING]
        if all(map(any, itertools.pairwise(lived))):
            return made


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
    expected = undisturbed(tiny_server, 300)
    with serving(str(tiny_model)) as server:
        check_kills(server, expected, 300, instants(4, show), show)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_streams_of_the_default_model_survive_20_kills(default_server: Server, show: Show) -> None:
    expected = undisturbed(default_server, 400)
    with serving("smollm2-135m") as server:
        check_kills(server, expected, 400, instants(20, show), show)


def test_a_stopped_engine_is_replaced_and_its_streams_go_on(
    tiny_server: Server, tiny_model: Path, show: Show
) -> None:
    expected = undisturbed(tiny_server, 450)
    timeout = 4.5
    with serving(str(tiny_model), env={"HEADWATER_ENGINE_TIMEOUT": str(timeout)}) as server:
        listeners = listen(server, mixed_asks(server, NUM_STREAMS, 450))
        wait_heard(listeners, 1)  # the engine is far ahead of what is heard
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
    tiny_server: Server,
    tiny_model: Path,
    fault: str,
    poisons: Callable[[Server], list[Ask]],
    show: Show,
    env: dict[str, str] | None = None,
) -> float:
    """Healthy streams, and some whose prompts kill each engine that computes them. Returns how many
    engines died."""
    never = {"logit_bias": {str(POISON): -100}}
    expected = undisturbed(tiny_server, 200, **never)
    expected.pop(3)
    env = {"HEADWATER_FAULT": f"{fault}:{POISON}", **(env or {})}
    with serving(str(tiny_model), env=env) as server:
        asks = mixed_asks(server, NUM_STREAMS, 200, **never)
        asks.pop(3)
        listeners = listen(server, asks)
        wait_heard(listeners, 10 * len(listeners))
        wanted = poisons(server)
        server.engine.suspend()  # until it has them all: it dies of the first one
        poisoned = listen(server, wanted)
        wait_until(lambda: all(each.status == 200 for each in poisoned), 10, "they are not taken")
        server.engine.resume()
        started = time.monotonic()
        assert answers(listeners) == expected
        ends = [(answer.error, answer.finish_reason) for answer in answers(poisoned)]
        assert ends == [("engine_crash", None)] * len(poisoned)
        took = time.monotonic() - started
        deaths = server.metric("headwater_engine_restarts_total")
        assert server.process.poll() is None
        wait_until(server.ready, 10, "the server does not serve on")
        healthy = answers(listen(server, asks[1:2]))
        assert healthy == expected[1:2]
        server.wait_idle()
        show(
            f"{fault}: {len(poisoned)} poisoned and {len(asks)} healthy streams, all ended after "
            f"{took:.1f} s"
        )
        return deaths


def one(_: Server) -> list[Ask]:
    return [Ask("/v1/completions", {"prompt": [5, 6, POISON], "max_tokens": 50})]


def four_choices(_: Server) -> list[Ask]:
    body = {"prompt": [5, 6, POISON], "max_tokens": 50, "n": 4, "temperature": 1, "seed": 1}
    return [Ask("/v1/completions", body)]


def four_turns(server: Server) -> list[Ask]:
    """A turn whose first token is the poison: it is biased so, and the engine dies of the next."""
    body = {"input": "Hi", "max_tokens": 50, "logit_bias": {str(POISON): 100}}
    return [Ask(f"/v1/sessions/{new_session(server)}/turns", body) for _ in range(4)]


def test_a_poison_ends_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    assert check_poison(tiny_server, tiny_model, "die", one, show) == 3


def test_four_poisoned_choices_end_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    # When the first of them is given up, the others have nobody left who waits for them.
    deaths = check_poison(tiny_server, tiny_model, "die", four_choices, show)
    assert 3 <= deaths <= 6


@pytest.mark.slow
def test_four_poisoned_turns_end_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    # Two deaths are of them all, and then each of them has one.
    assert check_poison(tiny_server, tiny_model, "die", four_turns, show) == 6


@pytest.mark.slow
def test_a_poison_that_hangs_ends_alone(tiny_server: Server, tiny_model: Path, show: Show) -> None:
    env = {"HEADWATER_ENGINE_TIMEOUT": "2"}
    assert check_poison(tiny_server, tiny_model, "hang", one, show, env) == 3
