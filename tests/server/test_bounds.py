"""Every bound at its edge and one beyond: those that /openapi.json has of bodies and queries, found
in it, and those that it cannot say, in a table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from server.app import with_routes
from server.middleware import MAX_BODY_BYTES
from server.openapi import DescribedApp
from tests.fixtures.server import Server

Json = dict[str, Any]
DOCUMENT: Json = with_routes(DescribedApp()).openapi()
METHODS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
LARGE = 1 << 20  # longer texts meet the bound of the body first
EXACT = 1 << 53  # the document has bounds as floats
DEEP = 6  # a block may hold blocks
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as http:
        yield http


def with_id(http: httpx.Client, path: str) -> str:
    """The path with the id of something that is there, and new."""
    made: dict[str, Json] = {
        "/v1/sessions": {"defaults": {"max_tokens": 4}},
        "/v1/conversations": {},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    }
    kind = path.partition("/{")[0]
    if "{id}" not in path or kind not in made:
        return path
    return path.replace("{id}", http.post(kind, json=made[kind]).json()["id"])


# ------------------------------------------------------------------- bounds that are described


class Bound(NamedTuple):
    """A field with a value that just fits, and one that does not."""

    field: str
    at: Any
    beyond: Any


def resolved(schema: Json) -> Json:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def options(schema: Json) -> list[Json]:
    """The types that a value may have, null apart."""
    schema = resolved(schema)
    found = [resolved(one) for one in schema.get("anyOf", [schema])]
    return [one for one in found if one.get("type") != "null"]


def smallest(schema: Json) -> Any:
    """A value that fits."""
    schema = options(schema)[0]
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: smallest(properties[name]) for name in schema.get("required", [])}
        case "array":
            return [smallest(schema["items"]) for _ in range(schema.get("minItems", 0))]
        case "string":
            return "x"
        case "integer":
            return int(schema.get("minimum", 1))
        case "number":
            return schema.get("minimum", 1)
        case "boolean":
            return False
    return None


def edges(schema: Json) -> Iterator[tuple[Any, Any]]:
    """Values of one type at each of its bounds, and beyond."""
    number = int if schema.get("type") == "integer" else float
    step = 1 if number is int else 0.001
    for bound, more in (("maximum", step), ("minimum", -step)):
        if abs(schema.get(bound, EXACT)) < EXACT:
            yield number(schema[bound]), number(schema[bound]) + more
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"] + step, schema["exclusiveMinimum"]
    if schema.get("maxLength", LARGE) < LARGE:
        yield "x" * schema["maxLength"], "x" * (schema["maxLength"] + 1)
    if schema.get("minLength"):
        yield "x" * schema["minLength"], "x" * (schema["minLength"] - 1)
    if schema.get("type") == "array":
        one = smallest(schema["items"])
        if "maxItems" in schema:
            yield [one] * schema["maxItems"], [one] * (schema["maxItems"] + 1)
        if schema.get("minItems"):
            yield [one] * schema["minItems"], [one] * (schema["minItems"] - 1)
    if "maxProperties" in schema:
        count = schema["maxProperties"]
        yield {str(i): 0 for i in range(count)}, {str(i): 0 for i in range(count + 1)}
    longest = schema.get("propertyNames", {}).get("maxLength")
    if longest is not None:
        yield {"x" * longest: 0}, {"x" * (longest + 1): 0}


def bounds(
    schema: Json, where: tuple[str, ...] = (), made: Callable[[Any], Any] = lambda value: value
) -> Iterator[Bound]:
    """All bounds within a schema; `made` gives the body that has a value there."""
    if len(where) > DEEP:
        return
    for one in options(schema):
        for at, beyond in edges(one):
            yield Bound(".".join(where), made(at), made(beyond))
        if one.get("type") == "array":
            yield from bounds(one["items"], (*where, "0"), lambda value: made([value]))
        for name, inner in one.get("properties", {}).items():
            base = smallest(one)
            yield from bounds(
                inner,
                (*where, name),
                lambda value, base=base, name=name: made({**base, name: value}),  # type: ignore[misc]
            )
        if isinstance(one.get("additionalProperties"), dict):
            inner = one["additionalProperties"]
            yield from bounds(inner, (*where, "1"), lambda value: made({"1": value}))


def refused_for(response: httpx.Response, field: str) -> bool:
    """Whether the bound of that field was the reason, in the words of a bound."""
    if response.status_code != 400:
        return False
    error = response.json()["error"]
    words = r"should (have|be)|must have at most"
    named = re.search(rf"`{re.escape(field)}[.`]", error["message"])
    return bool(named and re.search(words, error["message"]))


@pytest.mark.parametrize("name", METHODS)
def test_described_bounds(http: httpx.Client, name: str) -> None:
    method, path, operation = METHODS[name]
    url = with_id(http, path)
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "query":
            field = parameter["name"]
            for bound in bounds(parameter["schema"], (field,)):
                at, beyond = (
                    http.request(method, url, params={field: value})
                    for value in (bound.at, bound.beyond)
                )
                assert not refused_for(at, field), (bound.field, at.text)
                assert refused_for(beyond, field), (bound.field, beyond.text)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is None:
        return
    example = body.get("example", {})
    if name == "append_turn":
        example = {**example, "parent": None, "max_tokens": 4}
    for bound in bounds(body["schema"]):
        at, beyond = (
            http.request(method, url, json={**example, **value})
            for value in (bound.at, bound.beyond)
        )
        assert at.status_code < 500, at.text
        assert not refused_for(at, bound.field), (bound.field, at.text)
        assert refused_for(beyond, bound.field), (bound.field, str(bound.beyond)[:80], beyond.text)


def test_the_bounds_are_found() -> None:
    """As many as there are, and the numbers that are documented."""
    found = {}
    for name, (_, _, operation) in METHODS.items():
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        for bound in bounds(body["schema"]) if body else ():
            found[name, bound.field, len(json.dumps(bound.at))] = bound
    chat = {field for name, field, _ in found if name == "create_chat_completion"}
    assert {
        *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "logit_bias.1", "n"),
        *("stop", "stop.0", "stop_token_ids", "min_tokens", "regex", "grammar", "messages"),
        *("max_tokens", "max_completion_tokens", "top_logprobs", "tools", "messages.0.name"),
        *("messages.0.tool_calls", "messages.0.tool_calls.0.id", "messages.0.tool_call_id"),
    } <= chat
    assert len(found) > 200


# ------------------------------------------------------------------ bounds that are not described

ASKED: Json = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 2}


def room(http: httpx.Client) -> int:
    """Tokens that are left for the answer to `ASKED`."""
    told = http.post("/tokenize", json={"messages": ASKED["messages"]}).json()
    return int(told["max_model_len"] - told["count"])


def value(at: Any) -> Json:
    return {"metadata": {"a": at}}


@pytest.mark.parametrize(
    ("path", "field", "at", "beyond"),
    [
        ("/v1/sessions", "metadata.a", value("x" * 4096), value("x" * 4097)),
        ("/v1/sessions", "metadata.a", value(2**63 - 1), value(2**63)),
        ("/v1/sessions", "metadata.a", value(-(2**63)), value(-(2**63) - 1)),
        ("/v1/conversations", "metadata.a", value("x" * 4096), value("x" * 4097)),
        ("/v1/responses", "metadata.a", value("x" * 4096), value("x" * 4097)),
        ("/v1/responses", "n", {"n": 1}, {"n": 2}),
        ("/v1/messages", "n", {**ASKED, "n": 1}, {**ASKED, "n": 2}),
        (CHAT, "n", {"resumable": True, "n": 1}, {"resumable": True, "n": 2}),
        (CHAT, "seed", {"seed": 2**63 - 1}, {"seed": 2**63}),
        (CHAT, "seed", {"seed": -(2**63)}, {"seed": -(2**63) - 1}),
        (CHAT, "min_tokens", {"min_tokens": 2}, {"min_tokens": 3}),
        ("/v1/completions", "min_tokens", {"min_tokens": 2}, {"min_tokens": 3}),
        ("/v1/completions", "prompt", {"prompt": [[511]]}, {"prompt": [[512]]}),
        ("/v1/completions", "prompt", {"prompt": ["x"] * 64}, {"prompt": ["x"] * 65}),
        ("/v1/completions", "best_of", {"n": 2, "best_of": 2}, {"n": 2, "best_of": 3}),
        (
            "/v1/completions",
            "max_tokens",
            {"echo": True, "max_tokens": 0},
            {"echo": False, "max_tokens": 0},
        ),
        (CHAT, "stop_token_ids", {"stop_token_ids": [511]}, {"stop_token_ids": [512]}),
        (CHAT, "logit_bias", {"logit_bias": {"511": 1}}, {"logit_bias": {"512": 1}}),
        ("/detokenize", "tokens", {"tokens": [511]}, {"tokens": [512]}),
        (
            "/tokenize",
            "messages",
            {"messages": ASKED["messages"] * 4096},
            {"messages": ASKED["messages"] * 4097},
        ),
        (
            "/v1/messages",
            "stop_sequences",
            {**ASKED, "stop_sequences": ["x" * 128] * 16},
            {**ASKED, "stop_sequences": ["x"] * 17},
        ),
        (
            "/v1/responses",
            "top_logprobs",
            {"include": ["message.output_text.logprobs"], "top_logprobs": 20},
            {"include": ["message.output_text.logprobs"], "top_logprobs": 21},
        ),
        (
            "/v1/conversations",
            "items",
            {"items": ASKED["messages"] * 300},
            {"items": ASKED["messages"] * 4097},
        ),
    ],
)
def test_other_bounds(http: httpx.Client, path: str, field: str, at: Json, beyond: Json) -> None:
    bases: dict[str, Json] = {
        CHAT: ASKED,
        "/v1/completions": {"prompt": "The river", "max_tokens": 2},
        "/v1/responses": {"input": "Why?", "max_output_tokens": 2},
    }
    base = bases.get(path, {})
    response = http.post(path, json={**base, **at})
    assert response.status_code == 200, response.text
    response = http.post(path, json={**base, **beyond})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert f"`{field}" in error["message"]
    assert path == "/v1/messages" or error["param"] == field


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {}, "max_tokens"),
        (CHAT, {}, "max_completion_tokens"),
        ("/v1/responses", {"input": "Why?"}, "max_output_tokens"),
        ("/v1/messages", {}, "max_tokens"),
        ("/v1/sessions/{id}/turns", {"input": "Why?"}, "max_tokens"),
    ],
)
def test_the_room_for_an_answer(http: httpx.Client, path: str, body: Json, field: str) -> None:
    asked: Json = body or {"messages": ASKED["messages"]}
    url = with_id(http, path)
    left = room(http)
    response = http.post(url, json={**asked, field: left + 1})
    assert response.status_code == 400, response.text
    assert http.post(url, json={**asked, field: left}).status_code == 200
    assert "512" in response.json()["error"]["message"]
    if path != "/v1/messages":
        assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("length", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
@pytest.mark.parametrize("known", [True, False])
def test_the_length_of_a_body(http: httpx.Client, length: int, status: int, known: bool) -> None:
    content = json.dumps({"text": "river"}).encode().ljust(length)
    headers = {"content-type": "application/json"}
    sent: Any = content if known else iter([content])  # in chunks, nothing tells how long it gets
    response = http.post("/tokenize", content=sent, headers=headers)
    assert response.status_code == status, response.text[:200]
    if status == 413:
        assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(("length", "status"), [(255, 200), (256, 400)])
def test_the_length_of_an_idempotency_key(http: httpx.Client, length: int, status: int) -> None:
    response = http.post("/v1/sessions", json={}, headers={"idempotency-key": "k" * length})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "Idempotency-Key"


@pytest.mark.parametrize(("place", "status"), [("9" * 12, 204), ("9" * 13, 400), ("-1", 400)])
def test_the_length_of_a_last_event_id(http: httpx.Client, place: str, status: int) -> None:
    url = with_id(http, "/v1/sessions/{id}/turns")
    generation = http.post(url, json={"input": "Why?"}).json()["generation"]
    response = http.get(f"/v1/streams/{generation}", headers={"last-event-id": place})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "Last-Event-ID"
