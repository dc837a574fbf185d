"""Two owners on one server: they share no KV, and nobody finds what is somebody else's."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.owners import key_line, make_key
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.e2e

# Each test has owners of its own, so that they can share a server.
KEYS = {name: make_key() for name in ("alice", "bob", "carol", "dan", "erin", "frank", "grace")}
LIMIT = {"grace": 3}
PROMPT = "The river bends because the water is faster on the outside of the curve. " * 3
BODY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(tiny_model: Path, data: Path) -> Iterator[Server]:
    keys = data / "keys"
    keys.write_text("\n".join(key_line(name, key, LIMIT.get(name)) for name, key in KEYS.items()))
    keys.chmod(0o600)
    env = {"HEADWATER_DATA": str(data)}
    with serving(str(tiny_model), "--api-keys-file", str(keys), env=env) as server:
        server.headers = bearer("alice")
        yield server


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def client(server: Server, name: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers=bearer(name), timeout=60)


def new_session(owner: httpx.Client, prompt: str = PROMPT) -> dict[str, Any]:
    """A session with one answer; `turn` and `generation` are the answer's."""
    session: str = owner.post("/v1/sessions", json={}).json()["id"]
    answer = owner.post(f"/v1/sessions/{session}/turns", json={**BODY, "input": prompt})
    assert answer.status_code == 200, answer.text
    turns = owner.get(f"/v1/sessions/{session}").json()["turns"]
    return {
        "session": session,
        "question": turns[0]["id"],
        "turn": turns[1]["id"],
        "generation": answer.headers["x-headwater-generation"],
        "text": turns[1]["content"],
    }


# ---------------------------------------------------------------------------------- the cache


def ask_all_ways(owner: httpx.Client) -> list[tuple[int, int, str]]:
    """Prompt tokens, cached tokens and text of the same prompt in a completion, a chat and a
    session."""
    completion = owner.post("/v1/completions", json={**BODY, "prompt": PROMPT}).json()
    messages = [{"role": "user", "content": f"{PROMPT} In a chat."}]
    chat = owner.post("/v1/chat/completions", json={**BODY, "messages": messages}).json()
    session = new_session(owner, f"In a session: {PROMPT}")
    report = owner.get(f"/v1/sessions/{session['session']}/cache").json()["last_turn"]
    found = []
    for answer, text in (
        (completion, completion["choices"][0]["text"]),
        (chat, chat["choices"][0]["message"]["content"]),
    ):
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        found.append((usage["prompt_tokens"], cached, text))
    cached = sum(report["cached_tokens"].values())
    return [*found, (report["prompt_tokens"], cached, session["text"][0]["text"])]


def full_blocks(num_tokens: int) -> int:
    return (num_tokens - 1) // 16 * 16


def test_the_same_prompt_of_two_owners_shares_no_block(server: Server, data: Path) -> None:
    def cached() -> float:
        return server.metric("headwater_blocks", state="cached", tier="device")

    def all_files() -> set[str]:
        return {file.name for file in (data / "kv").glob("??/*.kv")}

    server.wait_idle()
    wait_until(lambda: len(all_files()) == cached(), 20, "what others computed is not written")
    of_others, files_of_others = cached(), all_files()

    def cached_blocks() -> float:
        return cached() - of_others

    def files() -> set[str]:
        return all_files() - files_of_others

    def written(count: float) -> set[str]:
        wait_until(lambda: len(files()) == count, 20, "the blocks are not written")
        return files()

    with client(server, "alice") as alice, client(server, "bob") as bob:
        first = ask_all_ways(alice)
        assert [cached for _, cached, _ in first] == [0, 0, 0]
        num_blocks = cached_blocks()
        assert num_blocks >= 3 * (full_blocks(min(first)[0]) // 16)
        hers = written(num_blocks)
        # The same tokens, and not one block of them.
        others = ask_all_ways(bob)
        assert others == first
        assert cached_blocks() == 2 * num_blocks
        assert len(written(2 * num_blocks) - hers) == len(hers)
        # What is one's own is found, so it could have been found.
        for owner in (alice, bob):
            again = ask_all_ways(owner)
            assert [(n, text) for n, _, text in again] == [(n, text) for n, _, text in first]
            assert [cached for _, cached, _ in again] == [full_blocks(n) for n, _, _ in first]
        # Nor does the other's end take anything away, or leave anything behind.
        for session in alice.get("/v1/sessions").json()["data"]:
            assert alice.delete(f"/v1/sessions/{session['id']}").status_code == 204
        assert [cached for _, cached, _ in ask_all_ways(bob)] == [
            full_blocks(n) for n, _, _ in first
        ]
        assert ask_all_ways(alice)[2][1] == 0


# ---------------------------------------------------------------------------------- the routes

# What makes each route with an id succeed for the owner, in an order in which all of them do.
# `{turn}` and the like stand for the ids of what the owner has.
BODIES: dict[tuple[str, str], list[dict[str, Any] | None]] = {
    ("GET", "/v1/sessions/{id}"): [None],
    ("GET", "/v1/sessions/{id}/tree"): [None],
    ("GET", "/v1/sessions/{id}/cache"): [None],
    ("GET", "/v1/sessions/{id}/export"): [None],
    ("GET", "/v1/streams/{id}"): [None],
    ("PATCH", "/v1/sessions/{id}"): [{"title": "mine"}, {"head": "{turn}"}],
    ("POST", "/v1/sessions/{id}/fork"): [{}, {"at": "{turn}", "token": 1}],
    ("POST", "/v1/sessions/{id}/turns"): [
        {"input": "More.", **BODY},
        {"input": "Again.", "answer": False, "parent": "{turn}"},
        {"input": "Anew.", "answer": False, "parent": None},
    ],
    ("POST", "/v1/sessions/{id}/regenerate"): [BODY, {"turn": "{turn}", **BODY}],
    ("POST", "/v1/sessions/{id}/continue"): [{"max_tokens": 4}],
    ("POST", "/v1/sessions/{id}/cancel"): [{}],
    ("DELETE", "/v1/streams/{id}"): [None],
    ("DELETE", "/v1/sessions/{id}"): [None],
}


def routes_with_ids(owner: httpx.Client) -> set[tuple[str, str]]:
    """All routes of sessions and streams that name one, as the server itself tells them."""
    found = set()
    for path, methods in owner.get("/openapi.json").json()["paths"].items():
        if path.startswith(("/v1/sessions", "/v1/streams")) and "{" in path:
            found |= {(method.upper(), path) for method in methods}
    return found


def send(
    owner: httpx.Client,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    ids: dict[str, Any],
) -> httpx.Response:
    id_ = ids["generation" if "streams" in path else "session"]
    if body is not None:
        names = {"{turn}": ids["turn"]}
        body = {
            key: names.get(value, value) if isinstance(value, str) else value
            for key, value in body.items()
        }
    return owner.request(method, path.replace("{id}", id_), json=body)


def assert_not_found(response: httpx.Response) -> str:
    assert response.status_code == 404, f"{response.request.url}: {response.text}"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")
    return str(error["message"])


def test_all_routes_answer_404_to_the_ids_of_others(server: Server) -> None:
    with client(server, "carol") as carol, client(server, "dan") as dan:
        assert routes_with_ids(carol) == BODIES.keys(), "a route is not tried here"
        ids, own = new_session(carol), new_session(dan, "Mine.")
        running = new_running(carol)
        server.engine.suspend()  # so that it still runs when it is asked for
        nothing = {
            "session": "sess_" + "0" * 32,
            "generation": "gen_" + "0" * 32,
            "turn": "turn_" + "0" * 32,
        }
        before = carol.get(f"/v1/sessions/{ids['session']}/export").json()
        for (method, path), bodies in BODIES.items():
            for body in bodies:
                told = assert_not_found(send(dan, method, path, body, ids))
                # The same words as for what there is not.
                unknown = assert_not_found(send(dan, method, path, body, nothing))
                for name in ("session", "generation"):
                    told = told.replace(ids[name], nothing[name])
                assert told == unknown
                assert_not_found(send(dan, method, path, body, running))
        assert carol.get(f"/v1/sessions/{ids['session']}/export").json() == before
        assert carol.get(f"/v1/sessions/{running['session']}").json()["generating"] is not None
        listed = dan.get("/v1/sessions").json()["data"]
        assert [session["id"] for session in listed] == [own["session"]]
        assert dan.get("/v1/sessions?q=river").json()["data"] == []
        assert_invalid_or_not_found(dan.get(f"/v1/sessions?after={ids['session']}"))
        # The ids of her turns are nothing in his own session either.
        for method, path, body in (
            ("PATCH", "", {"head": ids["turn"]}),
            ("POST", "/turns", {"input": "x", "parent": ids["turn"], "answer": False}),
            ("POST", "/regenerate", {"turn": ids["turn"], **BODY}),
            ("POST", "/fork", {"at": ids["turn"]}),
        ):
            assert_not_found(dan.request(method, f"/v1/sessions/{own['session']}{path}", json=body))
        # And all of it works for her: it was not a 404 for another reason.
        cancel = ("POST", "/v1/sessions/{id}/cancel")
        assert send(carol, *cancel, {}, running).json()["id"] == running["generation"]
        server.engine.resume()
        wait_until(server.ready, 10, "the engine does not go on")
        for (method, path), bodies in BODIES.items():
            for body in bodies if (method, path) != cancel else []:
                answer = send(carol, method, path, body, ids)
                assert answer.status_code in (200, 204), f"{method} {path}: {answer.text}"


def assert_invalid_or_not_found(response: httpx.Response) -> None:
    assert response.status_code in (400, 404), response.text


def new_running(owner: httpx.Client) -> dict[str, Any]:
    """A session whose answer runs."""
    session: str = owner.post("/v1/sessions", json={}).json()["id"]
    body = {"input": "On and on.", "stream": True, "ignore_eos": True}
    with owner.stream("POST", f"/v1/sessions/{session}/turns", json=body) as response:
        generation = response.headers["x-headwater-generation"]
    turns = owner.get(f"/v1/sessions/{session}").json()["turns"]
    return {"session": session, "generation": generation, "turn": turns[-1]["id"]}


def test_an_idempotency_key_is_its_owners(server: Server) -> None:
    key = {"idempotency-key": "the same"}
    with client(server, "erin") as erin, client(server, "frank") as frank:
        made = [owner.post("/v1/sessions", json={}, headers=key).json() for owner in (erin, frank)]
        assert made[0]["id"] != made[1]["id"]
        again = erin.post("/v1/sessions", json={}, headers=key).json()
        assert again["id"] == made[0]["id"]
        assert_not_found(frank.get(f"/v1/sessions/{made[0]['id']}"))


# ---------------------------------------------------------------------------------- the limit


def test_turns_beyond_the_limit_of_an_owner_leave_nothing(server: Server, data: Path) -> None:
    """Of eight turns at once three run; the others are refused, and can be sent again."""
    count, limit = 8, LIMIT["grace"]
    with client(server, "grace") as grace:
        sessions = [grace.post("/v1/sessions", json={}).json()["id"] for _ in range(count)]
        before = [grace.get(f"/v1/sessions/{session}").json() for session in sessions]
        barrier = threading.Barrier(count)

        def ask(i: int) -> httpx.Response:
            barrier.wait(30)
            return grace.post(
                f"/v1/sessions/{sessions[i]}/turns",
                json={**BODY, "input": f"{i}?"},
                headers={"idempotency-key": f"turn {i}"},
            )

        server.engine.suspend()  # so that none ends before all were sent
        with ThreadPoolExecutor(count) as pool:
            sent = [pool.submit(ask, i) for i in range(count)]
            wait_until(
                lambda: sum(each.done() for each in sent) == count - limit,
                10,
                "too few are refused",
            )
            refused = [i for i, each in enumerate(sent) if each.done()]
            for i in refused:
                answer = sent[i].result()
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
                assert int(answer.headers["retry-after"]) >= 1
                assert grace.get(f"/v1/sessions/{sessions[i]}").json() == before[i]
                assert grace.get(f"/v1/sessions/{sessions[i]}/tree").json()["turns"] == []
            # One more of the same owner is refused wherever it is asked for.
            for path, body in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
                (f"/v1/sessions/{sessions[refused[0]]}/turns", {"input": "Hi"}),
                ("/v1/responses", {"input": "Hi", "background": True}),
            ):
                assert grace.post(path, json=body).status_code == 429, path
            for table, column, names, num_rows in (
                ("session", "owner", ["grace"], count),
                ("turn", "session", sessions, 2 * limit),
                ("generation", "owner", ["grace"], limit),
            ):
                assert rows(data, table, column, names) == num_rows, table
            server.engine.resume()
            answers = [each.result(30) for each in sent]
        assert [answer.status_code for answer in answers].count(200) == limit
        for i in refused:  # the key was not used up
            barrier = threading.Barrier(1)
            assert ask(i).json()["status"] == "complete"
        for session in sessions:
            assert len(grace.get(f"/v1/sessions/{session}/tree").json()["turns"]) == 2


def rows(data: Path, table: str, column: str, values: list[str]) -> int:
    """How many in the store have one of these values."""
    with contextlib.closing(sqlite3.connect(data / "headwater.db")) as store:
        marks = ",".join("?" * len(values))
        query = f"SELECT count(*) FROM {table} WHERE {column} IN ({marks})"
        return int(store.execute(query, values).fetchone()[0])
