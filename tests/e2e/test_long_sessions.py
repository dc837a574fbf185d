"""Sessions of the default model: a long one costs what is new, also after kill -9 of everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import pytest

from tests.e2e.session_client import (
    BLOCK,
    Session,
    connected,
    ok,
)
from tests.e2e.streams import Reader, stream_events
from tests.fixtures.server import serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


TALK = (  # some 36 tokens
    "The delta lies where the river meets the sea, and the silt that it carried for a thousand "
    "miles settles there, year after year, in layers that tell of every flood. "
)


def prompt_seconds(client: httpx.Client, prompt: list[int]) -> float:
    """From a request with these tokens to its first token, as the client sees it."""
    started = time.monotonic()
    ok(client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}))
    return time.monotonic() - started


def first_token_seconds(session: Session, text: str) -> tuple[float, Reader]:
    """From a turn to the first text of its answer, as the client sees it."""
    body = {"input": text, "stream": True, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    started = time.monotonic()
    with session.client.stream("POST", f"{session.url}/turns", json=body) as response:
        assert response.status_code == 200, response.read()
        next(event for event in stream_events(response) if event.event == "delta")
        took = time.monotonic() - started
        generation = response.headers["x-headwater-generation"]
    return took, Reader(session.client, generation).read_all()


def talk(
    folder: Path, num_turns: int, text: str, disk_fraction: float, say: Callable[[str], None]
) -> None:
    """A session of the default model, its last turn, and one more after kill -9 of everything.
    From the disk that one's first token must come in `disk_fraction` of the time that it takes
    where nothing is cached."""
    one, two = ({"HEADWATER_DATA": str(folder / name)} for name in ("one", "two"))
    with serving("smollm2-135m", env=one) as server, connected(server) as client:
        session = Session(client)
        for i in range(num_turns - 1):
            session.turn(f"{i}. {text}", max_tokens=16, temperature=0, ignore_eos=True)
        history = session.tokens()
        known = (len(history) - 1) // BLOCK * BLOCK
        times, references = [], []
        for i in range(3):
            took, reader = first_token_seconds(session.fork(), f"{'abc'[i]}. {text}")
            times.append(took)
            assert sum(reader.start["cached_tokens"].values()) == known
            # The same number of other tokens, after the same history.
            new = reader.start["prompt_tokens"] - len(history)
            other = [100 + (7 * j + 1000 * i) % 40_000 for j in range(new)]
            references.append(prompt_seconds(client, history + other))
        last = session.turn(f"9. {text}", max_tokens=16, temperature=0, ignore_eos=True)
        assert session.usage(last)["prompt_tokens_details"]["cached_tokens"] == known
        tokens = session.tokens()
        full = (len(tokens) - 1) // BLOCK * BLOCK
        wait_until(lambda: session.cache()["on_disk"] == full, 30, "it is not on disk")
        document = ok(client.get(f"{session.url}/export"))
        server.kill_all()
    with serving("smollm2-135m", env=two) as server, connected(server) as client:
        twin = Session(client, ok(client.post("/v1/sessions/import", json=document))["id"])
        cold, undisturbed = first_token_seconds(twin, "And now?")
        assert sum(undisturbed.start["cached_tokens"].values()) == 0
    with serving("smollm2-135m", env=one) as server, connected(server) as client:
        session = Session(client, session.id)
        warm, answer = first_token_seconds(session, "And now?")
        assert answer.start["cached_tokens"]["disk"] >= 0.95 * len(tokens)
        assert answer.token_ids == undisturbed.token_ids
        assert answer.text == undisturbed.text
    took, prefill = median(times), median(references)
    said = (
        f"{num_turns} turns, {len(tokens)} tokens: the last turn's first token after {took:.3f} s "
        f"({took / cold:.3f} of a cold prefill; its own new tokens alone {prefill:.3f} s); one "
        f"more turn {cold:.3f} s cold, {warm:.3f} s from disk after kill -9"
    )
    say(said)
    assert took <= 1.3 * prefill + 0.05, said
    assert warm <= disk_fraction * cold, said


def test_some_turns_and_one_after_kill_9(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    talk(tmp_path, 4, TALK * 5, 0.5, lambda said: record_property("measured", said))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_turns_and_an_eleventh_after_kill_9(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record: 4,000 tokens."""

    def say(said: str) -> None:
        with capsys.disabled():
            print(f"\n{said}")  # noqa: T201

    talk(tmp_path, 10, TALK * 11, 0.1, say)
