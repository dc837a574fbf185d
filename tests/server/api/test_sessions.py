"""The wire of sessions: shapes field by field, bounds, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.fixtures.server import Server
from tests.server.api.sessions_client import TINY, asked, events, made, refused

TURN = "turn_" + "0" * 32
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def session(http: httpx.Client) -> str:
    """A session with one question and its answer; tests leave it as it is."""
    id = made(http)
    asked(http, id)
    return id


def checked_turn(turn: dict[str, Any], **expected: Any) -> dict[str, Any]:
    """The turn, after a look at its shape and the fields that are expected."""
    assert list(turn) == [
        "id", "object", "session", "parent", "role", "content", "status", "finish_reason",
        "generation", "num_tokens", "created_at",
    ]  # fmt: skip
    assert turn["object"] == "session.turn"
    assert turn["id"].startswith("turn_") and len(turn["id"]) == 37
    assert [set(item) for item in turn["content"]] == [{"type", "text"}] * len(turn["content"])
    assert abs(turn["created_at"] - time.time()) < 600
    assert {name: turn[name] for name in expected} == expected
    return turn


# ---------------------------------------------------------------------------------- sessions


def test_a_new_session(http: httpx.Client) -> None:
    response = http.post("/v1/sessions")
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    now = time.time()
    assert abs(body.pop("created_at") - now) < 600 and abs(body.pop("updated_at") - now) < 600
    assert body.pop("id").startswith("sess_")
    assert body.pop("model")
    assert body == {
        "object": "session",
        "title": None,
        "instructions": None,
        "metadata": {},
        "defaults": {},
        "overflow": "error",
        "head": None,
        "generating": None,
    }


def test_all_fields_come_back(http: httpx.Client) -> None:
    given = {
        "title": "Rivers\u0000 and 日本",
        "instructions": "Be short.",
        "metadata": {"a": "x", "b": 3, "c": 0.5, "d": True, "e": None},
        "defaults": {"temperature": 0.5, "max_tokens": 7, "stop": ["x"], "seed": -3, "top_k": 5},
        "overflow": "drop_oldest",
    }
    body = http.post("/v1/sessions", json=given).json()
    assert {name: body[name] for name in given} == given
    read = http.get(f"/v1/sessions/{body['id']}").json()
    assert read.pop("turns") == []
    assert read == body


def test_patch(http: httpx.Client) -> None:
    id = made(http, title="one", metadata={"a": 1})
    changed = http.patch(f"/v1/sessions/{id}", json={"title": "two"}).json()
    assert (changed["title"], changed["metadata"], changed["defaults"]) == ("two", {"a": 1}, TINY)
    changed = http.patch(
        f"/v1/sessions/{id}", json={"title": None, "metadata": {"b": 2}, "defaults": {}}
    ).json()
    assert (changed["title"], changed["metadata"], changed["defaults"]) == (None, {"b": 2}, {})
    assert http.patch(f"/v1/sessions/{id}").json() == changed


def test_delete(http: httpx.Client) -> None:
    id = made(http)
    turn = asked(http, id)
    response = http.delete(f"/v1/sessions/{id}")
    assert (response.status_code, response.content) == (204, b"")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/tree"), ("GET", "/export")):
        refused(http.request(method, f"/v1/sessions/{id}{path}"), 404, "not_found")
    refused(http.get(f"/v1/streams/{turn['generation']}"), 404, "not_found")


def test_lists(http: httpx.Client) -> None:
    word = f"word{time.monotonic_ns()}"
    ids = [made(http, title=f"{word} {i}") for i in range(5)]
    by_text = made(http)
    asked(http, by_text, f"What is {word.upper()}?", answer=False)
    newest = [by_text, *ids[::-1]]

    def page(**query: Any) -> dict[str, Any]:
        body: dict[str, Any] = http.get("/v1/sessions", params={"q": word, **query}).json()
        assert list(body) == ["object", "data", "first_id", "last_id", "has_more"]
        assert body["object"] == "list"
        data = [entry["id"] for entry in body["data"]]
        assert (body["first_id"], body["last_id"]) == ((data or [None])[0], (data or [None])[-1])
        return body | {"ids": data}

    whole = page()
    assert (whole["ids"], whole["has_more"]) == (newest, False)
    assert {entry["object"] for entry in whole["data"]} == {"session"}
    assert all("turns" not in entry for entry in whole["data"])
    first = page(limit=4)
    assert (first["ids"], first["has_more"]) == (newest[:4], True)
    second = page(limit=4, after=first["last_id"])
    assert (second["ids"], second["has_more"]) == (newest[4:], False)
    assert page(q=word + "?nowhere")["data"] == []
    asked(http, ids[0], "now it is the newest", answer=False)
    assert page(limit=1)["ids"] == [ids[0]]


# ------------------------------------------------------------------------------------- turns


def test_an_answer_is_a_turn(http: httpx.Client) -> None:
    id = made(http)
    response = http.post(f"/v1/sessions/{id}/turns", json={"input": "Why?"})
    answer = checked_turn(
        response.json(),
        session=id,
        role="assistant",
        status="complete",
        finish_reason="length",
        num_tokens=8,
        generation=response.headers["x-headwater-generation"],
    )
    read = http.get(f"/v1/sessions/{id}").json()
    assert read["head"] == answer["id"]
    question, again = read["turns"]
    assert again == answer
    checked_turn(
        question,
        id=answer["parent"],
        parent=None,
        role="user",
        status="complete",
        finish_reason=None,
        generation=None,
        content=[{"type": "text", "text": "Why?"}],
    )


def test_token_ids_on_demand(http: httpx.Client, session: str) -> None:
    read = http.get(f"/v1/sessions/{session}", params={"include": "token_ids"}).json()
    for turn in read["turns"]:
        assert len(turn["token_ids"]) == turn["num_tokens"]
        assert isinstance(turn["prompt_token_ids"], list)
    plain = http.get(f"/v1/sessions/{session}").json()
    assert all("token_ids" not in turn for turn in plain["turns"])
    refused(http.get(f"/v1/sessions/{session}?include=x"), 400, "invalid_value")


def test_several_messages_are_several_turns(http: httpx.Client) -> None:
    id = made(http)
    last = http.post(
        f"/v1/sessions/{id}/turns",
        json={
            "input": [
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": [{"type": "text", "text": "Two"}]},
                {"role": "user", "content": "Three"},
            ],
            "answer": False,
        },
    )
    assert "x-headwater-generation" not in last.headers
    turn = checked_turn(last.json(), role="user", status="complete", generation=None)
    read = http.get(f"/v1/sessions/{id}").json()
    assert read["head"] == turn["id"]
    assert [(t["role"], t["content"][0]["text"]) for t in read["turns"]] == [
        ("user", "One"),
        ("assistant", "Two"),
        ("user", "Three"),
    ]


def test_branches_and_the_tree(http: httpx.Client) -> None:
    id = made(http)
    first = asked(http, id, "One")
    other = http.post(f"/v1/sessions/{id}/regenerate", json={"seed": 5}).json()
    checked_turn(other, parent=first["parent"], role="assistant")
    edited = asked(http, id, "Two", parent=None)
    tree = http.get(f"/v1/sessions/{id}/tree").json()
    assert list(tree) == ["object", "session", "head", "turns"]
    assert (tree["object"], tree["session"], tree["head"]) == ("session.tree", id, edited["id"])
    assert [t["parent"] for t in tree["turns"]] == [
        None, first["parent"], first["parent"], None, edited["parent"],
    ]  # fmt: skip
    for turn in tree["turns"]:
        checked_turn(turn)
    back = http.patch(f"/v1/sessions/{id}", json={"head": first["id"]}).json()
    assert back["head"] == first["id"]
    assert len(http.get(f"/v1/sessions/{id}").json()["turns"]) == 2
    begin = http.patch(f"/v1/sessions/{id}", json={"head": None, "title": "Again"}).json()
    assert (begin["head"], begin["title"]) == (None, "Again")
    assert http.patch(f"/v1/sessions/{id}", json={"title": None}).json()["head"] is None
    assert http.get(f"/v1/sessions/{id}").json()["turns"] == []
    anew = asked(http, id, "Anew", answer=False)
    assert anew["parent"] is None
    under = asked(http, id, "Three", parent=other["id"], answer=False)
    assert under["parent"] == other["id"]


def test_fork_cut_and_continue(http: httpx.Client, session: str) -> None:
    before = http.get(f"/v1/sessions/{session}?include=token_ids").json()
    fork = http.post(f"/v1/sessions/{session}/fork", json={"token": 3, "replace": 70}).json()
    assert fork["object"] == "session" and fork["id"] != session
    assert (fork["generating"], fork["defaults"]) == (None, TINY)
    _, cut = http.get(f"/v1/sessions/{fork['id']}?include=token_ids").json()["turns"]
    assert (cut["status"], cut["finish_reason"]) == ("interrupted", None)
    assert cut["token_ids"] == [*before["turns"][1]["token_ids"][:3], 70]
    response = http.post(f"/v1/sessions/{fork['id']}/continue", json={"max_tokens": 5})
    checked_turn(response.json(), id=cut["id"], status="complete", num_tokens=9)
    assert response.headers["x-headwater-generation"] == response.json()["generation"]
    assert http.get(f"/v1/sessions/{session}?include=token_ids").json() == before


def test_cache(http: httpx.Client, session: str) -> None:
    report = http.get(f"/v1/sessions/{session}/cache").json()
    assert list(report) == [
        "object", "session", "head", "tokens", "block_size", "tiers", "on_disk", "blocks",
        "last_turn",
    ]  # fmt: skip
    assert (report["object"], report["session"]) == ("session.cache", session)
    assert list(report["tiers"]) == ["device", "host", "disk", "none"]
    assert sum(report["tiers"].values()) == report["tokens"]
    size = report["block_size"]
    for i, block in enumerate(report["blocks"]):
        assert list(block) == ["index", "start", "end", "tier", "device", "disk"]
        assert (block["index"], block["start"], block["end"]) == (i, i * size, (i + 1) * size)
    last = report["last_turn"]
    assert list(last) == ["turn", "prompt_tokens", "cached_tokens", "expected_tokens", "miss"]
    assert list(last["cached_tokens"]) == ["device", "host", "disk"]
    empty = http.get(f"/v1/sessions/{made(http)}/cache").json()
    assert (empty["tokens"], empty["blocks"], empty["last_turn"]) == (0, [], None)


def test_export_and_import(http: httpx.Client, session: str) -> None:
    out = http.get(f"/v1/sessions/{session}/export")
    assert out.headers["content-type"] == "application/json"
    document = out.json()
    assert (document["format"], document["version"]) == ("headwater.session", 1)
    new = http.post("/v1/sessions/import", content=out.content, headers=JSON).json()
    assert new["object"] == "session" and new["id"] != session

    def spoken(id: str) -> list[Any]:
        turns = http.get(f"/v1/sessions/{id}?include=token_ids").json()["turns"]
        return [(t["role"], t["content"], t["token_ids"], t["status"]) for t in turns]

    assert spoken(new["id"]) == spoken(session)
    text = http.get(f"/v1/sessions/{session}/export?format=markdown")
    assert text.headers["content-type"] == "text/markdown; charset=utf-8"
    assert text.text.startswith("# A conversation\n\n## User\n\nWhy?\n\n## Assistant\n\n")
    assert asked(http, new["id"], "And?")["status"] == "complete"
    document["turns"][1]["content"][0]["text"] += "!"  # no longer what the tokens spell
    refused(http.post("/v1/sessions/import", json=document), 400, "invalid_value")


def test_a_long_session_of_another_model_is_cut_where_it_fits(http: httpx.Client) -> None:
    """Its sizes in tokens are not known before it is rendered, and 1,000 renderings of 1,000 turns
    would take minutes."""
    turns = [
        {
            "id": f"t{i}",
            "parent": f"t{i - 1}" if i else None,
            "role": ("user", "assistant")[i % 2],
            "content": [{"type": "text", "text": f"Line {i} of a long talk."}],
            "tokenizer": "another",
            "created_at": 1.0,
        }
        for i in range(1000)
    ]
    session = {"overflow": "drop_oldest", "head": "t999", "created_at": 1.0}
    document = {"format": "headwater.session", "version": 1, "session": session, "turns": turns}
    id = http.post("/v1/sessions/import", json=document).json()["id"]
    answer = http.post(
        f"/v1/sessions/{id}/turns", json={"input": "And?", "max_tokens": 8, "ignore_eos": True}
    ).json()
    assert (answer["finish_reason"], answer["num_tokens"]) == ("length", 8), answer
    dropped = max(t.get("dropped") or 0 for t in http.get(f"/v1/sessions/{id}").json()["turns"])
    size = http.get(f"/v1/sessions/{id}/cache").json()["last_turn"]["prompt_tokens"]
    assert dropped % 2 == 0 and dropped > 900
    assert 400 < size <= 512 - 8  # all that fits, or nearly


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
WITH_TOOLS = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "It rains."},
]
LETTERS = "[a-f]{50,80}"


def cut_answer(http: httpx.Client) -> str:
    """A session with messages of tools, and an answer within a grammar that was cut."""
    id = made(http, defaults={})
    body = {"input": WITH_TOOLS, "regex": LETTERS, "max_tokens": 9, "seed": 4}
    answer = http.post(f"/v1/sessions/{id}/turns", json=body)
    checked_turn(answer.json(), finish_reason="length", num_tokens=9)
    return id


def test_a_transcript_with_tools_and_a_grammar_is_gone_on_with(http: httpx.Client) -> None:
    id = cut_answer(http)
    out = http.get(f"/v1/sessions/{id}/export")
    document = out.json()
    assert document["turns"][1]["notes"]["message"]["tool_calls"] == [CALL]
    assert document["turns"][2]["notes"]["message"]["tool_call_id"] == "call_1"
    assert document["turns"][3]["notes"]["params"]["grammar"]["text"] == LETTERS
    new = http.post("/v1/sessions/import", content=out.content, headers=JSON).json()["id"]

    def said(id: str) -> tuple[str, list[int]]:
        """The whole answer, and the path's tokens after one more question."""
        ended = http.post(f"/v1/sessions/{id}/continue", json={"max_tokens": 90}).json()
        assert (ended["status"], ended["finish_reason"]) == ("complete", "stop")
        asked(http, id, "And?", max_tokens=5, seed=6, ignore_eos=True)
        turns = http.get(f"/v1/sessions/{id}?include=token_ids").json()["turns"]
        tokens = [id_ for turn in turns for id_ in turn["prompt_token_ids"] + turn["token_ids"]]
        return ended["content"][0]["text"], tokens

    text, tokens = said(new)
    assert re.fullmatch(LETTERS, text)
    assert said(id) == (text, tokens)
    # And as an answer that nobody cut.
    whole = http.post(
        f"/v1/sessions/{made(http, defaults={})}/turns",
        json={"input": WITH_TOOLS, "regex": LETTERS, "max_tokens": 99, "seed": 4},
    )
    assert whole.json()["content"][0]["text"] == text


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ({"kind": "regex", "text": "a("}, "refused"),
        ({"kind": "lark", "text": "start: nothing"}, "refused"),
        ({"kind": "lark", "text": "endless rules"}, "too much"),
    ],
    ids=["no regex", "no grammar", "too deep"],
)
def test_a_hostile_grammar_in_a_transcript_is_refused(
    tiny_server: Server, http: httpx.Client, grammar: dict[str, str], why: str
) -> None:
    engine = tiny_server.engine.pid
    if grammar["text"] == "endless rules":
        rules = "".join(f'r{i}: r{i + 1} | "y{i}"\n' for i in range(2500))
        grammar = grammar | {"text": f'start: r0\n{rules}r2500: "z"\n'}
    document = http.get(f"/v1/sessions/{cut_answer(http)}/export").json()
    document["session"]["title"] = title = f"hostile {time.monotonic_ns()}"
    document["turns"][3]["notes"]["params"]["grammar"] = grammar
    message = refused(
        http.post("/v1/sessions/import", json=document), 400, "invalid_value", "turns"
    )
    assert why in message
    assert tiny_server.engine.pid == engine and tiny_server.ready()
    assert http.get("/v1/sessions", params={"q": title}).json()["data"] == []  # nothing is stored


def test_a_streamed_turn(http: httpx.Client) -> None:
    id = made(http)
    response = http.post(f"/v1/sessions/{id}/turns", json={"input": "Why?", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    seen = [event for event in events(response.text) if event.name != "progress"]
    turn = http.get(f"/v1/sessions/{id}").json()["turns"][1]
    assert seen[0].data["generation"] == response.headers["x-headwater-generation"]
    assert (seen[0].data["session"], seen[0].data["turn"]) == (id, turn["id"])
    assert "".join(e.data["text"] for e in seen[1:-1]) == turn["content"][0]["text"]
    assert seen[-1].data["turn"] == turn["id"]


def test_an_idempotency_key(http: httpx.Client, session: str) -> None:
    key = {"idempotency-key": f"{session}-1"}
    body = {"input": "Once.", "seed": 1}
    id = made(http)
    first = http.post(f"/v1/sessions/{id}/turns", json=body, headers=key)
    second = http.post(f"/v1/sessions/{id}/turns", json=body, headers=key)
    assert first.json() == second.json()
    other = http.post(f"/v1/sessions/{id}/turns", json={**body, "seed": 2}, headers=key)
    refused(other, 409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"
    assert len(http.get(f"/v1/sessions/{id}/tree").json()["turns"]) == 2
    long = http.post("/v1/sessions", headers={"idempotency-key": "k" * 256})
    refused(long, 400, "invalid_value", "Idempotency-Key")


# --------------------------------------------------------------------------------- conflicts


def test_a_stream_that_waits_for_its_session_is_not_silent(
    http: httpx.Client, tiny_server: Server
) -> None:
    id = made(http)
    body = {"stream": True, "max_tokens": 20, "ignore_eos": True}
    url = f"/v1/sessions/{id}/turns"
    waiting = body | {"on_busy": "queue"}
    with contextlib.ExitStack() as stack:
        tiny_server.engine.suspend()
        try:
            first = stack.enter_context(http.stream("POST", url, json=body | {"input": "Why?"}))
            second, lost = (
                stack.enter_context(http.stream("POST", url, json=waiting | fields))
                for fields in ({"input": "And?"}, {"input": "Or?", "parent": TURN})
            )
            for stream in (second, lost):
                assert stream.status_code == 200
                assert "x-headwater-generation" not in stream.headers
        finally:
            tiny_server.engine.resume()
        first.read()
        told = events(second.read().decode())
        assert [told[0].name, told[-1].name] == ["start", "done"]
        assert told[0].data["session"] == id
        (error,) = events(lost.read().decode())
        assert (error.name, error.data["error"]["code"]) == ("error", "not_found")
    assert len(http.get(f"/v1/sessions/{id}").json()["turns"]) == 4


def test_a_full_line_of_a_session(http: httpx.Client) -> None:
    """One is answered and 64 wait. What is one too many is told at once, and not to queue."""
    id = made(http)
    body = {"input": "?", "parent": None, "max_tokens": 400, "ignore_eos": True, "on_busy": "queue"}

    def ask(_: int) -> httpx.Response:
        return http.post(f"/v1/sessions/{id}/turns", json=body)

    with ThreadPoolExecutor(80) as pool:
        pending = {pool.submit(ask, i) for i in range(80)}
        try:
            answers = (future.result() for future in as_completed(pending))
            busy = next(answer for answer in answers if answer.status_code != 200)
        finally:
            http.delete(f"/v1/sessions/{id}")  # it ends them all
    message = refused(busy, 409, "session_busy")
    assert "64 requests wait" in message and "on_busy" not in message
    assert busy.headers["x-should-retry"] == "false"


def test_a_busy_session(http: httpx.Client) -> None:
    id = made(http)
    body = {"input": "Why?", "stream": True, "max_tokens": 400, "ignore_eos": True}
    with http.stream("POST", f"/v1/sessions/{id}/turns", json=body) as stream:
        running = stream.headers["x-headwater-generation"]
        assert next(stream.iter_text())
        busy = http.post(f"/v1/sessions/{id}/turns", json={"input": "And?"})
        assert running in refused(busy, 409, "session_busy")
        assert busy.headers["x-should-retry"] == "false"
        head = http.get(f"/v1/sessions/{id}").json()
        assert head["generating"] == running
        assert head["turns"][-1]["status"] == "running"
        refused(http.patch(f"/v1/sessions/{id}", json={"head": head["head"]}), 409, "session_busy")
        refused(http.post(f"/v1/sessions/{id}/fork"), 409, "session_busy")
        cancelled = http.post(f"/v1/sessions/{id}/cancel").json()
    assert cancelled == {
        "id": running,
        "object": "generation",
        "finish_reason": "abort",
        "session": id,
        "turn": head["head"],
    }
    after = http.get(f"/v1/sessions/{id}").json()
    assert after["generating"] is None
    checked_turn(after["turns"][-1], status="interrupted", finish_reason="abort")
    refused(http.post(f"/v1/sessions/{id}/cancel"), 409, "invalid_value")


@pytest.mark.parametrize("how", ["cancel", "regenerate", "continue"])
def test_an_empty_session_has_nothing_to_go_on_with(http: httpx.Client, how: str) -> None:
    status = 409 if how == "cancel" else 400
    refused(http.post(f"/v1/sessions/{made(http)}/{how}"), status, "invalid_value")


def test_an_answer_that_came_to_its_end_is_not_continued(http: httpx.Client) -> None:
    id = made(http)
    asked(http, id, "One", answer=False)
    refused(http.post(f"/v1/sessions/{id}/continue"), 400, "invalid_value")
    fork = http.post(f"/v1/sessions/{id}/fork", json={"token": 0})
    refused(fork, 400, "invalid_value", "token")
    answered = made(http)
    asked(http, answered)
    ended = http.post(f"/v1/sessions/{answered}/fork", json={"token": 1, "replace": 2}).json()
    _, turn = http.get(f"/v1/sessions/{ended['id']}").json()["turns"]
    assert (turn["status"], turn["finish_reason"]) == ("complete", "stop")
    refused(http.post(f"/v1/sessions/{ended['id']}/continue"), 400, "invalid_value")


# ------------------------------------------------------------------------- what is not there

ROUTES = [
    ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/tree"), ("GET", "/cache"),
    ("GET", "/export"), ("POST", "/turns"), ("POST", "/regenerate"), ("POST", "/continue"),
    ("POST", "/cancel"), ("POST", "/fork"),
]  # fmt: skip
NOBODY = ["sess_" + "0" * 32, "sess_", "x" * 5000, "..", "\0", "%", "a\nb", "日本", "'; --", "*"]


@pytest.mark.parametrize("id", NOBODY, ids=lambda id: ascii(id)[:12])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_such_session(http: httpx.Client, method: str, path: str, id: str) -> None:
    where = f"/v1/sessions/{quote(id, safe='')}{path}"
    body = {"input": "Why?"} if path == "/turns" else {}
    response = http.request(method, where, json=body)
    message = refused(response, 404, "not_found")
    assert len(message) < 200


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fdata", "..%5c..%5cdata",
     "%252e%252e%252f", "%2fetc%2fpasswd", "import/../../..", "%ff%fe", "%ed%a0%80"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sessions", "streams"])
def test_paths_lead_nowhere(tiny_server: Server, kind: str, path: str) -> None:
    host, _, port = tiny_server.url.removeprefix("http://").partition(":")
    # httpx would tidy the path up
    with contextlib.closing(HTTPConnection(host, int(port), timeout=10)) as connection:
        connection.request("GET", f"/v1/{kind}/{path}")
        response = connection.getresponse()
        body = json.loads(response.read())
    assert (response.status, body["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "", {"head": TURN}),
        ("POST", "/turns", {"input": "x", "parent": TURN}),
        ("POST", "/regenerate", {"turn": TURN}),
        ("POST", "/fork", {"at": TURN}),
    ],
)
def test_no_such_turn(
    http: httpx.Client, session: str, method: str, path: str, body: dict[str, Any]
) -> None:
    message = refused(http.request(method, f"/v1/sessions/{session}{path}", json=body), 404,
                      "not_found")  # fmt: skip
    assert TURN in message and session in message
    # One of another session is none of this one.
    other = asked(http, made(http), answer=False)["id"]
    strange = json.loads(json.dumps(body).replace(TURN, other))
    refused(http.request(method, f"/v1/sessions/{session}{path}", json=strange), 404, "not_found")


# ------------------------------------------------------------------------------------ bounds


def case(path: str, body: Any, param: str | None) -> Any:
    return pytest.param(path, body, param, id=f"{path}-{json.dumps(body)[:40]}")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        case("", {"more": 1}, "more"),
        case("", {"title": "x" * 1025}, "title"),
        case("", {"title": 3}, "title"),
        case("", {"title": "\ud800"}, "title"),
        case("", {"instructions": ["x"]}, "instructions"),
        case("", {"instructions": "\ud800"}, "instructions"),
        case("", {"metadata": []}, "metadata"),
        case("", {"metadata": {str(i): 1 for i in range(65)}}, "metadata"),
        case("", {"metadata": {"a": "x" * 4097}}, "metadata.a"),
        case("", {"metadata": {"a": {"b": 1}}}, "metadata.a"),
        case("", {"metadata": {"a": [1]}}, "metadata.a"),
        case("", {"metadata": {"a": 2**63}}, "metadata.a"),
        case("", {"metadata": {"a": "\ud800"}}, "metadata.a"),
        case("", {"defaults": {"more": 1}}, "defaults.more"),
        case("", {"defaults": {"temperature": 2.5}}, "defaults.temperature"),
        case("", {"defaults": {"max_tokens": 0}}, "defaults.max_tokens"),
        case("", {"overflow": "drop"}, "overflow"),
        case("", [], None),
        case("", "x", None),
        case("/{id}", {"more": 1}, "more"),
        case("/{id}", {"instructions": "x"}, "instructions"),
        case("/{id}", {"head": "turn_x"}, "head"),
        case("/{id}", {"head": 5}, "head"),
        case("/{id}", {"title": "x" * 1025}, "title"),
        case("/{id}/turns", {}, "input"),
        case("/{id}/turns", {"input": 3}, "input"),
        case("/{id}/turns", {"input": []}, "input"),
        case("/{id}/turns", {"input": [{"role": "nobody", "content": "x"}]}, "input"),
        case("/{id}/turns", {"input": [{"role": "user"}]}, "input.0.content"),
        case("/{id}/turns", {"input": "x", "more": 1}, "more"),
        case("/{id}/turns", {"input": "x", "parent": "sess_"}, "parent"),
        case("/{id}/turns", {"input": "x", "answer": "perhaps"}, "answer"),
        case("/{id}/turns", {"input": "x", "on_busy": "wait"}, "on_busy"),
        case("/{id}/turns", {"input": "x", "n": 2}, "n"),
        case("/{id}/turns", {"input": "x", "max_tokens": 0}, "max_tokens"),
        case("/{id}/turns", {"input": "x", "top_logprobs": 3}, "top_logprobs"),
        case("/{id}/turns", {"input": "x", "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        case("/{id}/turns", {"input": "x", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        case("/{id}/turns", {"input": "x", "stop": ["x"] * 17}, "stop"),
        case("/{id}/turns", {"input": "x", "stop_token_ids": [512]}, "stop_token_ids"),
        case("/{id}/turns", {"input": "x", "logit_bias": {"512": 1}}, "logit_bias"),
        case("/{id}/regenerate", {"turn": "x"}, "turn"),
        case("/{id}/regenerate", {"more": 1}, "more"),
        case("/{id}/regenerate", {"temperature": -1}, "temperature"),
        case("/{id}/continue", {"seed": 3}, "seed"),
        case("/{id}/continue", {"max_tokens": 0}, "max_tokens"),
        case("/{id}/continue", {"on_busy": 1}, "on_busy"),
        case("/{id}/fork", {"at": "x"}, "at"),
        case("/{id}/fork", {"token": -1}, "token"),
        case("/{id}/fork", {"token": 9}, "token"),
        case("/{id}/fork", {"replace": 3}, "replace"),
        case("/{id}/fork", {"token": 1, "replace": 512}, "replace"),
        case("/{id}/fork", {"token": 1.5}, "token"),
        case("/{id}/fork", {"more": 1}, "more"),
        case("/import", {}, "format"),
    ],
)
def test_bounds(http: httpx.Client, session: str, path: str, body: Any, param: str | None) -> None:
    before = http.get(f"/v1/sessions/{session}").json()
    method = "PATCH" if path == "/{id}" else "POST"
    where = "/v1/sessions" + path.replace("{id}", session)
    response = http.request(method, where, content=json.dumps(body), headers=JSON)
    message = refused(response, 400, "invalid_value")
    told = response.json()["error"]["param"]
    if param is None:
        assert told is None and "JSON object" in message
    else:
        assert told is not None and (told == param or told.startswith(param + "."))
        assert f"`{told}`" in message
    assert http.get(f"/v1/sessions/{session}").json() == before


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("after=nobody", "after"),
     ("after=" + "x" * 65, "after"), ("after=%00", "after"), ("q=" + "x" * 1001, "q")],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_bounds_of_lists(http: httpx.Client, query: str, param: str) -> None:
    refused(http.get(f"/v1/sessions?{query}"), 400, "invalid_value", param)


@pytest.mark.parametrize("query", ["%00", "%25", "_", "'", '"', "%ff", "\\", "x" * 1000])
def test_any_text_may_be_looked_for(http: httpx.Client, query: str) -> None:
    assert http.get(f"/v1/sessions?q={query}").json()["object"] == "list"


def test_metadata_that_just_fits(http: httpx.Client) -> None:
    metadata = {f"{i:064}": "x" * 4096 for i in range(64)}
    assert http.post("/v1/sessions", json={"metadata": metadata}).json()["metadata"] == metadata
    assert http.post("/v1/sessions", json={"title": "x" * 1024}).status_code == 200


@pytest.mark.parametrize("value", ["1e999", "NaN", "-Infinity"])
def test_numbers_that_are_none(http: httpx.Client, value: str) -> None:
    content = f'{{"metadata": {{"a": {value}}}}}'
    response = http.post("/v1/sessions", content=content, headers=JSON)
    refused(response, 400, "invalid_value", "metadata.a")


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_other_content_types(http: httpx.Client, session: str, method: str) -> None:
    where = "/v1/sessions" if method == "POST" else f"/v1/sessions/{session}"
    response = http.request(method, where, content="a=b", headers={"content-type": "text/plain"})
    refused(response, 415, "unsupported_media_type")
    broken = http.request(method, where, content="{", headers=JSON)
    refused(broken, 400, "invalid_value")
    refused(http.put(f"/v1/sessions/{session}", json={}), 405, "invalid_value")


# ------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize(
    ("defaults", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
    ],
)
def test_defaults_that_no_turn_could_have(
    http: httpx.Client, session: str, defaults: dict[str, Any], param: str
) -> None:
    for method, path in (("POST", "/v1/sessions"), ("PATCH", f"/v1/sessions/{session}")):
        response = http.request(method, path, json={"defaults": defaults})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"defaults.{param}"


def test_another_answer_has_another_seed(http: httpx.Client) -> None:
    id = made(http, defaults={**TINY, "seed": 3, "temperature": 2})
    first = asked(http, id)
    again = [http.post(f"/v1/sessions/{id}/regenerate").json() for _ in range(3)]
    assert len({turn["content"][0]["text"] for turn in [first, *again]}) > 1
    same = http.post(f"/v1/sessions/{id}/regenerate", json={"seed": 3}).json()
    assert same["content"] == first["content"]


def test_log_probabilities_of_the_defaults_can_be_left_out(http: httpx.Client) -> None:
    id = made(http, defaults={**TINY, "logprobs": True, "top_logprobs": 2})
    asked(http, id)
    asked(http, id, logprobs=False)
    with http.stream(
        "POST", f"/v1/sessions/{id}/turns", json={"input": "x", "logprobs": False, "stream": True}
    ) as response:
        told = events(response.read().decode())
    assert not any("logprobs" in event.data for event in told)
    turn = {"input": "x", "logprobs": False, "top_logprobs": 2}
    refused(http.post(f"/v1/sessions/{id}/turns", json=turn), 400, "invalid_value", "top_logprobs")


def test_null_is_a_field_that_is_not_there(http: httpx.Client) -> None:
    nothing = dict.fromkeys(("title", "instructions", "metadata", "defaults", "overflow"))
    body = http.post("/v1/sessions", json=nothing).json()
    assert (body["metadata"], body["defaults"], body["overflow"]) == ({}, {}, "error")
    id = made(http)
    asked(http, id, on_busy=None, answer=None, stream=None)
    for route in ("regenerate", "continue"):
        response = http.post(f"/v1/sessions/{id}/{route}", json={"on_busy": None, "max_tokens": 4})
        assert response.status_code == 200, response.text


def test_an_empty_body_of_another_type(http: httpx.Client) -> None:
    for content_type in ("application/x-www-form-urlencoded", "text/plain"):
        headers = {"content-type": content_type, "content-length": "0"}
        assert http.post("/v1/sessions", headers=headers).status_code == 200
