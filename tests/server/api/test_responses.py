"""/v1/responses and /v1/conversations through the official SDK, and on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.fixtures.server import Server
from tests.server.api.sessions_client import refused

Json = dict[str, Any]
SHORT: Json = {"model": "any", "max_output_tokens": 12, "extra_body": {"ignore_eos": True}}
PARAGRAPH = "The river runs to the sea, and nobody knows why. " * 3


@pytest.fixture
def client(tiny_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as http:
        yield http


def events_of(response: httpx.Response) -> list[Json]:
    """The events of a Responses stream, after a look at each frame."""
    assert response.status_code == 200, response.text
    found = []
    text = "".join(line for line in response.text.splitlines(True) if not line.startswith(":"))
    for frame in text.split("\n\n")[:-1]:
        head, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}"
        found.append(event)
    assert "[DONE]" not in response.text and "\nid:" not in response.text
    return found


def streamed(http: httpx.Client, **body: Any) -> list[Json]:
    answer = http.post("/v1/responses", json={"stream": True, "ignore_eos": True, **body})
    return events_of(answer)


# ------------------------------------------------------------------------------------ the SDK


def test_whole_streamed_and_found_again_say_the_same(client: OpenAI) -> None:
    whole = client.responses.create(
        input="Why do rivers bend?", instructions="Be brief.", temperature=0, **SHORT
    )
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None and whole.usage.output_tokens == 12
    assert whole.output_text and whole.instructions == "Be brief."
    assert client.responses.retrieve(whole.id) == whole
    with client.responses.stream(
        input="Why do rivers bend?", instructions="Be brief.", temperature=0, **SHORT
    ) as stream:
        events = list(stream)
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == text
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_input_tokens_are_counted_and_nothing_is_kept(client: OpenAI, http: httpx.Client) -> None:
    conversation = client.conversations.create(
        items=[{"type": "message", "role": "user", "content": "My name is Ada."}]
    )
    first = client.responses.create(input="Why do rivers bend?", **SHORT)
    tool = {"type": "function", "name": "now", "parameters": {}, "strict": False}
    cases: list[Json] = [
        {"input": "Why do rivers bend?"},
        {"input": "Why?", "instructions": "Be brief.", "tools": [tool]},
        {"input": "And then?", "previous_response_id": first.id},
        {"input": "Who am I?", "conversation": conversation.id},
    ]
    for asked in cases:
        counted = client.responses.input_tokens.count(model="any", **asked)
        assert counted.object == "response.input_tokens"
        again = client.responses.input_tokens.count(model="any", **asked)
        answer = client.responses.create(**asked, **SHORT)
        assert answer.usage is not None
        assert counted.input_tokens == again.input_tokens == answer.usage.input_tokens
    path = "/v1/responses/input_tokens"
    assert refused(http.post(path, json={}), 400, "invalid_value", "input")
    unknown = {"input": "Hi", "previous_response_id": "resp_" + "0" * 32}
    assert refused(http.post(path, json=unknown), 404, "not_found")


def test_an_answer_that_ends_by_itself_is_completed(client: OpenAI) -> None:
    whole = client.responses.create(
        model="any", input="Hello", temperature=0, extra_body={"stop": PIECE(client)}
    )
    assert whole.status == "completed" and whole.incomplete_details is None
    with client.responses.stream(
        model="any", input="Hello", temperature=0, extra_body={"stop": PIECE(client)}
    ) as stream:
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.status == "completed"


def PIECE(client: OpenAI) -> str:
    """A stop string that the greedy answer to Hello has."""
    text = client.responses.create(input="Hello", temperature=0, **SHORT).output_text
    return text[len(text) // 2 :][:3]


def test_previous_responses_are_parents_and_branch(client: OpenAI) -> None:
    said = {"instructions": "Answer in verse.", **SHORT}
    first = client.responses.create(input=PARAGRAPH, **said)
    assert first.usage is not None
    num_first = first.usage.input_tokens + first.usage.output_tokens
    branches = [
        client.responses.create(input=text, previous_response_id=first.id, **said)
        for text in ("And then?", "Why?", "Who?")
    ]
    for branch in branches:
        assert branch.previous_response_id == first.id and branch.usage is not None
        assert branch.usage.input_tokens > num_first
        cached = branch.usage.input_tokens_details.cached_tokens
        assert cached >= (num_first - 1) // 16 * 16
    # Instructions are not inherited: with others, or none, the prompt is another.
    other = client.responses.create(input="Why?", previous_response_id=first.id, **SHORT)
    assert other.instructions is None and other.usage is not None
    assert other.usage.input_tokens < branches[1].usage.input_tokens  # type: ignore[union-attr]
    third = client.responses.create(input="So?", previous_response_id=branches[1].id, **said)
    assert third.usage is not None
    assert third.usage.input_tokens_details.cached_tokens > num_first // 16 * 16


def test_what_is_not_stored_is_not_found(client: OpenAI) -> None:
    first = client.responses.create(input="One", **SHORT)
    plain = client.responses.create(
        input="Two", store=False, previous_response_id=first.id, **SHORT
    )
    assert plain.output_text and plain.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(plain.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="Three", previous_response_id=plain.id, **SHORT)
    assert caught.value.param == "previous_response_id"


def test_background_cancel_and_resume(client: OpenAI) -> None:
    started = client.responses.create(
        model="any",
        input="Tell me all",
        background=True,
        stream=True,
        max_output_tokens=60,
        extra_body={"ignore_eos": True},
    )
    seen: list[Any] = []
    for event in started:
        seen.append(event)
        if len(seen) == 9:
            break
    started.close()
    response_id = seen[0].response.id
    rest = list(
        client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
    )
    again = list(client.responses.retrieve(response_id, stream=True))
    assert [e.to_dict() for e in again] == [e.to_dict() for e in [*seen, *rest]]
    assert client.responses.retrieve(response_id).status == "incomplete"
    assert client.responses.cancel(response_id).status == "incomplete"  # it had ended

    long = client.responses.create(
        model="any", input="Tell me all", background=True, extra_body={"ignore_eos": True}
    )
    assert long.status in ("queued", "in_progress")
    cancelled = client.responses.cancel(long.id)
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(long.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="On", previous_response_id=long.id, **SHORT)
    assert caught.value.param == "previous_response_id"


def test_delete_and_input_items(client: OpenAI) -> None:
    first = client.responses.create(
        input=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ],
        **SHORT,
    )
    second = client.responses.create(input="Again", previous_response_id=first.id, **SHORT)
    items = client.responses.input_items.list(first.id, order="asc").data
    assert [(item.role, item.content[0].text) for item in items] == [  # type: ignore[union-attr]
        ("system", "Be kind."),
        ("user", "Hello"),
    ]
    (newest,) = client.responses.input_items.list(first.id, limit=1).data
    assert newest.id == items[-1].id
    pages = client.responses.input_items.list(first.id, order="asc", after=items[0].id).data
    assert [item.id for item in pages] == [items[1].id]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(input="Once more", previous_response_id=second.id, **SHORT)
    assert third.usage is not None and second.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens
    for response in (second, third):
        client.responses.delete(response.id)


def test_conversations(client: OpenAI) -> None:
    conversation = client.conversations.create(
        metadata={"for": "tests"}, items=[{"role": "user", "content": "My name is Ada."}]
    )
    assert conversation.metadata == {"for": "tests"}
    first = client.responses.create(input="Hello", conversation=conversation.id, **SHORT)
    second = client.responses.create(input="Again", conversation=conversation.id, **SHORT)
    assert second.conversation is not None and second.conversation.id == conversation.id
    items = client.conversations.items.list(conversation.id, order="asc").data
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    said = ["My name is Ada.", "Hello", first.output_text, "Again", second.output_text]
    assert texts == said
    added = client.conversations.items.create(
        conversation.id, items=[{"role": "user", "content": "One more"}]
    )
    assert len(added.data) == 1
    one = client.conversations.items.retrieve(
        added.data[0].id or "", conversation_id=conversation.id
    )
    assert one == added.data[0]

    # Without an item, what came after it keeps its id and its words.
    client.conversations.items.delete(items[1].id or "", conversation_id=conversation.id)
    left = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.id for item in left] == [items[0].id, *(i.id for i in items[2:]), one.id]
    assert left[1:-1] == items[2:]
    third = client.responses.create(input="Go on", conversation=conversation.id, **SHORT)
    assert third.status == "incomplete"
    assert len(client.conversations.items.list(conversation.id, limit=100).data) == 7
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(items[1].id or "", conversation_id=conversation.id)

    changed = client.conversations.update(conversation.id, metadata={"for": "others"})
    assert client.conversations.retrieve(conversation.id) == changed
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_cancelled_response_is_no_head(client: OpenAI) -> None:
    conversation = client.conversations.create()
    client.responses.create(input="Hello", conversation=conversation.id, **SHORT)
    long = client.responses.create(
        model="any",
        input="Never mind",
        conversation=conversation.id,
        background=True,
        extra_body={"ignore_eos": True},
    )
    client.responses.cancel(long.id)
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert len(items) == 2
    client.responses.create(input="Again", conversation=conversation.id, **SHORT)
    assert len(client.conversations.items.list(conversation.id).data) == 4


def test_a_second_response_waits_for_the_first(tiny_server: Server) -> None:
    import asyncio

    async def both() -> list[str]:
        async with AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="any") as client:
            conversation = await client.conversations.create()
            answers = await asyncio.gather(
                *(
                    client.responses.create(input=text, conversation=conversation.id, **SHORT)
                    for text in ("One", "Two", "Three")
                )
            )
            assert len({answer.id for answer in answers}) == 3
            items = await client.conversations.items.list(conversation.id, order="asc")
            return [str(item.role) for item in items.data]  # type: ignore[union-attr]

    assert asyncio.run(both()) == ["user", "assistant"] * 3


def test_logprobs_come_with_the_text(client: OpenAI) -> None:
    asked: Json = {
        "input": "Hello",
        "temperature": 0,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 3,
        **SHORT,
    }
    whole = client.responses.create(**asked)
    part = whole.output[0].content[0]  # type: ignore[union-attr,index]
    logprobs = part.logprobs  # type: ignore[union-attr]
    assert logprobs is not None and len(logprobs) == 12
    assert all(len(entry.top_logprobs) == 3 for entry in logprobs)
    spelled = b"".join(bytes(entry.bytes) for entry in logprobs)
    assert spelled.decode(errors="replace") == whole.output_text
    with client.responses.stream(**asked) as stream:
        deltas = [e for e in stream if e.type == "response.output_text.delta"]
    tokens = [entry.token for delta in deltas for entry in delta.logprobs]
    assert tokens == [entry.token for entry in logprobs][: len(tokens)]


# ----------------------------------------------------------------------------------- the wire


def test_the_order_of_events(http: httpx.Client) -> None:
    events = streamed(http, input="Hello", max_output_tokens=8, metadata={"a": "b"})
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    item = events[-2]["item"]
    assert events[-1]["response"]["output"] == [item]
    assert {e["item_id"] for e in events if "item_id" in e} == {item["id"]}
    assert events[0]["response"]["metadata"] == {"a": "b"}


def test_idempotency(http: httpx.Client) -> None:
    body = {"input": "Hello", "max_output_tokens": 6}
    headers = {"idempotency-key": "a response, please"}
    first = http.post("/v1/responses", json=body, headers=headers).json()
    assert http.post("/v1/responses", json=body, headers=headers).json() == first
    other = http.post("/v1/responses", json={**body, "input": "x"}, headers=headers)
    refused(other, 409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [{"content": "x"}]}, "invalid_value", "input.0.type"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input.0.content"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "n"}]},
            "invalid_value",
            "input.0.arguments",
        ),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "unsupported_parameter",
            "input.0.type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "unsupported_parameter",
            "input.0.content",
        ),
        ({"input": "x", "previous_response_id": "resp_1"}, "invalid_value", "previous_response_id"),
        ({"input": "x", "store": False, "background": True}, "invalid_value", "background"),
        (
            {"input": "x", "store": False, "conversation": "conv_" + "0" * 32},
            "invalid_value",
            "conversation",
        ),
        (
            {
                "input": "x",
                "previous_response_id": "resp_" + "0" * 32,
                "conversation": "conv_" + "0" * 32,
            },
            "invalid_value",
            "previous_response_id",
        ),
        ({"input": "x", "n": 2}, "invalid_value", "n"),
        ({"input": "x", "max_tokens": 3}, "unsupported_parameter", "max_tokens"),
        ({"input": "x", "prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"input": "x", "top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"input": "x", "max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"input": "word " * 600}, "context_length_exceeded", "input"),
    ],
)
def test_what_is_refused(http: httpx.Client, body: Json, code: str, param: str) -> None:
    answer = http.post("/v1/responses", json=body)
    refused(answer, 400, code)
    assert answer.json()["error"]["param"] == param


def test_what_is_not_there(http: httpx.Client) -> None:
    for path in ("responses/resp_", "conversations/conv_", "conversations/sess_"):
        refused(http.get(f"/v1/{path}{'0' * 32}"), 404, "not_found")
    unlisted = http.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 3}).json()
    refused(http.get("/v1/conversations/" + unlisted["id"]), 404, "not_found")
    body = {"input": "x", "conversation": "conv_" + "0" * 32}
    refused(http.post("/v1/responses", json=body), 404, "not_found")


def test_truncation_drops_the_oldest_turns(http: httpx.Client) -> None:
    body: Json = {"input": PARAGRAPH, "max_output_tokens": 8, "ignore_eos": True}
    answer = http.post("/v1/responses", json=body).json()
    for _ in range(6):
        body["previous_response_id"] = answer["id"]
        response = http.post("/v1/responses", json=body)
        if response.status_code == 400:
            break
        answer = response.json()
    assert "truncation" in refused(response, 400, "context_length_exceeded")
    response = http.post("/v1/responses", json={**body, "truncation": "auto"})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["input_tokens"] < answer["usage"]["input_tokens"]


def conversation(http: httpx.Client) -> str:
    id: str = http.post("/v1/conversations", json={}).json()["id"]
    return id


def items_of(http: httpx.Client, conversation: str) -> list[Json]:
    answer = http.get(f"/v1/conversations/{conversation}/items?order=asc&limit=100")
    items: list[Json] = answer.json()["data"]
    return items


def fork_of(http: httpx.Client, conversation: str) -> str:
    session = conversation.replace("conv_", "sess_")
    id: str = http.post(f"/v1/sessions/{session}/fork", json={}).json()["id"]
    return id.replace("sess_", "conv_")


def test_what_was_dropped_stays_so_when_an_item_is_deleted(http: httpx.Client) -> None:
    first = conversation(http)
    # Half a character, drawn by chance, would be more tokens when it is written anew.
    said: Json = {"max_output_tokens": 4, "ignore_eos": True, "temperature": 0}
    body = {"input": PARAGRAPH, "truncation": "auto", **said}
    for _ in range(8):
        answer = http.post("/v1/responses", json={**body, "conversation": first})
        assert answer.status_code == 200, answer.text
    items = items_of(http, first)

    def input_tokens(conversation: str) -> int:
        body = {"input": "And?", "conversation": conversation, **said}
        answer = http.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["input_tokens"])

    whole = input_tokens(fork_of(http, first))
    for place in range(len(items) - 2):
        fork = fork_of(http, first)
        before = [item["id"] for item in items_of(http, fork)]
        assert http.delete(f"/v1/conversations/{fork}/items/{before[place]}").status_code == 200
        del before[place]
        assert [item["id"] for item in items_of(http, fork)] == before
        # The second one too is not in the prompt, or in it and now gone.
        assert http.delete(f"/v1/conversations/{fork}/items/{before[0]}").status_code == 200
        tokens = input_tokens(fork)
        assert tokens == whole if place < 2 else tokens <= whole


def test_responses_are_no_listed_sessions(http: httpx.Client) -> None:
    before = http.get("/v1/sessions?limit=100").json()["data"]
    http.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 3})
    assert http.get("/v1/sessions?limit=100").json()["data"] == before


# ---------------------------------------------------------------------- tools and formats

WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Bern", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Place(pydantic.BaseModel):
    city: Literal["Bern", "Oslo"]
    warm: bool


@pytest.fixture
def wide(wide_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{wide_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_tool_is_called_and_answered(wide: OpenAI) -> None:
    asked: Json = {
        "model": "any",
        "input": "Is it warm?",
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "extra_body": {"seed": 3},
    }
    whole = wide.responses.create(**asked)
    assert whole.status == "completed"
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Bern", "Oslo")
    with wide.responses.stream(**asked) as stream:
        events = list(stream)
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:3] == ["created", "in_progress", "output_item.added"]
    assert set(names[3:-3]) == {"function_call_arguments.delta"}
    assert names[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    spelled = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(spelled) == call.arguments
    (streamed,) = events[-1].response.output  # type: ignore[union-attr]
    assert streamed.arguments == call.arguments  # type: ignore[union-attr]

    answer = wide.responses.create(
        model="any",
        previous_response_id=whole.id,
        tools=[WEATHER],  # type: ignore[list-item]
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Yes, 25 C."}],
        max_output_tokens=8,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None and whole.usage is not None
    before = whole.usage.input_tokens + whole.usage.output_tokens
    assert answer.usage.input_tokens_details.cached_tokens >= (before - 1) // 16 * 16
    (output,) = wide.responses.input_items.list(answer.id).data
    assert output.type == "function_call_output" and output.output == "Yes, 25 C."
    # The same without the server's memory.
    told = wide.responses.create(
        model="any",
        tools=[WEATHER],  # type: ignore[list-item]
        input=[
            {"role": "user", "content": "Is it warm?"},
            call.to_dict(),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": "Yes, 25 C."},
        ],
        store=False,
        max_output_tokens=8,
    )
    assert told.usage is not None
    assert abs(told.usage.input_tokens - answer.usage.input_tokens) < 8


def test_calls_keep_their_ids_in_forks_and_transcripts(wide_server: Server) -> None:
    with httpx.Client(base_url=wide_server.url, timeout=30) as http:
        first = conversation(http)
        given: Any = "Is it warm?"
        for seed in range(2):
            body: Json = {
                "input": given,
                "conversation": first,
                "tools": [WEATHER],
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "seed": seed,
            }
            call = http.post("/v1/responses", json=body).json()["output"][-1]
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
            given = [output]
        http.post(f"/v1/conversations/{first}/items", json={"items": given})

        def told(conversation: str) -> list[Json]:
            """The items without their ids and those of what they are parts of."""
            return [
                {key: value for key, value in item.items() if key != "id"}
                for item in items_of(http, conversation)
            ]

        expected = told(first)
        types = ["message", *["function_call", "function_call_output"] * 2]
        assert [item["type"] for item in expected] == types
        assert told(fork_of(http, first)) == expected
        assert told(fork_of(http, fork_of(http, first))) == expected

        url = f"/v1/sessions/{first.replace('conv_', 'sess_')}/export"
        for _ in range(2):  # also what was imported is exported whole
            imported = http.post("/v1/sessions/import", json=http.get(url).json()).json()["id"]
            assert told(imported.replace("sess_", "conv_")) == expected
            url = f"/v1/sessions/{imported}/export"


def test_an_imported_answer_is_gone_on_with(http: httpx.Client) -> None:
    first = conversation(http)
    body: Json = {"input": "Why?", "max_output_tokens": 4, "ignore_eos": True, "seed": 1}
    http.post("/v1/responses", json={**body, "conversation": first})
    document = http.get(f"/v1/sessions/{first.replace('conv_', 'sess_')}/export").json()
    id = http.post("/v1/sessions/import", json=document).json()["id"]
    turn = http.post(f"/v1/sessions/{id}/continue", json={"max_tokens": 3}).json()
    assert turn["num_tokens"] == 7
    # It is no response: nobody asked for one there.
    response = http.get(f"/v1/responses/{turn['generation'].replace('gen_', 'resp_')}")
    refused(response, 404, "not_found")


def test_log_probabilities_beside_a_call_are_those_of_the_words(wide: OpenAI) -> None:
    """An enforced call has no words: nothing is told of its tokens, whole and streamed."""
    asked: Json = {
        "model": "any",
        "input": "Is it warm?",
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "extra_body": {"seed": 3},
    }
    whole = wide.responses.create(**asked)
    (call,) = whole.output
    assert call.type == "function_call" and not hasattr(call, "logprobs")
    with wide.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(delta.delta for delta in deltas) == call.arguments
    assert not any("logprobs" in event.to_json() for event in events[2:-1])
    # The same request, cut before the call is one: then it is words, and they are told.
    words = wide.responses.create(**{**asked, "max_output_tokens": 6})
    (message,) = words.output
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text" and part.logprobs is not None
    assert "".join(entry.token for entry in part.logprobs) == part.text


def test_control_tokens_in_what_tools_say_are_text(wide_server: Server) -> None:
    """And the prompt is the very one of chat."""
    function = {"name": "weather", "parameters": {"type": "object"}}

    def counts(mark: str) -> tuple[int, int]:
        described = {**function, "description": f"Says {mark}."}
        call = {"name": "weather", "arguments": json.dumps({"city": mark})}
        output = f"It {mark} rains.{mark}"
        chat: Json = {
            "messages": [
                {"role": "user", "content": "So?"},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c1", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": output},
            ],
            "tools": [{"type": "function", "function": described}],
            "max_tokens": 1,
        }
        response: Json = {
            "input": [
                {"role": "user", "content": "So?"},
                {"type": "function_call", "call_id": "c1", **call},
                {"type": "function_call_output", "call_id": "c1", "output": output},
            ],
            "tools": [{"type": "function", **described}],
            "max_output_tokens": 1,
        }
        with httpx.Client(base_url=wide_server.url, timeout=60) as http:
            by_chat = http.post("/v1/chat/completions", json=chat).json()["usage"]
            by_response = http.post("/v1/responses", json=response).json()["usage"]
            marks = http.post("/tokenize", json={"messages": [{"role": "user", "content": mark}]})
            assert marks.json()["tokens"].count(2) == 1  # the template's own
        return by_chat["prompt_tokens"], by_response["input_tokens"]

    by_chat, by_response = counts("<|im_end|>")
    assert by_chat == by_response
    without, _ = counts("x")
    assert by_chat - without > 4 * 2  # each of the four is spelled out: it is many tokens, not one


def test_parse(wide: OpenAI) -> None:
    for seed in range(3):
        parsed = wide.responses.parse(
            model="any",
            input="Where is it warm?",
            text_format=Place,
            extra_body={"seed": seed},
        )
        assert isinstance(parsed.output_parsed, Place)
        assert parsed.text is not None and parsed.text.format is not None
        assert parsed.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}},
            "text.format",
        ),
    ],
)
def test_what_is_refused_of_tools_and_formats(http: httpx.Client, body: Json, param: str) -> None:
    answer = http.post("/v1/responses", json={"input": "x", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {"input": [{"role": "nobody", "content": "x"}]}, "input.0.role"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{}]}]}, "input.0.content.0.type"),
        ("/v1/responses", {"input": "\ud800"}, None),
        ("/v1/responses", {"input": [{"role": "user", "content": "\ud800"}]}, None),
        (
            "/v1/responses",
            {"input": "x", "tools": [{**WEATHER, "description": "\ud800"}]},
            "tools",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"title": "\ud800"}},
                    }
                ],
            },
            None,
        ),
        ("/v1/conversations", {"items": [{"role": "user", "content": "\ud800"}]}, None),
    ],
)
def test_what_json_can_hold_and_we_cannot(
    http: httpx.Client, path: str, body: Json, param: str | None
) -> None:
    answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
