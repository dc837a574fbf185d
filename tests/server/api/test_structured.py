"""`response_format`, `regex` and `grammar` on the wire: followed, bounded, and refused before a
stream begins."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.engine.request import MAX_GRAMMAR_BYTES, Grammar
from server import grammar_check
from server.api.structured import MAX_SCHEMA_DEPTH
from server.errors import InvalidRequest
from server.grammar_check import GrammarCheck
from tests.fixtures.server import Server, serving
from tests.server.api.sessions_client import asked, events, made, refused

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
MESSAGES = [{"role": "user", "content": "A pet?"}]


@pytest.fixture(scope="module")
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as client:
        yield client


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": MESSAGES, "temperature": 1, "max_tokens": 100, **fields}
    return http.post("/v1/chat/completions", json=body)


def is_pet(text: str) -> bool:
    pet = json.loads(text)
    return (
        set(pet) == {"kind", "age"} and pet["kind"] in ("cat", "dog") and pet["age"] in range(100)
    )


def test_a_schema_whole_and_streamed(http: httpx.Client) -> None:
    for seed in range(4):
        answer = chat(http, response_format=FORMAT, seed=seed, n=2).json()
        for choice in answer["choices"]:
            assert is_pet(choice["message"]["content"]) and choice["finish_reason"] == "stop"
        streamed = chat(http, response_format=FORMAT, seed=seed, stream=True).text
        text, _ = chunks(streamed.splitlines())
        assert text == answer["choices"][0]["message"]["content"]


def test_any_object(http: httpx.Client) -> None:
    for seed in range(6):
        answer = chat(http, response_format={"type": "json_object"}, seed=seed).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_regex_and_grammar_in_chat_and_completions(http: httpx.Client) -> None:
    for fields in ({"regex": "(ab|cd){2,5}!"}, {"grammar": 'start: x{2,5} "!"\nx: "ab" | "cd"'}):
        choice = chat(http, **fields).json()["choices"][0]
        assert re.fullmatch("(ab|cd){2,5}!", choice["message"]["content"])
        body = {"prompt": ["a", "b"], "max_tokens": 60, "logprobs": 1, **fields}
        for choice in http.post("/v1/completions", json=body).json()["choices"]:
            assert re.fullmatch("(ab|cd){2,5}!", choice["text"])
            assert choice["finish_reason"] == "stop"


def test_an_answer_that_is_cut_has_reason_length(http: httpx.Client) -> None:
    choice = chat(http, regex="a{50}", max_tokens=4).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert re.fullmatch("a{1,49}", choice["message"]["content"])


def test_text_is_no_constraint(http: httpx.Client) -> None:
    free = chat(http, seed=1, max_tokens=9).json()["choices"]
    assert chat(http, seed=1, max_tokens=9, response_format={"type": "text"}).json()["choices"] == (
        free
    )


def test_a_session_s_turns(http: httpx.Client) -> None:
    session = made(http, defaults={"response_format": FORMAT, "max_tokens": 60})
    turn = asked(http, session)
    assert is_pet(turn["content"][0]["text"]) and turn["finish_reason"] == "stop"
    stored = http.get(f"/v1/sessions/{session}").json()["defaults"]["response_format"]
    assert stored == FORMAT
    turn = asked(http, session, regex="ab+c")  # instead of the session's
    assert re.fullmatch("ab+c", turn["content"][0]["text"])
    stream = http.post(f"/v1/sessions/{session}/turns", json={"input": "And?", "stream": True}).text
    deltas = [event.data["text"] for event in events(stream) if event.name == "delta"]
    assert is_pet("".join(deltas))
    again = http.post(f"/v1/sessions/{session}/regenerate", json={}).json()
    assert is_pet(again["content"][0]["text"])
    refused(
        http.post(f"/v1/sessions/{session}/turns", json={"input": "x", "regex": "(a"}),
        400,
        "invalid_value",
        "regex",
    )


def test_an_answer_goes_on_the_same_in_another_engine(tiny_model: Path) -> None:
    body = {
        "messages": MESSAGES,
        "regex": "([a-z ]{2,9}[0-9]){40}",
        "temperature": 1,
        "seed": 5,
        "max_tokens": 400,
        "stream": True,
    }
    with (
        serving(str(tiny_model)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        expected = chunks(http.post("/v1/chat/completions", json=body).iter_lines())
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            begun = [next(lines) for _ in range(20)]
            server.engine.kill()
            assert chunks([*begun, *lines]) == expected
    text, reason = expected
    assert reason == "stop" and re.fullmatch(body["regex"], text)


def chunks(lines: Iterable[str]) -> tuple[str, str | None]:
    """The text of a stream, and its finish reason."""
    text, reason = "", None
    for line in lines:
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text += choice["delta"].get("content", "")
            reason = choice["finish_reason"]
    return text, reason


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"regex": ""}, "regex", "at least 1"),
        ({"grammar": "start: foo"}, "grammar", "foo"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar", "exclude each other"),
        ({"response_format": FORMAT, "regex": "a"}, "regex", "exclude each other"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object", "not": {}}},
                }
            },
            "response_format",
            "not",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "#"}},
                }
            },
            "response_format",
            "no text satisfies it",
        ),
    ],
)
def test_a_status_before_any_stream(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    message = refused(chat(http, stream=stream, **fields), 400, "invalid_value", param)
    assert words in message


def test_completions_have_no_response_format(http: httpx.Client) -> None:
    body = {"prompt": "a", "response_format": FORMAT}
    response = http.post("/v1/completions", json=body)
    refused(response, 400, "unsupported_parameter", "response_format")
    body = {"prompt": "a", "regex": "(a"}
    refused(http.post("/v1/completions", json=body), 400, "invalid_value", "regex")


def test_bounds_at_their_edge(http: httpx.Client) -> None:
    def schema(schema: dict[str, Any]) -> httpx.Response:
        return chat(
            http,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            max_tokens=1,
        )

    assert chat(http, regex="a" * MAX_GRAMMAR_BYTES, max_tokens=1).status_code == 200
    for text in ("a" * (MAX_GRAMMAR_BYTES + 1), "é" * (MAX_GRAMMAR_BYTES // 2 + 1)):
        refused(chat(http, regex=text), 400, "invalid_value", "regex")
        refused(chat(http, grammar=text), 400, "invalid_value", "grammar")

    base = {"type": "string", "description": ""}
    room = MAX_GRAMMAR_BYTES - len(json.dumps(base, separators=(",", ":")))
    assert schema({**base, "description": "d" * room}).status_code == 200
    param = "response_format.json_schema.schema"
    refused(schema({**base, "description": "d" * (room + 1)}), 400, "invalid_value", param)

    def deep(levels: int) -> dict[str, Any]:
        """Arrays and objects nested so deep."""
        inner: dict[str, Any] = {"type": "string"}
        for _ in range(levels - 1):
            inner = {"type": "array", "maxItems": 1, "items": inner}
        return inner

    assert schema(deep(MAX_SCHEMA_DEPTH)).status_code == 200
    message = refused(schema(deep(MAX_SCHEMA_DEPTH + 1)), 400, "invalid_value", param)
    assert "64 levels" in message


def test_what_would_crash_or_never_end_is_refused_and_the_engine_lives(
    tiny_server: Server, http: httpx.Client
) -> None:
    engine = tiny_server.engine.pid
    rules = "".join(f'r{i}: r{i + 1} | "y{i}"\n' for i in range(2500))
    text = f'start: r0\n{rules}r2500: "z"\n'
    message = refused(chat(http, grammar=text, stream=True), 400, "invalid_value", "grammar")
    assert "too much" in message
    assert tiny_server.engine.pid == engine


def test_a_trial_is_ended_and_its_outcome_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        check = GrammarCheck([])
        endless = Grammar("json_schema", '{"type":"integer","multipleOf":123456789}')
        monkeypatch.setattr(grammar_check, "TRIAL_SECONDS", 0.5)
        with pytest.raises(InvalidRequest, match=r"takes more than 0\.5 s"):
            await check.check(endless, param="response_format")
        monkeypatch.setattr(grammar_check, "TRIAL_SECONDS", 20.0)
        monkeypatch.setattr(grammar_check, "MAX_REMEMBERED", 2)
        for text in ("a", "b", "c"):
            await check.check(Grammar("regex", text), param="regex")
        assert len(check._problems) == 2
        monkeypatch.setattr(grammar_check.sys, "executable", "/nowhere")
        await check.check(Grammar("regex", "c"), param="regex")  # no other trial
        with pytest.raises(FileNotFoundError):
            await check.check(Grammar("regex", "a"), param="regex")

    asyncio.run(scenario())
