"""Answers that are gone on with, cut and forked, and what each of them computes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.session_client import (
    BLOCK,
    END_OF_TURN,
    SAMPLED,
    Session,
    computed,
    emoji_bias,
    error,
    ok,
    text_of,
)
from tests.e2e.streams import Reader
from tests.fixtures.server import Server

pytestmark = pytest.mark.e2e


def going_on(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {
        "sampled": {},
        "greedy": {"temperature": 0},
        "characters": {"logit_bias": emoji_bias(client)},
        "stops": {"stop": ["e\x00", "r\x00", " \x00", "a\x00", "t\x00"]},
        "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    }


@pytest.mark.parametrize("kind", ["sampled", "greedy", "characters", "stops", "penalties"])
def test_continuing_gives_the_tokens_of_the_uncut_answer(client: httpx.Client, kind: str) -> None:
    fields = {**SAMPLED, **going_on(client)[kind]}
    session = Session(client)
    whole = session.turn("Tell me of rivers.", max_tokens=80, **fields)
    tokens = session.last()["token_ids"]
    assert len(tokens) == 80

    # Cut after a token.
    for cut in (0, 1, 16, 50, 79, 80):
        fork = session.fork(token=cut)
        half = fork.last()
        assert (half["token_ids"], half["status"]) == (tokens[:cut], "interrupted")
        assert text_of(whole).startswith(text_of(half))
        if cut < 80:
            done = ok(fork.post("continue", max_tokens=80 - cut))
            assert fork.last()["token_ids"] == tokens, cut
            assert text_of(done) == text_of(whole)
            assert done["id"] == half["id"]
            assert (done["status"], done["finish_reason"]) == ("complete", "length")

    # Stopped by its length, twice.
    short = Session(client)
    turn = short.turn("Tell me of rivers.", max_tokens=30, **fields)
    ok(short.post("continue", max_tokens=23))
    done = ok(short.post("continue", max_tokens=27))
    assert done["id"] == turn["id"]
    assert short.last()["token_ids"] == tokens
    assert text_of(done) == text_of(whole)

    # Interrupted by somebody.
    broken = Session(client)
    running = broken.begin("Tell me of rivers.", max_tokens=3500, **fields)
    running.read(3)
    ok(client.post(f"{broken.url}/cancel"))
    kept = broken.last()
    said = kept["token_ids"]
    assert 0 < len(said) < 3500
    ok(broken.post("continue", max_tokens=max(80 - len(said), 30)))
    assert broken.last()["token_ids"][:80] == tokens
    assert broken.last()["token_ids"][: len(said)] == said


def test_an_answer_that_came_to_its_end_is_not_continued(client: httpx.Client) -> None:
    session = Session(client)
    error(session.post("continue"), 400, "invalid_value")
    error(session.post("regenerate"), 400, "invalid_value")
    turn = session.turn("Hi", max_tokens=30, **SAMPLED)
    # A replaced token that ends the turn completes it.
    fork = session.fork(token=5, replace=END_OF_TURN)
    ended = fork.last()
    assert (ended["status"], ended["finish_reason"]) == ("complete", "stop")
    assert ended["token_ids"] == [*session.last()["token_ids"][:5], END_OF_TURN]
    assert text_of(turn).startswith(text_of(ended))
    error(fork.post("continue"), 400, "invalid_value")
    fork.turn("And?", max_tokens=4, **SAMPLED)
    tokens = fork.tokens()
    assert tokens.count(END_OF_TURN) == 3  # the end is there once a turn
    for bad, param in (
        ({"token": 31}, "token"),
        ({"replace": 5}, "replace"),
        ({"token": 1, "replace": 512}, "replace"),
        ({"token": 1, "at": session.turns()[0]["id"]}, "token"),
    ):
        assert error(session.post("fork", **bad), 400, "invalid_value")["param"] == param


def test_appending_closes_a_cut_answer(client: httpx.Client) -> None:
    session = Session(client)
    session.turn("One", max_tokens=9, **SAMPLED)
    before = session.tokens()
    session.turn("Two", max_tokens=3, **SAMPLED)
    tokens = session.tokens()
    assert tokens[: len(before)] == before
    assert tokens[len(before)] == END_OF_TURN


def test_a_cut_inside_a_character(client: httpx.Client) -> None:
    fields = {**SAMPLED, "logit_bias": emoji_bias(client)}
    session = Session(client)
    whole = session.turn("Faces!", max_tokens=200, **fields)
    tokens = session.last()["token_ids"]
    assert any(emoji in text_of(whole) for emoji in ("😀", "🦊"))
    inside = 0
    shown = ""
    for cut in range(1, 40):
        fork = session.fork(token=cut)
        half = text_of(fork.last())
        assert text_of(whole).startswith(half)
        if half == shown:
            inside += 1
            if inside <= 4:
                reader = Reader(
                    client,
                    fork.post("continue", max_tokens=200 - cut).headers["x-headwater-generation"],
                ).read_all()
                assert fork.last()["token_ids"] == tokens
                assert half + reader.text == text_of(whole) == text_of(fork.last())
        shown = half
    assert inside >= 4


def test_a_fork_computes_what_is_new(server: Server, client: httpx.Client) -> None:
    session = Session(client)
    session.turn("Tell me of rivers. " * 20, max_tokens=100, **SAMPLED)
    session.turn("And of the sea.", max_tokens=100, **SAMPLED)
    parent = session.get()
    tokens = parent["turns"][-1]["token_ids"]
    server.wait_idle()

    def check(fork: Session, turn: dict[str, Any], before: float, cut: int) -> None:
        """Up to the block that holds token `cut` of the path everything was found, and no more
        than the rest was computed, the answer's own tokens among it."""
        usage = fork.usage(turn)
        found = usage["prompt_tokens_details"]["cached_tokens"]
        assert found == cut // BLOCK * BLOCK
        assert computed(server) - before == usage["prompt_tokens"] - found

    path = session.tokens()
    history = len(path)
    at_turn = session.fork(at=parent["turns"][1]["id"])
    first = len(at_turn.tokens())
    before = computed(server)
    answer = at_turn.turn("Go on elsewhere.", max_tokens=20, **SAMPLED)
    # The template begins both turns alike.
    alike = next(i for i, (a, b) in enumerate(zip(path, at_turn.tokens(), strict=False)) if a != b)
    assert first < alike < first + BLOCK
    check(at_turn, answer, before, alike)

    base = history - len(tokens)
    for cut in (1, 40, 77):
        other = (tokens[cut] + 1) % 400 + 40
        fork = session.fork(token=cut, replace=other)
        before = computed(server)
        answer = ok(fork.post("continue", max_tokens=20))
        check(fork, answer, before, base + cut)
        assert fork.last()["token_ids"][: cut + 1] == [*tokens[:cut], other]
        assert fork.last()["num_tokens"] == cut + 21
        # Both go on, each for itself.
        before_parent = session.tokens()
        fork.turn("More?", max_tokens=5, **SAMPLED)
        assert session.tokens() == before_parent
    assert session.get() == parent
    alone = session.turn("More?", max_tokens=12, **SAMPLED)
    twin = session.fork(at=parent["head"])
    assert text_of(twin.turn("More?", max_tokens=12, **SAMPLED)) == text_of(alone)


def test_50_forks_use_their_own_blocks_only(server: Server, client: httpx.Client) -> None:
    session = Session(client)
    session.turn("The river runs to the sea. " * 90, max_tokens=30, **SAMPLED)
    while len(session.tokens()) < 2000:
        session.turn("It was a long letter. " * 20, max_tokens=50, **SAMPLED)
    history = len(session.tokens()) - 1  # computed of it
    server.wait_idle()
    forks = [session.fork() for _ in range(50)]

    def used() -> float:
        return sum(
            server.metric("headwater_blocks", state=state, tier="device")
            for state in ("cached", "referenced")
        )

    before, tokens_before = used(), computed(server)
    peak = [before]
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak.append(used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(50) as pool:
            turns = list(
                pool.map(
                    lambda i: forks[i].turn(
                        f"{i} is my number.", max_tokens=40, **{**SAMPLED, "seed": i}
                    ),
                    range(50),
                )
            )
    finally:
        ended.set()
        watcher.join()
    server.wait_idle()
    own = 0
    prompts = 0
    for fork, turn in zip(forks, turns, strict=True):
        own += (len(fork.tokens()) - 2) // BLOCK + 1 - history // BLOCK
        usage = fork.usage(turn)
        assert usage["prompt_tokens_details"]["cached_tokens"] >= history // BLOCK * BLOCK
        prompts += usage["prompt_tokens"] - history // BLOCK * BLOCK
    assert computed(server) - tokens_before <= prompts
    assert used() - before <= own
    assert max(peak) - before <= own
    assert len({text_of(turn) for turn in turns}) == 50
    assert session.get()["generating"] is None
