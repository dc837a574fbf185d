"""/v1/messages through Anthropic's SDK, and on the wire."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool

from tests.fixtures.server import Server

Json = dict[str, Any]
ASKED: Json = {
    "model": "any",
    "max_tokens": 12,
    "system": "You answer briefly.",
    "messages": [{"role": "user", "content": "Why do rivers bend?"}],
}
SEED: Json = {"extra_body": {"seed": 7, "ignore_eos": True}}
WEATHER: Json = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Bern", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(tiny_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=tiny_server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as http:
        yield http


def failed(response: httpx.Response, status: int, type: str) -> str:
    """The message of an error in Anthropic's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == type
    assert response.headers["request-id"] == body["request_id"]
    assert response.headers["x-request-id"] == body["request_id"]
    return str(body["error"]["message"])


# ------------------------------------------------------------------------------------ the SDK


def test_whole_and_streamed_say_the_same(client: Anthropic) -> None:
    whole = client.messages.create(**ASKED, **SEED)
    assert (whole.type, whole.role, whole.stop_reason) == ("message", "assistant", "max_tokens")
    (block,) = whole.content
    assert block.type == "text" and block.text
    assert whole._request_id is not None and whole._request_id.startswith("req_")
    with client.messages.stream(**ASKED, **SEED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == block.text and final.content[0].text == text  # type: ignore[union-attr]
    assert final.stop_reason == "max_tokens"
    for message in (whole, final):
        assert message.usage.output_tokens == 12
    counted = client.messages.count_tokens(
        model="any", system=ASKED["system"], messages=ASKED["messages"]
    )
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    again = client.messages.create(**ASKED, **SEED)
    assert again.usage.cache_read_input_tokens == (counted.input_tokens - 1) // 16 * 16
    assert again.usage.input_tokens == counted.input_tokens - again.usage.cache_read_input_tokens


def test_models(client: Anthropic) -> None:
    page = client.models.list()
    (model,) = page  # there is no next one
    assert (page.has_more, page.first_id, page.last_id) == (False, model.id, model.id)
    assert (model.type, model.display_name, model.lifecycle) == ("model", model.id, "active")
    assert abs(model.created_at - datetime.now(UTC)) < timedelta(hours=1)
    assert client.models.retrieve(model.id) == model


def test_the_order_of_events(client: Anthropic) -> None:
    stream = client.messages.create(**ASKED, **SEED, stream=True)
    events = list(stream)
    names = [event.type for event in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


def test_stop_sequences(client: Anthropic) -> None:
    whole = client.messages.create(**ASKED, **SEED)
    text = whole.content[0].text  # type: ignore[union-attr]
    stop = text[len(text) // 2 :][:3]
    cut = client.messages.create(**ASKED, **SEED, stop_sequences=["never so", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in cut.content) == text[: text.index(stop)]  # type: ignore[union-attr]


def test_the_last_message_of_the_assistant_is_gone_on_with(client: Anthropic) -> None:
    begun = [*ASKED["messages"], {"role": "assistant", "content": "Because"}]
    counted = client.messages.count_tokens(model="any", messages=begun)
    closed = client.messages.count_tokens(
        model="any", messages=[*begun, {"role": "user", "content": ""}]
    )
    assert counted.input_tokens < closed.input_tokens
    answer = client.messages.create(**{**ASKED, "messages": begun}, **SEED)
    assert answer.content


def test_tools(wide_server: Server) -> None:
    client = Anthropic(base_url=wide_server.url, api_key="any", max_retries=0)
    asked: Json = {**ASKED, "max_tokens": 200, "tools": [WEATHER]}
    forced: Json = {**asked, "tool_choice": {"type": "tool", "name": "weather"}}
    whole = client.messages.create(**forced, extra_body={"seed": 7})
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.type == "tool_use" and call.name == "weather"
    assert call.input in ({"city": "Bern"}, {"city": "Oslo"})
    with client.messages.stream(**forced, extra_body={"seed": 7}) as stream:
        final = stream.get_final_message()
    (streamed,) = final.content
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input) == (call.name, call.input)
    assert final.stop_reason == "tool_use"
    result = client.messages.create(
        **{
            **asked,
            "max_tokens": 8,
            "messages": [
                *ASKED["messages"],
                {"role": "assistant", "content": [call.to_dict()]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."},
                        {"type": "text", "text": "So?"},
                    ],
                },
            ],
        }
    )
    assert result.usage.input_tokens + (result.usage.cache_read_input_tokens or 0) > 100
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_sends_the_whole_conversation(wide_server: Server, stream: bool) -> None:
    """Its default are message threads, where it sends only what is new."""
    asked_for = []

    @beta_tool
    def weather(city: Literal["Bern", "Oslo"]) -> str:
        """The weather in a city."""
        asked_for.append(city)
        return "It rains."

    with Anthropic(base_url=wide_server.url, api_key="any", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            **{**ASKED, "max_tokens": 200},
            tools=[weather],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            max_iterations=2,
            stream=stream,
        )
        turns: Iterator[Any] = iter(runner)
        first, second = [turn.get_final_message() if stream else turn for turn in turns]
        (call,) = first.content
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
        counted = client.messages.count_tokens(
            model="any",
            system=ASKED["system"],
            messages=[
                *ASKED["messages"],
                {"role": "assistant", "content": [call.to_dict()]},
                {"role": "user", "content": [result]},
            ],
            tools=[weather.to_dict()],  # type: ignore[list-item]
        )
    assert asked_for[0] == call.input["city"]
    usage = second.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_a_thread_of_messages_is_refused_clearly(client: Anthropic) -> None:
    thread = client.beta.messages.thread(model="any", max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="`thread` is not supported") as caught:
        thread.send(*ASKED["messages"])
    assert caught.value.error_code == "thread_unsupported_request"  # type: ignore[attr-defined]
    kept = client.beta.messages.thread(
        model="any", max_tokens=5, unsupported_request_behavior="continue_unthreaded"
    )
    assert kept.send(*ASKED["messages"]).content
    goes_on = {"thread": {"type": "continue", "previous_message_id": "msg_1"}}
    with pytest.raises(anthropic.BadRequestError, match="`thread` is not supported"):
        client.messages.create(**ASKED, extra_body=goes_on)


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_an_answer_by_a_schema(client: Anthropic, where: str) -> None:
    format = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    said = {"format": format} if where == "output_config" else format
    answer = client.messages.create(**{**ASKED, "max_tokens": 100}, extra_body={where: said})
    assert json.loads(answer.content[0].text)["city"] in ("Bern", "Oslo")  # type: ignore[union-attr]


def test_async(tiny_server: Server) -> None:
    async def both() -> tuple[str, str]:
        async with AsyncAnthropic(base_url=tiny_server.url, api_key="any") as client:
            whole = await client.messages.create(**ASKED, **SEED)
            async with client.messages.stream(**ASKED, **SEED) as stream:
                text = "".join([piece async for piece in stream.text_stream])
        return whole.content[0].text, text  # type: ignore[union-attr]

    whole, streamed = asyncio.run(both())
    assert whole == streamed


# ----------------------------------------------------------------------------------- the wire


def test_frames(http: httpx.Client) -> None:
    response = http.post("/v1/messages", json={**ASKED, "stream": True})
    assert response.headers["request-id"] == response.headers["x-request-id"]
    text = re.sub(r"^: .*\n", "", response.text, flags=re.MULTILINE)
    frames = text.split("\n\n")[:-1]
    for frame in frames:
        match = re.fullmatch(r"event: (\w+)\ndata: (\{.*\})", frame)
        assert match and json.loads(match[2])["type"] == match[1]
    assert frames[1] == 'event: ping\ndata: {"type":"ping"}'
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 600}, "context length"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages.0.content.0.tool_use_id",
        ),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"n": 2}, "n"),
        ({"stop": "x"}, "stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"name": "no good", "input_schema": {}}]}, "tools.0.name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"compaction": {"type": "summary"}}, "compaction"),
        ({"fallbacks": [{"model": "other"}]}, "fallbacks"),
        ({"output_format": {"type": "text"}}, "output_format.type"),
        (
            {
                "output_format": {"type": "json_schema", "schema": {}},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "exclude each other",
        ),
    ],
)
def test_what_is_refused(http: httpx.Client, change: Json, said: str) -> None:
    body = {key: value for key, value in {**ASKED, **change}.items() if value is not None}
    assert said in failed(http.post("/v1/messages", json=body), 400, "invalid_request_error")


def test_errors_of_all_layers_are_in_anthropics_shape(http: httpx.Client) -> None:
    assert failed(http.get("/v1/messages"), 405, "invalid_request_error")
    assert failed(http.post("/v1/messages/batches", json={}), 404, "not_found_error")
    assert failed(http.post("/v1/messages", content=b"{"), 415, "invalid_request_error")
    json_type = {"content-type": "application/json"}
    assert failed(
        http.post("/v1/messages", content=b"{", headers=json_type), 400, "invalid_request_error"
    )
    assert failed(
        http.post("/v1/messages", content=b" " * (8 * 2**20 + 1), headers=json_type),
        413,
        "request_too_large",
    )
    other = {"origin": "http://evil.example"}
    assert failed(http.post("/v1/messages", json=ASKED, headers=other), 403, "permission_error")
    assert "error" in http.get("/v1/messages2").json()  # what is not Anthropic's is ours
    assert "type" not in http.get("/v1/messages2").json()


def test_the_sdk_knows_our_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASKED, "max_tokens": 9999})
    assert caught.value.request_id is not None
    assert "context length" in str(caught.value)


def test_idempotency(http: httpx.Client) -> None:
    headers = {"idempotency-key": "a message, please"}
    first = http.post("/v1/messages", json=ASKED, headers=headers).json()
    assert http.post("/v1/messages", json=ASKED, headers=headers).json() == first
