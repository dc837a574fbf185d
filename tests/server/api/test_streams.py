"""The wire of streams: events field by field, places, ends, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fixtures.server import Server
from tests.server.api.sessions_client import Event, asked, events, made, refused

CHAT = {
    "messages": [{"role": "user", "content": "Why?"}],
    "max_tokens": 8,
    "ignore_eos": True,
    "seed": 3,
}
GENERATION = "gen_" + "0" * 32


@pytest.fixture(scope="module")
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def turn(http: httpx.Client) -> dict[str, Any]:
    """An answer of 8 tokens with log-probabilities."""
    return asked(http, made(http), logprobs=True, top_logprobs=2, seed=2**63 - 1)


@pytest.fixture(scope="module")
def whole(http: httpx.Client, turn: dict[str, Any]) -> list[Event]:
    """Its events, all of them."""
    response = http.get(f"/v1/streams/{turn['generation']}")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-headwater-generation"] == turn["generation"]
    return events(response.text)


def test_start(turn: dict[str, Any], whole: list[Event]) -> None:
    start = whole[0]
    assert (start.id, start.name) == (1, "start")
    data = dict(start.data)
    cached = data.pop("cached_tokens")
    assert list(cached) == ["device", "host", "disk"]
    assert data.pop("prompt_tokens") > sum(cached.values()) >= 0
    assert data.pop("model")
    assert data == {
        "generation": turn["generation"],
        "session": turn["session"],
        "turn": turn["id"],
        "seed": 2**63 - 1,
    }


def test_deltas(turn: dict[str, Any], whole: list[Event]) -> None:
    deltas = whole[1:-1]
    assert {event.name for event in deltas} == {"delta"}
    count = 0
    for event in deltas:
        assert list(event.data) == ["text", "token_ids", "logprobs"]
        count += len(event.data["token_ids"])
        assert event.id == 1 + count
        assert [e["token_id"] for e in event.data["logprobs"]] == event.data["token_ids"]
        for entry in event.data["logprobs"]:
            assert list(entry) == ["token_id", "token", "logprob", "top"]
            assert entry["logprob"] <= 0 and isinstance(entry["token"], str)
            assert [list(top) for top in entry["top"]] == [["token_id", "token", "logprob"]] * 2
    assert count == turn["num_tokens"] == 8
    assert "".join(e.data["text"] for e in deltas) == turn["content"][0]["text"]


def test_done(turn: dict[str, Any], whole: list[Event]) -> None:
    done = whole[-1]
    assert (done.id, done.name) == (10, "done")
    assert list(done.data) == ["finish_reason", "usage", "timings", "turn"]
    assert (done.data["finish_reason"], done.data["turn"]) == ("length", turn["id"])
    usage = done.data["usage"]
    start = whole[0].data
    assert usage["prompt_tokens"] == start["prompt_tokens"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == start["prompt_tokens"] + 8
    cached = start["cached_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": sum(cached.values()), **cached}
    timings = done.data["timings"]
    assert list(timings) == ["queue_ms", "ttft_ms", "decode_tokens_per_s"]
    assert all(value >= 0 for value in timings.values())


def test_no_logprobs_unless_asked_for(http: httpx.Client) -> None:
    plain = asked(http, made(http))
    seen = events(http.get(f"/v1/streams/{plain['generation']}").text)
    assert {tuple(e.data) for e in seen if e.name == "delta"} == {("text", "token_ids")}


def test_the_end_token_counts(http: httpx.Client) -> None:
    id = made(http, defaults={})
    answer = asked(http, id, max_tokens=8, logit_bias={"2": 100})  # the end token, at once
    assert (answer["finish_reason"], answer["num_tokens"]) == ("stop", 1)
    seen = events(http.get(f"/v1/streams/{answer['generation']}").text)
    assert [(e.id, e.name) for e in seen] == [(1, "start"), (3, "done")]


def test_an_answer_that_is_cut_to_nothing_has_a_start_too(http: httpx.Client) -> None:
    spelled = http.post("/detokenize", json={"tokens": [37]}).json()["text"]
    body = {**CHAT, "resumable": True, "stop": spelled, "logit_bias": {"37": 100}}
    response = http.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == ""
    seen = events(http.get(f"/v1/streams/{response.headers['x-headwater-generation']}").text)
    assert [(e.id, e.name) for e in seen] == [(1, "start"), (2, "done")]


@pytest.mark.parametrize("place", range(10))
@pytest.mark.parametrize("how", ["header", "query", "both"])
def test_any_place(
    http: httpx.Client, turn: dict[str, Any], whole: list[Event], place: int, how: str
) -> None:
    headers = {"last-event-id": str(place)} if how != "query" else {}
    query = {"after": {"query": place, "both": 0}[how]} if how != "header" else {}
    if how == "both" and place == 0:
        query = {}
    response = http.get(f"/v1/streams/{turn['generation']}", params=query, headers=headers)
    seen = events(response.text)
    assert all(event.id is not None and event.id > place for event in seen)
    assert seen[-1] == whole[-1]
    tokens = [id for event in whole[1:-1] for id in event.data["token_ids"]]
    got = [id for event in seen if event.name == "delta" for id in event.data["token_ids"]]
    assert got == tokens[max(place - 1, 0) :]
    assert (seen[0].name == "start") == (place == 0)
    if place == 0:
        assert "".join(e.data.get("text", "") for e in seen) == turn["content"][0]["text"]


@pytest.mark.parametrize("place", [10, 11, 10**11])
def test_after_the_last_event_there_is_nothing(
    http: httpx.Client, turn: dict[str, Any], place: int
) -> None:
    for format in ("events", "chat"):
        response = http.get(f"/v1/streams/{turn['generation']}?after={place}&format={format}")
        assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1 2", "0x1", "٣", "9" * 13, "1e3"])
def test_a_last_event_id_that_is_no_number(
    http: httpx.Client, turn: dict[str, Any], value: str
) -> None:
    headers = {b"last-event-id": value.encode()}
    response = http.get(f"/v1/streams/{turn['generation']}", headers=headers)
    refused(response, 400, "invalid_value", "Last-Event-ID")


@pytest.mark.parametrize(
    ("query", "param"), [("after=x", "after"), ("after=-1", "after"), ("format=x", "format")]
)
def test_bounds(http: httpx.Client, turn: dict[str, Any], query: str, param: str) -> None:
    response = http.get(f"/v1/streams/{turn['generation']}?{query}")
    refused(response, 400, "invalid_value", param)


@pytest.mark.parametrize("id", [GENERATION, "gen_x", "x" * 3000, "%00", "%F0%9F%98%80", "gen_%25"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_such_stream(http: httpx.Client, method: str, id: str) -> None:
    assert len(refused(http.request(method, f"/v1/streams/{id}"), 404, "not_found")) < 200


def test_a_plain_request_is_gone_with_its_end(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=CHAT)
    generation = response.headers["x-headwater-generation"]
    assert generation.startswith("gen_")
    refused(http.get(f"/v1/streams/{generation}"), 404, "not_found")


def test_deleting_one_that_ended_says_how(http: httpx.Client, turn: dict[str, Any]) -> None:
    response = http.delete(f"/v1/streams/{turn['generation']}")
    assert response.status_code == 200
    assert response.json() == {
        "id": turn["generation"],
        "object": "generation",
        "finish_reason": "length",
        "session": turn["session"],
        "turn": turn["id"],
    }


def test_deleting_one_that_runs(http: httpx.Client) -> None:
    body = {**CHAT, "max_tokens": 400, "stream": True, "resumable": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        generation = stream.headers["x-headwater-generation"]
        assert next(stream.iter_text())
        response = http.delete(f"/v1/streams/{generation}")
    assert response.json() == {
        "id": generation,
        "object": "generation",
        "finish_reason": "abort",
        "session": None,
        "turn": None,
    }
    last = events(http.get(f"/v1/streams/{generation}").text)[-1]
    assert (last.name, last.data["finish_reason"]) == ("done", "abort")


@pytest.mark.parametrize("format", ["events", "chat"])
@pytest.mark.parametrize("beyond", [1, 500])
def test_after_beyond_the_end_of_a_live_stream(
    http: httpx.Client, tiny_server: Server, format: str, beyond: int
) -> None:
    """It ends without a word: an id is never followed by a lower one, or by itself."""
    body = {**CHAT, "max_tokens": 60, "stream": True, "resumable": True}
    done = 62
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        path = f"/v1/streams/{stream.headers['x-headwater-generation']}"
        engine = tiny_server.engine
        engine.suspend()  # until somebody waits for what never comes
        try:
            with (
                http.stream("GET", f"{path}?format={format}&after={done - 1}") as last,
                http.stream("GET", f"{path}?format={format}&after={done - 1 + beyond}") as late,
            ):
                assert (last.status_code, late.status_code) == (200, 200)
                engine.resume()
                told, nothing = last.read().decode(), late.read().decode()
        finally:
            engine.resume()
    if format == "chat":
        assert [chunk["headwater"]["event"] for chunk in chunks(told)] == [done]
        assert chunks(nothing) == []
    else:
        assert [event.id for event in events(told)] == [done]
        assert [event.id for event in events(nothing) if event.name != "progress"] == []


# --------------------------------------------------------------------------- resumable chats


def chunks(text: str) -> list[dict[str, Any]]:
    *frames, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(frame.startswith("data: {") for frame in frames)  # and never an `id:`
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> list[dict[str, Any]]:
    body = {**CHAT, "stream": True, "resumable": True}
    return chunks(http.post("/v1/chat/completions", json=body).text)


def test_chunks_say_where_they_are(chat: list[dict[str, Any]]) -> None:
    places = [chunk["headwater"]["event"] for chunk in chat]
    assert places[0] == 1 and places[-1] == 10
    assert places == sorted(set(places))
    assert len({chunk["headwater"]["generation"] for chunk in chat}) == 1
    assert all(list(chunk["headwater"]) == ["generation", "event"] for chunk in chat)


def test_the_chunk_with_usage_is_at_the_end(http: httpx.Client) -> None:
    body = {**CHAT, "stream": True, "resumable": True, "stream_options": {"include_usage": True}}
    *_, end, last = chunks(http.post("/v1/chat/completions", json=body).text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"]
    assert last["headwater"] == end["headwater"]
    # It is the first stream's only.
    path = f"/v1/streams/{end['headwater']['generation']}?format=chat"
    assert all("usage" not in chunk for chunk in chunks(http.get(path).text))


def test_a_chat_goes_on_after_each_chunk(http: httpx.Client, chat: list[dict[str, Any]]) -> None:
    generation = chat[0]["headwater"]["generation"]

    def said(some: list[dict[str, Any]]) -> str:
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in some)

    for i, chunk in enumerate(chat[:-1]):
        after = chunk["headwater"]["event"]
        rest = chunks(http.get(f"/v1/streams/{generation}?format=chat&after={after}").text)
        assert said(chat[: i + 1]) + said(rest) == said(chat)
        assert rest[-1] == chat[-1]
        assert "role" not in rest[0]["choices"][0]["delta"]
        for name in ("id", "created", "model"):
            assert {c[name] for c in rest} == {chat[0][name]}
    again = chunks(http.get(f"/v1/streams/{generation}?format=chat").text)
    assert again[0] == chat[0] and said(again) == said(chat)


def test_a_chat_as_events(http: httpx.Client, chat: list[dict[str, Any]]) -> None:
    seen = events(http.get(f"/v1/streams/{chat[0]['headwater']['generation']}").text)
    assert [seen[0].name, seen[-1].name] == ["start", "done"]
    assert (seen[0].data["session"], seen[0].data["turn"]) == (None, None)
    assert seen[-1].data["turn"] is None
    # The same seed gives the same text, whether it is stored or not.
    plain = http.post("/v1/chat/completions", json=CHAT).json()
    text = "".join(event.data["text"] for event in seen[1:-1])
    assert plain["choices"][0]["message"]["content"] == text


def test_a_whole_resumable_answer(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT, "resumable": True})
    assert response.json()["object"] == "chat.completion"
    generation = response.headers["x-headwater-generation"]
    assert events(http.get(f"/v1/streams/{generation}").text)[-1].name == "done"


def test_resumable_needs_one_choice(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT, "resumable": True, "n": 2})
    refused(response, 400, "invalid_value", "n")
