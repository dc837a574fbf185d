"""/openapi.json says what the server does; /docs shows it and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from server.app import with_routes
from server.openapi import DescribedApp
from tests.fixtures.server import Server

SNAPSHOT = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    return with_routes(DescribedApp()).openapi()


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_snapshot_is_the_document(document: Json, tiny_server: Server) -> None:
    assert json.loads(SNAPSHOT.read_text()) == document, "write it anew with `make openapi`"
    assert httpx.get(f"{tiny_server.url}/openapi.json").json() == document


def test_every_operation_has_a_name_and_says_what_it_answers(document: Json) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for path, _, operation in operations(document):
        responses = operation["responses"]
        assert "422" not in responses and "default" in responses, path
        good = responses.get("200") or responses["204"]
        assert good.get("content") or "204" in responses, path
        body = operation.get("requestBody")
        if body is not None:
            content = body["content"]["application/json"]
            assert "example" in content or path == "/v1/sessions/import", path


def test_all_references_lead_somewhere(document: Json) -> None:
    schemas = document["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert named <= schemas.keys()
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_examples_are_valid_bodies(document: Json) -> None:
    for path, _, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in content:
            validate(document, content["schema"], content["example"], path)


def closed(schema: Any) -> Any:
    """The same, where an object that is described has no other fields."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in inner else inner


def validate(document: Json, schema: Json, value: Any, what: str) -> None:
    whole = {**schema, "components": document["components"]}
    errors = list(jsonschema.Draft202012Validator(whole).iter_errors(value))
    assert not errors, f"{what}: {errors[0].json_path} {errors[0].message}"


class Asker:
    """Asks, and holds each answer against the document: all that is described is there, and nothing
    else."""

    def __init__(self, http: httpx.Client, document: Json) -> None:
        self._http = http
        schemas = closed(document["components"]["schemas"])
        self._document = {**document, "components": {"schemas": schemas}}
        self.seen: set[str] = set()

    def __call__(self, method: str, template: str, body: Json | None = None, **parts: str) -> Json:
        operation = self._document["paths"][template][method]
        path = template.format(**parts)
        answer = self._http.request(method, path, json=body)
        status = str(answer.status_code)
        said = operation["responses"].get(status) or operation["responses"]["default"]
        schema = said["content"]["application/json"]["schema"]
        value: Json = answer.json()
        validate(self._document, schema, value, f"{method} {path}")
        if answer.status_code == 200:
            self.seen.add(operation["operationId"])
        return value


def test_answers_are_as_described(document: Json, tiny_server: Server) -> None:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as http:
        ask = Asker(http, document)
        messages = [{"role": "user", "content": "Hello"}]
        chat = {"messages": messages, "max_tokens": 4}
        ask("post", "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2, "n": 2})
        ask("post", "/v1/chat/completions", {})
        ask(
            "post",
            "/v1/completions",
            {"prompt": "Hello", "max_tokens": 4, "logprobs": 2, "echo": True},
        )

        ask_for_calls(ask)
        conversation = ask("post", "/v1/conversations", {"items": messages})["id"]
        asked: Json = {
            "input": "Hello",
            "max_output_tokens": 4,
            "conversation": conversation,
            "include": ["message.output_text.logprobs"],
        }
        ask("post", "/v1/responses/input_tokens", asked)
        response = ask("post", "/v1/responses", asked)["id"]
        ask("get", "/v1/responses/{id}", id=response)
        ask("get", "/v1/responses/{id}/input_items", id=response)
        ask("get", "/v1/responses/{id}", id="resp_" + "0" * 32)
        running = ask(
            "post", "/v1/responses", {"input": "x", "background": True, "ignore_eos": True}
        )["id"]
        ask("get", "/v1/responses/{id}", id=running)
        ask("post", "/v1/responses/{id}/cancel", {}, id=running)
        ask("delete", "/v1/responses/{id}", id=running)
        at = {"id": conversation}
        ask("get", "/v1/conversations/{id}", **at)
        ask("post", "/v1/conversations/{id}", {"metadata": {"a": "b"}}, **at)
        items = ask("post", "/v1/conversations/{id}/items", {"items": messages}, **at)["data"]
        ask("get", "/v1/conversations/{id}/items", **at)
        one = {**at, "item_id": items[0]["id"]}
        ask("get", "/v1/conversations/{id}/items/{item_id}", **one)
        ask("delete", "/v1/conversations/{id}/items/{item_id}", **one)
        ask("delete", "/v1/conversations/{id}", **at)

        ask("post", "/v1/messages", chat)
        ask("post", "/v1/messages", {})
        ask("post", "/v1/messages/count_tokens", {"messages": messages})

        session = ask("post", "/v1/sessions", {"defaults": {"max_tokens": 4}})["id"]
        at = {"id": session}
        turn = ask("post", "/v1/sessions/{id}/turns", {"input": "Hello"}, **at)
        ask("post", "/v1/sessions/{id}/regenerate", {}, **at)
        ask("post", "/v1/sessions/{id}/continue", {"max_tokens": 2}, **at)
        ask("post", "/v1/sessions/{id}/cancel", {}, **at)
        ask("get", "/v1/sessions")
        ask("get", "/v1/sessions/{id}", **at)
        ask("patch", "/v1/sessions/{id}", {"title": "Rivers"}, **at)
        ask("get", "/v1/sessions/{id}/tree", **at)
        ask("get", "/v1/sessions/{id}/cache", **at)
        exported = ask("get", "/v1/sessions/{id}/export", **at)
        ask("post", "/v1/sessions/import", exported)
        ask("post", "/v1/sessions/{id}/fork", {}, **at)
        ask("delete", "/v1/streams/{id}", id=turn["generation"])

        model = ask("get", "/v1/models")["data"][0]["id"]
        ask("get", "/v1/models/{model_id}", model_id=model)
        tokens = ask("post", "/tokenize", {"text": "Hello"})["tokens"]
        ask("post", "/detokenize", {"tokens": tokens})
        said = {"text": "Hello"}
        ask("post", "/v1/inspect/tokens", said)
        ask("post", "/v1/inspect/forward", {**said, "top_k": 3, "layers": "all"})
        ask("post", "/v1/inspect/attention", {**said, "layer": 0, "head": "all"})
        ask("post", "/v1/inspect/kv-cache", {**said, "max_tokens": 3})
        ask("get", "/v1/inspect/model")
        for path in ("/health", "/ready", "/version"):
            ask("get", path)

        ask("get", "/v1/inspect/model")
        text = {"text": "Sarah fed the cat"}
        ask("post", "/v1/inspect/tokens", text)
        ask("post", "/v1/inspect/forward", {**text, "layers": "all"})
        ask("post", "/v1/inspect/attention", {**text, "layer": 0})
        ask("post", "/v1/inspect/attention", text)
        ask("post", "/v1/inspect/kv-cache", {**text, "max_tokens": 4})
    names = {operation["operationId"] for _, _, operation in operations(document)}
    # What is no JSON, and what needs an answer that runs or was cut at the right moment.
    assert names - ask.seen <= {
        *("metrics", "read_stream", "delete_session", "login", "logout"),
        *("cancel_turn", "continue_turn"),
    }


def test_a_field_that_is_not_described_is_found(document: Json, tiny_server: Server) -> None:
    lacking = json.loads(json.dumps(document))
    del lacking["components"]["schemas"]["Model"]["properties"]["fingerprint"]
    with httpx.Client(base_url=tiny_server.url, timeout=60) as http:
        Asker(http, document)("get", "/v1/models")
        with pytest.raises(AssertionError, match="fingerprint"):
            Asker(http, lacking)("get", "/v1/models")


def ask_for_calls(ask: Asker) -> None:
    """The answers that are calls, of all wires, and a call in a conversation."""
    schema = {"type": "object", "properties": {"at": {"enum": ["a", "b"]}}, "required": ["at"]}
    function = {"name": "f", "parameters": schema}
    question = [{"role": "user", "content": "So?"}]
    chat = {"messages": question, "parallel_tool_calls": False, "tool_choice": "required"}
    tools = [{"type": "function", "function": function}]
    called = ask("post", "/v1/chat/completions", {**chat, "tools": tools, "logprobs": True})
    assert called["choices"][0]["message"]["tool_calls"]
    response = {"input": "So?", "parallel_tool_calls": False, "tool_choice": "required"}
    called = ask("post", "/v1/responses", {**response, "tools": [{"type": "function", **function}]})
    assert called["output"][0]["type"] == "function_call"
    message = {
        "messages": question,
        "max_tokens": 100,
        "tool_choice": {"type": "tool", "name": "f"},
    }
    tools = [{"name": "f", "input_schema": schema}]
    called = ask("post", "/v1/messages", {**message, "tools": tools})
    assert called["content"][0]["type"] == "tool_use"
    items = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "Yes"},
    ]
    id = ask("post", "/v1/conversations", {"items": items})["id"]
    ask("get", "/v1/conversations/{id}/items", id=id)


def test_the_page_is_whole(tiny_server: Server) -> None:
    answer = httpx.get(f"{tiny_server.url}/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href|url)\s*[=(]|https?:|["']//""", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert "unsafe" not in policy
