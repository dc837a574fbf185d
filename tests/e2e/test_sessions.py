"""Sessions through a real server: who may when, branches, what is kept and what is deleted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.owners import key_line, make_key
from tests.e2e.session_client import (
    BLOCK,
    SAMPLED,
    Session,
    connected,
    emoji_bias,
    error,
    ok,
    text_of,
)
from tests.e2e.streams import Reader
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.e2e


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
    assert text_of(kept) == running.read_all().text
    assert kept["token_ids"] == running.token_ids
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def empty_server(wide_model: Path, data: Path) -> Iterator[Server]:
    """A server that has not one block of KV before a test and after it; its `data`."""
    with serving(str(wide_model), env={"HEADWATER_DATA": str(data)}) as server:
        yield server


def kv_files(data: Path) -> int:
    return len(list((data / "kv").glob("??/*.kv")))


def full_blocks(session: Session) -> int:
    """How many blocks its path fills; the last token is never computed."""
    return (len(session.tokens()) - 1) // BLOCK


def wait_on_disk(*sessions: Session) -> None:
    for session in sessions:
        size = full_blocks(session) * BLOCK
        wait_until(partial(is_on_disk, session, size), 20, "the session is not on disk")


def is_on_disk(session: Session, size: int) -> bool:
    return bool(session.cache()["on_disk"] == size)


def test_deleting_removes_the_kv_that_nobody_else_uses(empty_server: Server, data: Path) -> None:
    def files() -> int:
        return kv_files(data)

    def on_disk(session: Session) -> int:
        return int(session.cache()["on_disk"])

    server = empty_server
    with connected(server) as client:
        session = Session(client)
        session.turn("Tell me of rivers. " * 10, max_tokens=60, **SAMPLED)
        fork = session.fork()
        session.turn("And the sea, in many words.", max_tokens=90, **SAMPLED)
        ok(session.post("regenerate", max_tokens=90, temperature=1.0, ignore_eos=True))
        fork.turn("Something else.", max_tokens=50, **{**SAMPLED, "seed": 3})
        wait_on_disk(fork, session)
        full = full_blocks(fork) * BLOCK
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


def test_deleting_keeps_what_forks_of_earlier_turns_have(empty_server: Server, data: Path) -> None:
    """Forks at an earlier turn and inside an answer keep the KV up to there, nothing of what came
    after it, and find their own."""

    def cached() -> float:
        return empty_server.metric("headwater_blocks", state="cached", tier="device")

    with connected(empty_server) as client:
        parent = Session(client)
        first = parent.turn("Tell me of rivers. " * 8, max_tokens=50, **SAMPLED)
        second = parent.turn("And of the sea.", max_tokens=90, **SAMPLED)
        parent.turn("And of the rain.", max_tokens=70, **SAMPLED)
        ok(parent.post("regenerate", max_tokens=60, temperature=1.0, ignore_eos=True))
        wait_on_disk(parent)
        plain = parent.fork(at=first["id"])  # neither of them has computed anything
        cut = parent.fork(at=second["id"], token=40)
        written = parent.fork(at=first["id"])
        written.turn("Something else.", max_tokens=40, **SAMPLED)
        wait_on_disk(written)
        # The cut one's path has the plain one's blocks at its beginning, the written one's too.
        shared = common_blocks(cut.tokens(), written.tokens())
        kept = full_blocks(cut) + full_blocks(written) - shared
        assert full_blocks(plain) <= shared < full_blocks(cut) < full_blocks(parent)
        before = kv_files(data)
        empty_server.wait_idle()
        assert before == cached() > kept
        parent.delete()
        wait_until(lambda: kv_files(data) == kept, 10, "later turns' blocks stay on disk")
        wait_until(lambda: cached() == kept, 10, "later turns' blocks stay in memory")
        for fork in (plain, cut, written):
            assert fork.cache()["tiers"]["device"] == full_blocks(fork) * BLOCK
        found = {}
        for fork in (plain, cut, written):
            path = full_blocks(fork) * BLOCK
            turn = fork.turn("Still there?", max_tokens=4, **SAMPLED)
            found[fork.id] = fork.usage(turn)["prompt_tokens_details"]["cached_tokens"] - path
        # The first block of a turn that is appended may be another one's.
        assert set(found.values()) <= {0, BLOCK}
        for fork in (plain, cut, written):
            fork.delete()
        wait_until(lambda: kv_files(data) == cached() == 0, 10, "blocks stay")


def common_blocks(one: list[int], other: list[int]) -> int:
    """How many full blocks two sequences begin with in common."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return min(same, len(one) - 1, len(other) - 1) // BLOCK


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


def test_what_belongs_to_others_is_not_there(wide_model: Path, tmp_path: Path) -> None:
    keys = {name: make_key() for name in ("ada", "bob")}
    file = tmp_path / "keys"
    file.write_text("\n".join(key_line(name, key) for name, key in keys.items()))
    file.chmod(0o600)
    with (
        serving(str(wide_model), "--api-keys-file", str(file)) as server,
        connected(server) as client,
    ):
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
