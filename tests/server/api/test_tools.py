"""Tools and reasoning on the chat wire: the official SDK and LangChain against a real server."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.fixtures.server import Server, serving
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import TEMPLATE, write_tokenizer
from tests.server.api.sessions_client import refused

STREAMS = 16
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the weather in Paris?"}
]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Do {name}.", "parameters": parameters},
    }


WORD = {"type": "string", "maxLength": 12}
TOOLS: Any = [
    tool("get_weather", city=WORD, unit={"enum": ["celsius", "fahrenheit"]}),
    tool(
        "book-table",
        people={"type": "integer", "minimum": 1, "maximum": 12},
        at={"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
        guests={"type": "array", "items": WORD, "maxItems": 2},
    ),
    tool("now"),
]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


@pytest.fixture(scope="module")
def http(tiny_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(default_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{default_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


# ------------------------------------------------------------------------------------ bounds


def nested(depth: int) -> dict[str, Any]:
    """A schema nested exactly so deep."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def with_parameters(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


FULL = 65_536 - len('{"description":""}')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool("a" * 65)]}, "tools.0.function.name"),
        ({"tools": [tool("f\n")]}, "tools.0.function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools.1.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        (with_parameters(nested(65)), "tools.0.function.parameters"),
        (with_parameters({"type": "array"}), "tools.0.function.parameters"),
        (with_parameters({"description": "x" * (FULL + 1)}), "tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("f")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("f")}, "tool_choice"),
        ({"tools": TOOLS[2:], "regex": "a+"}, "tools"),
        (
            {
                **with_parameters({"properties": {"a": {"$ref": "#/no"}}, "required": ["a"]}),
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tools",
        ),
    ],
)
def test_what_is_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, **fields}
    refused(http.post("/v1/chat/completions", json=body), 400, "invalid_value", param)


def test_other_kinds_of_choice_are_refused(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}
    response = http.post("/v1/chat/completions", json=body)
    refused(response, 400, "unsupported_parameter", "tool_choice")


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"id": "1", "function": {"name": "a b", "arguments": "{}"}}, "function.name"),
        ({"id": "1", "function": {"name": "f", "arguments": {}}}, "function.arguments"),
        ({"id": "1" * 257, "function": {"name": "f", "arguments": "{}"}}, "id"),
    ],
)
def test_calls_in_messages_are_checked(
    http: httpx.Client, call: dict[str, Any], param: str
) -> None:
    messages = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    response = http.post("/v1/chat/completions", json={"messages": messages})
    refused(response, 400, "invalid_value", f"messages.1.tool_calls.0.{param}")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [tool(f"f{i}") for i in range(128)]},
        {"tools": [tool("a" * 64)]},
        with_parameters(nested(64)),
        with_parameters({"description": "x" * FULL}),
    ],
)
def test_the_bounds_themselves_are_taken(http: httpx.Client, fields: dict[str, Any]) -> None:
    """Tools that may not be called are not in the prompt, so that all of them fit."""
    body = {"messages": QUESTION, "max_tokens": 1, "tool_choice": "none", **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    plain = http.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


# ----------------------------------------------------------------------------- enforced calls

Calls = list[tuple[str, str]]


def whole_calls(answer: ChatCompletion) -> Calls:
    return [
        (call.function.name, call.function.arguments)
        for call in answer.choices[0].message.tool_calls or []
        if call.type == "function"
    ]


def streamed_calls(chunks: list[ChatCompletionChunk]) -> Calls:
    """The calls put together, after a look at what each delta says."""
    calls: list[tuple[str, str]] = []
    ids = []
    for delta in (delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []):
        assert delta.function is not None and delta.function.arguments is not None
        if delta.index == len(calls):
            assert delta.id is not None and delta.type == "function"
            assert delta.function.name is not None
            ids.append(delta.id)
            calls.append((delta.function.name, delta.function.arguments))
        else:
            assert delta.index == len(calls) - 1
            assert (delta.id, delta.type, delta.function.name) == (None, None, None)
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.function.arguments)
    assert len(set(ids)) == len(ids)
    return calls


def force(client: OpenAI, seed: int) -> None:
    """One enforced answer, whole and streamed: both the same, and valid."""
    names = list(SCHEMAS)
    choice: Any = "required" if seed % 3 else named(names[seed % len(names)])
    question: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": f"Please do it for {seed} people in Lyon."}
    ]
    fields: dict[str, Any] = {
        "model": "any",
        "messages": question,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": seed % 2,
        "seed": seed,
        "max_tokens": 700,
        "parallel_tool_calls": seed % 4 == 1,
    }
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    calls = whole_calls(whole)
    assert 1 <= len(calls) <= (8 if fields["parallel_tool_calls"] else 1)
    for name, arguments in calls:
        if isinstance(choice, dict):
            assert name == choice["function"]["name"]
        Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert streamed_calls(chunks) == calls
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        "tool_calls"
    ]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    longest = max(len(arguments) for _, arguments in calls)
    if longest > 20:  # in pieces, not at once
        assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 3


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(10))
def test_enforced_calls_are_valid(client: OpenAI, seed: int) -> None:
    force(client, seed)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_two_hundred_enforced_calls_are_valid(client: OpenAI) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda seed: force(client, seed), range(100, 300)))


@pytest.mark.e2e
def test_choices_have_ids_of_their_own(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        n=3,
        max_tokens=100,
    )
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 3


@pytest.mark.e2e
def test_what_is_cut_off_is_told_as_length(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=named("get_weather"),
        max_tokens=18,
    )
    assert answer.choices[0].finish_reason == "length"


# ----------------------------------------------------------------- the rest of a conversation


@pytest.mark.e2e
def test_results_of_calls_are_messages(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="any",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice=named("get_weather"),
        temperature=0,
        max_tokens=100,
    )
    said = first.choices[0].message
    assert said.tool_calls
    messages: Any = [
        *QUESTION,
        said.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "It rains."},
    ]
    answer = client.chat.completions.create(
        model="any",
        messages=messages,
        tools=TOOLS,
        tool_choice="none",
        temperature=0,
        max_tokens=30,
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content
    again = client.chat.completions.create(
        model="any",
        messages=messages,
        tools=TOOLS,
        temperature=0,
        max_tokens=1,
    )
    # The call is in the prompt as the model wrote it: blocks of it are found again, as far as its
    # tokens are the tokenizer's own choice.
    assert first.usage is not None and again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached > first.usage.prompt_tokens


def test_a_result_that_answers_no_call_is_told_as_it_stands(http: httpx.Client) -> None:
    """On each wire, as is a call without its result."""

    def ask(path: str, **body: Any) -> Any:
        answer = http.post(path, json={"max_tokens": 1, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call_0", "content": "It rains."}
    messages = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, *QUESTION, result]
    prompt = ask("/tokenize", messages=messages)
    text = ask("/detokenize", tokens=prompt["tokens"])["text"]
    assert "<tool_response>\nIt rains.\n</tool_response>" in text and '"now"' in text
    chat = ask("/v1/chat/completions", messages=messages)
    assert chat["usage"]["prompt_tokens"] == prompt["count"]
    used = {"type": "tool_use", "id": "call_1", "name": "now", "input": {}}
    told = {"type": "tool_result", "tool_use_id": "call_0", "content": "It rains."}
    blocks = [
        *QUESTION,
        {"role": "assistant", "content": [used]},
        *QUESTION,
        {"role": "user", "content": [told]},
    ]
    assert ask("/v1/messages/count_tokens", messages=blocks)["input_tokens"] == prompt["count"]
    items = [
        *QUESTION,
        {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": "{}"},
        *QUESTION,
        {"type": "function_call_output", "call_id": "call_0", "output": "It rains."},
    ]
    counted = http.post("/v1/responses/input_tokens", json={"input": items})
    assert counted.json()["input_tokens"] == prompt["count"]


@pytest.mark.e2e
def test_logprobs_of_all_tokens_come_in_order(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "any",
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 3,
        "max_tokens": 100,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    tokens = [entry.token for entry in whole.choices[0].logprobs.content]
    assert "".join(tokens).startswith('<tool_call>\n{"name": "')
    streamed = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += [entry.token for entry in chunk.choices[0].logprobs.content or []]
    assert streamed == tokens


@pytest.mark.e2e
def test_a_schema_or_a_call(client: OpenAI) -> None:
    """With both, the answer is one or the other."""
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    for seed in range(4):
        answer = client.chat.completions.create(
            model="any",
            messages=QUESTION,
            tools=TOOLS[:1],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "sun", "schema": schema, "strict": True},
            },
            seed=seed,
            max_tokens=700,
        )
        calls = whole_calls(answer)
        for name, arguments in calls:
            Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
        if not calls:
            Draft202012Validator(schema).validate(
                json.loads(answer.choices[0].message.content or "")
            )


# ------------------------------------------------------------------- streams that are read again


@pytest.mark.e2e
def test_a_stream_of_calls_goes_on_from_any_place(default_server: Server) -> None:
    body = {
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": named("get_weather"),
        "stream": True,
        "resumable": True,
        "logprobs": True,
        "seed": 5,
        "max_tokens": 100,
    }
    with httpx.Client(base_url=default_server.url, timeout=60) as http:
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        generation = response.headers["x-headwater-generation"]
        whole = chunks_of(response.text)
        places = [chunk["headwater"]["event"] for chunk in whole]
        assert places == sorted(set(places))
        assert len(places) > 5
        for place in places[:-1]:
            rest = told(chunk for chunk in whole if chunk["headwater"]["event"] > place)
            again = http.get(f"/v1/streams/{generation}?format=chat&after={place}")
            assert told(chunks_of(again.text)) == rest, place
        arguments, ids, tokens = told(whole)
        Draft202012Validator(SCHEMAS["get_weather"]).validate(json.loads(arguments))
        assert len(ids) == 1
        assert "".join(tokens).startswith('<tool_call>\n{"name": "get_weather", "arguments": {')
        assert whole[-1]["choices"][0]["finish_reason"] == "tool_calls"


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def told(chunks: Any) -> tuple[str, list[str], list[str]]:
    """The arguments, the ids, and the tokens with log-probabilities of some chunks."""
    arguments, ids, tokens = "", [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        for delta in choice["delta"].get("tool_calls", []):
            arguments += delta["function"]["arguments"]
            ids += [delta["id"]] if "id" in delta else []
        if choice["logprobs"]:
            tokens += [entry["token"] for entry in choice["logprobs"]["content"]]
    return arguments, ids, tokens


# ------------------------------------------------------------------------ helpers of the SDK


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]
    days: int = Field(ge=1, le=7)
    unit: Literal["celsius", "fahrenheit"] | None


WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")
CHOSEN: dict[str, Any] = {
    "model": "any",
    "messages": QUESTION,
    "tools": [WEATHER],
    "tool_choice": named("get_weather"),
    "max_tokens": 100,
    "seed": 1,
}


@pytest.mark.e2e
def test_parse_gives_pydantic_arguments(client: OpenAI) -> None:
    message = client.chat.completions.parse(**CHOSEN).choices[0].message
    assert message.tool_calls
    assert isinstance(message.tool_calls[0].function.parsed_arguments, GetWeather)


@pytest.mark.e2e
def test_the_streaming_helper_follows_a_call(client: OpenAI) -> None:
    with client.chat.completions.stream(**CHOSEN) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 3
    assert "".join(e.arguments_delta for e in deltas) == call.function.arguments
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.arguments) == ("get_weather", call.function.arguments)
    whole = client.chat.completions.parse(**CHOSEN)
    assert whole_calls(whole) == [("get_weather", call.function.arguments)]


@pytest.mark.e2e
def test_langchain_binds_tools(default_server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
        from langchain_openai import ChatOpenAI
        from pydantic import SecretStr

        model = ChatOpenAI(
            model="any",
            base_url=f"{default_server.url}/v1",
            api_key=SecretStr("any"),
            temperature=0,
            max_retries=0,
            max_completion_tokens=100,
        )
        bound = model.bind_tools([GetWeather], tool_choice="GetWeather")
        asked = HumanMessage("What is the weather in Paris?")
        answer = bound.invoke([asked])
        (call,) = answer.tool_calls
        assert call["name"] == "GetWeather"
        GetWeather.model_validate(call["args"])
        total: AIMessageChunk | None = None
        for chunk in bound.stream([asked]):
            assert isinstance(chunk, AIMessageChunk)
            total = chunk if total is None else total + chunk
        assert total is not None
        assert [(c["name"], c["args"]) for c in total.tool_calls] == [(call["name"], call["args"])]
        result = ToolMessage("It rains.", tool_call_id=call["id"])
        assert model.bind_tools([GetWeather]).invoke([asked, answer, result], max_tokens=8).id
        structured = model.with_structured_output(GetWeather, method="function_calling")
        assert isinstance(structured.invoke([asked]), GetWeather)


# --------------------------------------------------------------------------------- reasoning


def serve_thinking(folder: Path, template: str) -> Any:
    """A random model whose template has marks for thinking, and knows tools."""
    make_tiny("llama", folder, max_position_embeddings=512)
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
    return serving(str(folder))


@pytest.fixture(scope="module")
def thinking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    begun = "<|im_start|>assistant\n{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    template = TEMPLATE.replace("<|im_start|>assistant\n", begun + "<think>\n")
    with serve_thinking(tmp_path_factory.mktemp("thinking"), template) as server:
        yield server


def test_what_a_model_thinks_is_told_apart(thinking_server: Server) -> None:
    fields = {"messages": QUESTION, "seed": 1, "max_tokens": 20, "ignore_eos": True}
    with httpx.Client(base_url=thinking_server.url, timeout=60) as http:
        answer = http.post("/v1/chat/completions", json=fields).json()["choices"][0]
        assert answer["message"]["content"] == ""
        assert answer["message"]["reasoning_content"]
        with http.stream("POST", "/v1/chat/completions", json={**fields, "stream": True}) as stream:
            deltas = [
                json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                for line in stream.iter_lines()
                if line.startswith("data: {")
            ]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        assert thought == answer["message"]["reasoning_content"]
        assert not any(delta.get("content") for delta in deltas)


def test_enforced_calls_end_the_thinking_first(thinking_server: Server) -> None:
    fields = {
        "messages": QUESTION,
        "tools": [tool("now"), tool("get", unit={"enum": ["a", "b"]})],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
    }
    with httpx.Client(base_url=thinking_server.url, timeout=60) as http:
        response = http.post("/v1/chat/completions", json=fields)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in ("now", "get")
        assert "reasoning_content" not in choice["message"]
        assert choice["message"]["content"] is None
        # What a grammar leaves no room for is not looked for.
        plain = {"messages": QUESTION, "regex": "ab{3}c", "seed": 1}
        message = http.post("/v1/chat/completions", json=plain).json()["choices"][0]["message"]
        assert message["content"] == "abbbc"


NOT_THINKING = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def choosing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As Qwen3 does it: thoughts that are empty already, where it is told not to think."""
    closed = "{% if enable_thinking is defined and enable_thinking is false %}@{% endif %}"
    begun = "<|im_start|>assistant\n"
    template = TEMPLATE.replace(begun, begun + closed.replace("@", NOT_THINKING))
    with serve_thinking(tmp_path_factory.mktemp("choosing"), template) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": None}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking_is_turned_off(
    choosing_server: Server, fields: dict[str, Any], thinks: bool
) -> None:
    body = {"messages": QUESTION, "max_tokens": 1}
    with httpx.Client(base_url=choosing_server.url, timeout=60) as http:

        def ask(path: str, fields: dict[str, Any]) -> Any:
            answer = http.post(path, json={**body, **fields})
            assert answer.status_code == 200, answer.text
            return answer.json()

        plain = ask("/tokenize", {})
        more = ask("/tokenize", {"text": NOT_THINKING, "messages": None})["count"]
        expected = plain["count"] + (0 if thinks else more)
        if "thinking" not in fields:
            tokens = ask("/tokenize", fields)
            assert "".join(tokens["pieces"]).endswith(NOT_THINKING) is not thinks
            assert tokens["count"] == expected
            usage = ask("/v1/chat/completions", fields)["usage"]
            assert usage["prompt_tokens"] == expected
        if "reasoning_effort" not in fields:
            assert ask("/v1/messages/count_tokens", fields)["input_tokens"] == expected
            usage = ask("/v1/messages", fields)["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_a_template_is_told_is_checked(choosing_server: Server, path: str) -> None:
    with httpx.Client(base_url=choosing_server.url, timeout=60) as http:

        def said(fields: dict[str, Any], code: str, param: str) -> str:
            return refused(http.post(path, json={"messages": QUESTION, **fields}), 400, code, param)

        param = "chat_template_kwargs"
        message = said({param: {"enable_thinkin": False}}, "invalid_value", param)
        assert "'enable_thinkin'" in message and "enable_thinking" in message
        assert "true or false" in said(
            {param: {"enable_thinking": "false"}}, "invalid_value", param
        )
        assert said({param: ["enable_thinking"]}, "invalid_value", param)
        assert "deep" in said({param: {"documents": _deep(70)}}, "invalid_value", param)
        param = "add_generation_prompt"
        assert said({param: False}, "unsupported_parameter", param)


def test_what_is_kept_is_written_out_in_one_way(choosing_server: Server) -> None:
    with httpx.Client(base_url=choosing_server.url, timeout=60) as http:
        session = http.post("/v1/sessions", json={}).json()["id"]
        for path, code in (
            ("/v1/responses", "unsupported_parameter"),
            (f"/v1/sessions/{session}/turns", "invalid_value"),
        ):
            fields = {"input": "Hi", "chat_template_kwargs": {"enable_thinking": False}}
            assert refused(http.post(path, json=fields), 400, code, "chat_template_kwargs")


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value
