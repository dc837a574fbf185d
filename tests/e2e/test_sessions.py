"""Sessions through a real server: trees of turns, what each of them computes, and what is kept."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest

from server.owners import key_line, make_key
from tests.e2e.streams import Reader, stream_events
from tests.fixtures.server import Server, serving, wait_until
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.e2e

BLOCK = 16
END_OF_TURN = 2  # the tiny model's
SAMPLED = {"temperature": 1.0, "seed": 11, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("long-tiny")
    make_tiny("llama", folder, max_position_embeddings=4096)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(str(model), "--max-num-seqs", "64", "--kv-memory", "64MiB") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with connected(server) as client:
        yield client


def connected(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=90, limits=httpx.Limits(keepalive_expiry=2))


class Session:
    """One session, as a client has it."""

    def __init__(self, client: httpx.Client, id: str | None = None, **fields: Any) -> None:
        self.client = client
        self.id = id or client.post("/v1/sessions", json=fields).raise_for_status().json()["id"]
        self.url = f"/v1/sessions/{self.id}"

    def post(self, what: str, **fields: Any) -> httpx.Response:
        return self.client.post(f"{self.url}/{what}", json=fields)

    def turn(self, text: str | list[Any], **fields: Any) -> dict[str, Any]:
        """Append and answer; the answer's turn."""
        return ok(self.post("turns", input=text, **fields))

    def begin(self, text: str, **fields: Any) -> Reader:
        """Begin an answer, and leave before it is there."""
        body = {"input": text, "stream": True, **fields}
        with self.client.stream("POST", f"{self.url}/turns", json=body) as response:
            assert response.status_code == 200, response.read()
            return Reader(self.client, response.headers["x-headwater-generation"])

    def fork(self, **fields: Any) -> Session:
        return Session(self.client, ok(self.post("fork", **fields))["id"])

    def get(self) -> dict[str, Any]:
        return ok(self.client.get(f"{self.url}?include=token_ids"))

    def turns(self) -> list[dict[str, Any]]:
        return list(self.get()["turns"])

    def last(self) -> dict[str, Any]:
        return self.turns()[-1]

    def tokens(self) -> list[int]:
        """All tokens of the path to the head."""
        return [id_ for t in self.turns() for id_ in t["prompt_token_ids"] + t["token_ids"]]

    def tree(self) -> list[dict[str, Any]]:
        return list(ok(self.client.get(f"{self.url}/tree"))["turns"])

    def cache(self) -> dict[str, Any]:
        return ok(self.client.get(f"{self.url}/cache"))

    def usage(self, turn: dict[str, Any]) -> dict[str, Any]:
        done = Reader(self.client, turn["generation"]).read_all().done
        assert done is not None
        usage: dict[str, Any] = done["usage"]
        return usage

    def delete(self) -> None:
        assert self.client.delete(self.url).status_code == 204


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["code"] == code
    return found


def text_of(turn: dict[str, Any]) -> str:
    return "".join(item["text"] for item in turn["content"])


def computed(server: Server) -> float:
    return server.metric("headwater_prefill_tokens_total")


# ------------------------------------------------------------------------------ one at a time


def test_a_busy_session(client: httpx.Client) -> None:
    session = Session(client)
    running = session.begin("Hi", max_tokens=3500, **SAMPLED)
    running.read(2)
    assert session.get()["generating"] == running.generation
    head = session.get()["head"]
    for refused in (
        session.post("turns", input="And?"),
        session.post("turns", input="And?", answer=False),
        session.post("regenerate"),
        session.post("continue"),
        session.post("fork"),
        client.patch(session.url, json={"head": head}),
    ):
        message = error(refused, 409, "session_busy")["message"]
        assert running.generation in message
        assert refused.headers["x-should-retry"] == "false"
    said = ok(client.post(f"{session.url}/cancel"))
    assert (said["id"], said["finish_reason"]) == (running.generation, "abort")
    assert said["turn"] == head
    kept = session.last()
    assert (kept["id"], kept["status"], kept["finish_reason"]) == (head, "interrupted", "abort")
    assert 1 <= kept["num_tokens"] == len(kept["token_ids"]) < 3500
    assert text_of(kept) == running.read_all().text or running.place > 0
    assert session.get()["generating"] is None
    error(client.post(f"{session.url}/cancel"), 409, "invalid_value")


def test_on_busy_queue_and_cancel_previous(client: httpx.Client) -> None:
    session = Session(client)
    first = session.begin("Hi", max_tokens=600, **SAMPLED)
    first.read(2)
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(session.turn, "Two", on_busy="queue", max_tokens=4, **SAMPLED)
        first.read_all()
        assert first.done is not None and first.done["finish_reason"] == "length"
        second = queued.result(60)
    assert second["status"] == "complete"
    path = session.turns()
    assert [t["role"] for t in path] == ["user", "assistant", "user", "assistant"]
    assert path[1]["num_tokens"] == 600

    third = session.begin("Three", max_tokens=3000, **SAMPLED)
    third.read(2)
    fourth = session.turn("Four", on_busy="cancel_previous", max_tokens=4, **SAMPLED)
    path = session.turns()
    assert [t["id"] for t in path[-1:]] == [fourth["id"]]
    assert path[-3]["generation"] == third.generation
    assert path[-3]["status"] == "interrupted"
    third.read_all()
    assert third.done is not None and third.done["finish_reason"] == "abort"


# -------------------------------------------------------------------------------- the tree


def test_editing_rewinding_and_switching(client: httpx.Client) -> None:
    session = Session(client, instructions="Be short.")
    first = session.turn("One", max_tokens=8, **SAMPLED)
    second = session.turn("Two", max_tokens=8, **SAMPLED)
    user = session.turns()[2]
    assert (user["role"], user["parent"], second["parent"]) == ("user", first["id"], user["id"])

    edited = session.turn("Two, better", parent=first["id"], max_tokens=8, **SAMPLED)
    tree = {turn["id"]: turn for turn in session.tree()}
    siblings = [t for t in tree.values() if t["parent"] == first["id"]]
    assert [text_of(t) for t in siblings] == ["Two", "Two, better"]
    assert session.get()["head"] == edited["id"]

    root = session.turn("Another beginning", parent=None, max_tokens=8, **SAMPLED)
    assert [text_of(t) for t in session.tree() if t["parent"] is None] == [
        "One",
        "Another beginning",
    ]
    assert session.turns()[-1]["id"] == root["id"]
    assert len(session.turns()) == 2

    ok(client.patch(session.url, json={"head": second["id"]}))  # another branch
    assert [t["id"] for t in session.turns()][-2:] == [user["id"], second["id"]]
    ok(client.patch(session.url, json={"head": first["id"]}))  # rewind
    assert [t["id"] for t in session.turns()][-1] == first["id"]
    again = session.turn("Two", max_tokens=8, **SAMPLED)
    assert text_of(again) == text_of(second)  # the same path, the same seed
    error(client.patch(session.url, json={"head": "turn_" + "0" * 32}), 404, "not_found")
    error(session.post("turns", input="x", parent="turn_" + "0" * 32), 404, "not_found")


def test_appending_without_an_answer(client: httpx.Client) -> None:
    session = Session(client)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": "How are you?"},
    ]
    last = session.turn(messages, answer=False)
    assert (last["role"], last["generation"]) == ("user", None)
    assert [(t["role"], text_of(t)) for t in session.turns()] == [
        (m["role"], m["content"]) for m in messages
    ]
    answer = ok(session.post("regenerate", max_tokens=6, **SAMPLED))
    assert answer["parent"] == last["id"]
    # The same tokens as a chat that has these messages.
    said = ok(client.post("/tokenize", json={"messages": messages}))
    tokens = session.tokens()
    assert tokens[: len(tokens) - len(session.last()["token_ids"])] == said["tokens"]


def test_regenerating_with_another_seed_and_with_a_given_one(client: httpx.Client) -> None:
    session = Session(client)
    first = session.turn("Tell me.", max_tokens=24, **SAMPLED)
    others = [
        ok(session.post("regenerate", max_tokens=24, temperature=1.0, ignore_eos=True))
        for _ in range(2)
    ]
    same = ok(session.post("regenerate", turn=first["id"], max_tokens=24, **SAMPLED))
    texts = [text_of(turn) for turn in (first, *others)]
    assert len(set(texts)) == 3
    assert text_of(same) == texts[0]
    answers = [t for t in session.tree() if t["role"] == "assistant"]
    assert [t["id"] for t in answers] == [t["id"] for t in (first, *others, same)]
    assert len({t["parent"] for t in answers}) == 1
    seeds = [Reader(client, t["generation"]).read_all().start["seed"] for t in answers]
    assert seeds[0] == seeds[3] == 11
    assert len(set(seeds)) == 3


# ------------------------------------------------------------------ going on with an answer


def emoji_bias(client: httpx.Client) -> dict[str, int]:
    said = ok(client.post("/tokenize", json={"text": "😀🦊", "add_special_tokens": False}))
    return {str(id_): 100 for id_ in said["tokens"]}


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


# ----------------------------------------------------------------------------- what is computed


def test_a_fork_computes_what_is_new(server: Server, client: httpx.Client) -> None:
    session = Session(client)
    session.turn("Tell me of rivers. " * 20, max_tokens=100, **SAMPLED)
    session.turn("And of the sea.", max_tokens=100, **SAMPLED)
    parent = session.get()
    tokens = parent["turns"][-1]["token_ids"]
    server.wait_idle()

    def check(fork: Session, turn: dict[str, Any], before: float, cut: int, own: int) -> None:
        """Up to the block that holds token `cut` of the path everything was found. `own` tokens of
        the prompt are the answer's, and are counted as neither found nor computed."""
        usage = fork.usage(turn)
        prompt = usage["prompt_tokens"] - own
        found = usage["prompt_tokens_details"]["cached_tokens"]
        assert found == min(cut // BLOCK * BLOCK, prompt)
        assert computed(server) - before == prompt - found

    path = session.tokens()
    history = len(path)
    at_turn = session.fork(at=parent["turns"][1]["id"])
    first = len(at_turn.tokens())
    before = computed(server)
    answer = at_turn.turn("Go on elsewhere.", max_tokens=20, **SAMPLED)
    # The template begins both turns alike.
    alike = next(i for i, (a, b) in enumerate(zip(path, at_turn.tokens(), strict=False)) if a != b)
    assert first < alike < first + BLOCK
    check(at_turn, answer, before, alike, 0)

    base = history - len(tokens)
    for cut in (1, 40, 77):
        other = (tokens[cut] + 1) % 400 + 40
        fork = session.fork(token=cut, replace=other)
        before = computed(server)
        answer = ok(fork.post("continue", max_tokens=20))
        check(fork, answer, before, base + cut, cut + 1)
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


# ------------------------------------------------------------------------------------ overflow


def test_overflow_is_an_error_or_drops_the_oldest(tiny_model: Path) -> None:
    long = "The river runs to the sea. " * 6
    with serving(str(tiny_model)) as server, connected(server) as client:
        strict = Session(client)
        strict.turn(long, max_tokens=100, **SAMPLED)
        strict.turn(long, max_tokens=100, **SAMPLED)
        before = strict.get()
        full = error(
            strict.post("turns", input=long, max_tokens=100, **SAMPLED),
            400,
            "context_length_exceeded",
        )
        assert "512" in full["message"] and "drop_oldest" in full["message"]
        assert strict.get() == before  # nothing was added

        loose = Session(client, overflow="drop_oldest")
        answers = [loose.turn(f"{i}: {long}", max_tokens=100, **SAMPLED) for i in range(6)]
        reported = [t.get("dropped") or 0 for t in loose.turns()]
        assert max(reported) > 0
        assert all(turn["num_tokens"] == 100 for turn in answers)
        assert [t["role"] for t in loose.turns()] == ["user", "assistant"] * 6  # all are kept
        for answer in answers:
            assert loose.usage(answer)["prompt_tokens"] + 100 <= 512
        cache = loose.cache()["last_turn"]
        assert cache["prompt_tokens"] <= 412
        rewrites = [t["rewrite"] for t in loose.turns() if "rewrite" in t]
        assert rewrites and all(r["reason"] == "dropped" for r in rewrites)
        # A message that fits nowhere is an error in every session.
        error(loose.post("turns", input=long * 9), 400, "context_length_exceeded")


# ------------------------------------------------------------------------------------- deleting


def test_deleting_removes_the_kv_that_nobody_else_uses(model: Path, tmp_path: Path) -> None:
    def files() -> int:
        return len(list((tmp_path / "kv").glob("??/*.kv")))

    def on_disk(session: Session) -> int:
        return int(session.cache()["on_disk"])

    with (
        serving(str(model), env={"HEADWATER_DATA": str(tmp_path)}) as server,
        connected(server) as client,
    ):
        session = Session(client)
        session.turn("Tell me of rivers. " * 10, max_tokens=60, **SAMPLED)
        fork = session.fork()
        session.turn("And the sea, in many words.", max_tokens=90, **SAMPLED)
        ok(session.post("regenerate", max_tokens=90, temperature=1.0, ignore_eos=True))
        fork.turn("Something else.", max_tokens=50, **{**SAMPLED, "seed": 3})
        full = (len(fork.tokens()) - 1) // BLOCK * BLOCK
        wait_until(lambda: on_disk(fork) == full, 20, "the fork is not on disk")
        size = (len(session.tokens()) - 1) // BLOCK * BLOCK
        wait_until(lambda: on_disk(session) == size, 20, "the session is not on disk")
        generation = session.last()["generation"]
        assert files() > full // BLOCK
        session.delete()
        wait_until(lambda: files() == full // BLOCK, 10, "the session's blocks stay")
        assert on_disk(fork) == full
        for path in ("", "/tree", "/cache", "/export"):
            error(client.get(session.url + path), 404, "not_found")
        error(client.get(f"/v1/streams/{generation}"), 404, "not_found")
        error(client.delete(session.url), 404, "not_found")
        assert server.metric("headwater_blocks", state="cached", tier="device") == full // BLOCK

        # Also while it runs.
        running = Session(client)
        reader = running.begin("Go on and on.", max_tokens=3000, **SAMPLED)
        reader.read(30)
        running.delete()
        wait_until(lambda: files() == full // BLOCK, 10, "the running one's blocks stay")
        server.wait_idle()
        fork.turn("Still there?", max_tokens=4, **SAMPLED)
        assert fork.usage(fork.last())["prompt_tokens_details"]["cached_tokens"] == full
        fork.delete()
        wait_until(lambda: files() == 0, 10, "blocks stay")


# ------------------------------------------------------------------- finding, leaving, coming back


def test_searching_and_paging(client: httpx.Client) -> None:
    made = [Session(client, title=f"Zephyr {i}").id for i in range(7)]
    Session(client, title="Nothing to see").turn(
        [{"role": "user", "content": "the word is Xylophone"}], answer=False
    )

    def pages(**query: Any) -> list[str]:
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = ok(client.get("/v1/sessions", params={"limit": 3, **query, **after}))
            assert page["object"] == "list"
            ids = [entry["id"] for entry in page["data"]]
            assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
            found += ids
            if not page["has_more"]:
                return found
            after = {"after": ids[-1]}

    assert pages(q="zephyr") == made[::-1]
    assert len(pages(q="xylophone")) == 1
    everything = pages()
    assert len(everything) == len(set(everything)) and set(made) < set(everything)
    nothing = ok(client.get("/v1/sessions", params={"q": "%_"}))
    assert (nothing["data"], nothing["first_id"], nothing["has_more"]) == ([], None, False)
    assert error(client.get("/v1/sessions?after=sess_x"), 400, "invalid_value")["param"] == "after"
    for query in ("limit=0", "limit=101", "limit=x"):
        error(client.get(f"/v1/sessions?{query}"), 400, "invalid_value")
    ok(client.patch(f"/v1/sessions/{made[3]}", json={"title": "Renamed", "metadata": {"a": 1}}))
    renamed = ok(client.get(f"/v1/sessions/{made[3]}"))
    assert (renamed["title"], renamed["metadata"]) == ("Renamed", {"a": 1})
    assert made[3] not in pages(q="zephyr")


def test_export_and_import(client: httpx.Client) -> None:
    session = Session(
        client,
        title="Rivers",
        instructions="Be short.",
        metadata={"a": "b"},
        defaults={"temperature": 0.5},
    )
    bias = emoji_bias(client)
    session.turn("Tell me of *rivers* 😀.", max_tokens=12, **SAMPLED)
    for count in range(3, 9):  # some of them end within a character
        ok(session.post("regenerate", max_tokens=count, logit_bias=bias, **SAMPLED))
    session.turn("And\nthe sea?", max_tokens=12, stop=["e", "a"], **SAMPLED)
    broken = session.begin("More", max_tokens=3000, logit_bias=bias, **SAMPLED)
    broken.read(3)
    ok(client.post(f"{session.url}/cancel"))

    document = ok(client.get(f"{session.url}/export"))
    assert (document["format"], document["version"]) == ("headwater.session", 1)
    copy = Session(client, ok(client.post("/v1/sessions/import", json=document))["id"])
    assert copy.id != session.id

    def plain(of: Session) -> list[Any]:
        tree = of.tree()
        number = {turn["id"]: i for i, turn in enumerate(tree)} | {None: -1}
        return [
            (number[t["parent"]], t["role"], t["content"], t["status"], t["num_tokens"])
            for t in tree
        ]

    assert plain(copy) == plain(session)
    assert {t["id"] for t in copy.tree()}.isdisjoint(t["id"] for t in session.tree())
    assert copy.tokens() == session.tokens()
    for name in ("title", "instructions", "metadata", "defaults", "overflow"):
        assert copy.get()[name] == session.get()[name]
    again = ok(client.get(f"{copy.url}/export"))
    for a, b in zip(again["turns"], document["turns"], strict=True):
        assert (a["token_ids"], a["prompt_token_ids"]) == (b["token_ids"], b["prompt_token_ids"])
    # It goes on as the first one does.
    answers = [text_of(s.turn("And?", max_tokens=20, **SAMPLED)) for s in (session, copy)]
    assert answers[0] == answers[1]

    answer = next(t for t in document["turns"] if t["role"] == "assistant")
    answer["token_ids"][0] ^= 1
    forged = error(client.post("/v1/sessions/import", json=document), 400, "invalid_value")
    assert forged["param"].endswith("token_ids")

    page = client.get(f"{session.url}/export?format=markdown")
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    path = session.turns()
    at = -1
    for part in ("# Rivers", "> Be short.", "## User", *(text_of(t) for t in path)):
        assert part in page.text
    for turn in path:
        assert page.text.index(text_of(turn), at + 1) > at
        at = page.text.index(text_of(turn), at + 1)
    assert "(interrupted)" in page.text
    error(client.get(f"{session.url}/export?format=pdf"), 400, "invalid_value")


def test_unknown_fields_are_refused(client: httpx.Client) -> None:
    session = Session(client)
    session.turn("Hi", max_tokens=2, **SAMPLED)
    for method, path, body in (
        ("POST", "/v1/sessions", {}),
        ("PATCH", session.url, {}),
        ("POST", f"{session.url}/turns", {"input": "x"}),
        ("POST", f"{session.url}/regenerate", {}),
        ("POST", f"{session.url}/continue", {}),
        ("POST", f"{session.url}/fork", {}),
        ("POST", "/v1/sessions", {"defaults": {"nonsense": 1}}),
    ):
        answer = client.request(method, path, json={"nonsense": 1, **body})
        found = error(answer, 400, "invalid_value")
        assert "nonsense" in (found["param"] or "") + found["message"], path
    assert len(session.tree()) == 2


def test_what_belongs_to_others_is_not_there(model: Path, tmp_path: Path) -> None:
    keys = {name: make_key() for name in ("ada", "bob")}
    file = tmp_path / "keys"
    file.write_text("\n".join(key_line(name, key) for name, key in keys.items()))
    file.chmod(0o600)
    with serving(str(model), "--api-keys-file", str(file)) as server, connected(server) as client:
        server.headers = {"authorization": f"Bearer {keys['ada']}"}
        as_bob = {"authorization": f"Bearer {keys['bob']}"}
        client.headers.update(server.headers)
        session = Session(client, title="Mine")
        turn = session.turn("Tell me of rivers. " * 8, max_tokens=40, **SAMPLED)
        generation = turn["generation"]
        for method, path, body in (
            ("GET", "", None),
            ("PATCH", "", {"title": "Yours"}),
            ("DELETE", "", None),
            ("GET", "/tree", None),
            ("POST", "/turns", {"input": "x"}),
            ("POST", "/regenerate", {}),
            ("POST", "/continue", {}),
            ("POST", "/cancel", {}),
            ("POST", "/fork", {}),
            ("GET", "/cache", None),
            ("GET", "/export", None),
            ("GET", "/export?format=markdown", None),
        ):
            answer = client.request(method, session.url + path, json=body, headers=as_bob)
            error(answer, 404, "not_found")
        for method in ("GET", "DELETE"):
            answer = client.request(method, f"/v1/streams/{generation}", headers=as_bob)
            error(answer, 404, "not_found")
        assert ok(client.get("/v1/sessions", headers=as_bob))["data"] == []
        error(client.get(f"/v1/sessions?after={session.id}", headers=as_bob), 400, "invalid_value")
        # A running one neither, and the same prompt shares nothing.
        running = session.begin("Go on.", max_tokens=3000, **SAMPLED)
        running.read(2)
        for method, path in (
            ("GET", f"/v1/streams/{running.generation}"),
            ("DELETE", f"/v1/streams/{running.generation}"),
            ("POST", f"{session.url}/cancel"),
        ):
            error(client.request(method, path, headers=as_bob), 404, "not_found")
        assert session.get()["generating"] == running.generation
        ok(client.delete(f"/v1/streams/{running.generation}"))
        server.wait_idle()
        with httpx.Client(base_url=server.url, headers=as_bob, timeout=60) as other:
            copy = Session(other, title="Mine")
            same = copy.turn("Tell me of rivers. " * 8, max_tokens=40, **SAMPLED)
            assert text_of(same) == text_of(turn)
            assert copy.usage(same)["prompt_tokens_details"]["cached_tokens"] == 0


# ----------------------------------------------------------------------------------- idempotency


def duplicates(
    client: httpx.Client, path: str, body: dict[str, Any], key: str, count: int
) -> list[httpx.Response]:
    """The same request, `count` times at once."""
    barrier = threading.Barrier(count)

    def send(_: int) -> httpx.Response:
        barrier.wait(30)
        return client.post(path, json=body, headers={"idempotency-key": key})

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(send, range(count)))


def texts_of(responses: list[httpx.Response]) -> set[str]:
    texts = set()
    for response in responses:
        assert response.status_code == 200, response.text
        if response.headers["content-type"].startswith("application/json"):
            document = response.json()
            if "choices" in document:
                texts.add(document["choices"][0]["message"]["content"])
            else:
                texts.add(text_of(document))
        else:
            frames = [
                json.loads(line.removeprefix("data: "))
                for line in response.text.splitlines()
                if line.startswith("data: {")
            ]
            texts.add(
                "".join(
                    f["choices"][0]["delta"].get("content", "") if "choices" in f else f["text"]
                    for f in frames
                    if "choices" in f or "text" in f
                )
            )
    return texts


def test_200_duplicates_at_once_and_after_a_restart(model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, **SAMPLED}
    with (
        serving(str(model), env=env) as server,
        httpx.Client(
            base_url=server.url, timeout=90, limits=httpx.Limits(max_keepalive_connections=0)
        ) as client,
    ):
        session = Session(client)
        requests: dict[str, tuple[str, dict[str, Any]]] = {
            "turn": (f"{session.url}/turns", {"input": "Hi", "max_tokens": 30, **SAMPLED}),
            "streamed turn": (
                f"{session.url}/turns",
                {"input": "Ho", "max_tokens": 30, "stream": True, "on_busy": "queue", **SAMPLED},
            ),
            "chat": ("/v1/chat/completions", chat),
            "streamed chat": ("/v1/chat/completions", {**chat, "stream": True}),
            "resumable chat": ("/v1/chat/completions", {**chat, "resumable": True}),
            "resumable stream": (
                "/v1/chat/completions",
                {**chat, "resumable": True, "stream": True},
            ),
        }
        made: dict[str, tuple[str, set[str]]] = {}
        for key, (path, body) in requests.items():
            before = server.metric("headwater_decode_tokens_total")
            answers = duplicates(client, path, body, key, 200)
            (generation,) = {answer.headers["x-headwater-generation"] for answer in answers}
            texts = texts_of(answers)
            assert len(texts) == 1, key
            assert len(next(iter(texts))) > 10
            made[key] = generation, texts
            server.wait_idle()
            assert server.metric("headwater_decode_tokens_total") - before == 30, key
            changed = client.post(
                path, json={**body, "max_tokens": 31}, headers={"idempotency-key": key}
            )
            error(changed, 409, "idempotency_conflict")
        assert [t["role"] for t in session.turns()] == ["user", "assistant"] * 2
        answers = duplicates(client, "/v1/sessions", {"title": "Once"}, "session", 200)
        (created,) = {answer.json()["id"] for answer in answers}
        assert len(ok(client.get("/v1/sessions?q=Once"))["data"]) == 1
        forks = duplicates(client, f"{session.url}/fork", {}, "fork", 20)
        assert len({answer.json()["id"] for answer in forks}) == 1
        for key in ("", "x" * 256):
            sent = client.post("/v1/sessions", json={}, headers={"idempotency-key": key})
            error(sent, 400, "invalid_value")
        kill_all(server)
    with serving(str(model), env=env) as server, connected(server) as client:
        for key in ("turn", "streamed turn", "resumable chat", "resumable stream"):
            path, body = requests[key]
            answer = client.post(path, json=body, headers={"idempotency-key": key})
            generation, texts = made[key]
            assert answer.headers["x-headwater-generation"] == generation
            assert texts_of([answer]) == texts
            changed = client.post(
                path, json={**body, "max_tokens": 31}, headers={"idempotency-key": key}
            )
            error(changed, 409, "idempotency_conflict")
        again = client.post(
            "/v1/sessions", json={"title": "Once"}, headers={"idempotency-key": "session"}
        )
        assert ok(again)["id"] == created
        assert server.metric("headwater_decode_tokens_total") == 0


def kill_all(server: Server) -> None:
    """kill -9 of both processes."""
    engine = server.engine
    server.process.kill()
    server.process.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        engine.kill()
        engine.wait(5)


# ------------------------------------------------------------------------------ the default model


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
        kill_all(server)
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
