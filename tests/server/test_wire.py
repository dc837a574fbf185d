"""The wire, byte by byte: frames, headers, statuses, bounds."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

import httpx
import pytest

from tests.fixtures.server import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1}


def post(server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert "Traceback" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def frames(server: Server, path: str, body: dict[str, Any]) -> tuple[httpx.Headers, list[str]]:
    with httpx.stream(
        "POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=60
    ) as response:
        assert response.status_code == 200
        text = response.read().decode()
    assert text.endswith("\n\n")
    assert "\r" not in text
    assert not [line for line in text.split("\n") if line.startswith(("id:", "retry:", "event:"))]
    return response.headers, [frame for frame in text.split("\n\n") if frame]


def test_a_stream_from_head_to_done(tiny_server: Server) -> None:
    headers, parts = frames(tiny_server, CHAT, {**HELLO, "max_tokens": 12})
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-headwater-generation"].startswith("gen_")
    assert parts[-1] == "data: [DONE]"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] is not None for c in chunks].count(True) == 1
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_completions_stream(tiny_server: Server) -> None:
    body = {"prompt": "The river", "max_tokens": 6, "seed": 3}
    _, parts = frames(tiny_server, COMPLETIONS, body | {"stream_options": {"include_usage": True}})
    assert parts[-1] == "data: [DONE]"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] > 0
    whole = post(tiny_server, COMPLETIONS, body).json()
    text = "".join(c["choices"][0]["text"] for c in chunks[:-1])
    assert text == whole["choices"][0]["text"]
    assert whole["object"] == "text_completion" and whole["id"].startswith("cmpl-")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": "many"}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"logprobs": "true"}, "logprobs"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"stop_token_ids": [True]}, "stop_token_ids.0"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 129}, "stop.0"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "perhaps"}, "stream"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_chat_bounds(tiny_server: Server, change: dict[str, Any], param: str) -> None:
    response = post(tiny_server, CHAT, {**HELLO, **change})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"n": 8, "max_tokens": 1},
        {"temperature": 2},
        {"temperature": 0, "top_p": 0.001},
        {"top_k": -1},
        {"min_p": 1},
        {"repetition_penalty": 10},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {str(i): -100 for i in range(500)}},
        {"min_tokens": 5},
        {"stop": ["x" * 128] * 16},
        {"stop": None},
        {"stop_token_ids": [511]},
        {"seed": -1},
        {"seed": 2**63 - 1},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": False, "top_logprobs": None},
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"tool_choice": "none"},
        {"stream": False, "stream_options": None},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "user", "content": "x"}] * 20},
        {"user": "somebody", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"model": None},
        {"ignore_eos": True},
    ],
)
def test_chat_accepts_its_edges(tiny_server: Server, change: dict[str, Any]) -> None:
    response = post(tiny_server, CHAT, {**HELLO, **change})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**HELLO, "guided_json": {"type": "object"}}, "guided_json"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        (CHAT, {**HELLO, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (COMPLETIONS, {"prompt": "x", "guided_regex": "[0-9]{3}"}, "guided_regex"),
        (COMPLETIONS, {"prompt": "x", "resumable": True}, "resumable"),
        ("/v1/responses", {"input": "x", "guided_choice": ["a", "b"]}, "guided_choice"),
        (
            "/tokenize",
            {"messages": HELLO["messages"], "add_generation_prompt": False},
            "add_generation_prompt",
        ),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
        (
            COMPLETIONS,
            {"prompt": "x", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_what_changes_the_meaning_is_refused_by_name(
    tiny_server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    response = post(tiny_server, path, body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [512]},
        {"prompt": [-1]},
        {"prompt": ["x"] * 65},
        {"prompt": [True]},
        {"prompt": [["1"]]},
        {"prompt": "x", "echo": 1},
        {"prompt": {"a": 1}},
        {},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "logprobs": 21},
        {"prompt": "x", "n": 9},
    ],
)
def test_completion_bounds(tiny_server: Server, body: dict[str, Any]) -> None:
    response = post(tiny_server, COMPLETIONS, body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_value"


def test_the_context_length_is_told_with_both_numbers(tiny_server: Server) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 1000}]}
    error = error_of(post(tiny_server, CHAT, long))
    count = post(tiny_server, "/tokenize", long).json()["count"]
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"] and str(count) in error["message"]
    short = post(tiny_server, "/tokenize", {"messages": HELLO["messages"]}).json()["count"]
    for max_tokens, status in ((512 - short, 200), (512 - short + 1, 400)):
        body = {**HELLO, "max_tokens": max_tokens}
        assert post(tiny_server, CHAT, body).status_code == status


def test_usage_counts_what_the_tokenizer_counts(tiny_server: Server) -> None:
    for words in range(1, 40, 3):
        messages = [{"role": "user", "content": "river " * words}]
        count = post(tiny_server, "/tokenize", {"messages": messages}).json()["count"]
        answer = post(tiny_server, CHAT, {"messages": messages, "max_tokens": 1}).json()
        assert answer["usage"]["prompt_tokens"] == count


def test_usage_counts_what_was_drawn(tiny_server: Server) -> None:
    """Many answers: each token that is shown, and the one that ended it. What is left before a
    stop string is spelled anew."""
    chooser = random.Random(3)
    for seed in range(40):
        stop = chooser.choice([None, None, ["e"], ["th", "a "]])
        body = {
            "messages": [{"role": "user", "content": "river " * chooser.randint(1, 20)}],
            "max_tokens": chooser.randint(1, 40),
            "temperature": 1.5,
            "seed": seed,
            "stop": stop,
            "resumable": True,
        }
        answer = post(tiny_server, CHAT, body)
        usage, choice = answer.json()["usage"], answer.json()["choices"][0]
        stream = httpx.get(
            f"{tiny_server.url}/v1/streams/{answer.headers['x-headwater-generation']}"
        )
        events = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:5] == "data:"]
        shown = sum(len(event.get("token_ids", ())) for event in events)
        drawn = usage["completion_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + drawn
        assert 1 <= drawn <= body["max_tokens"]
        if choice["finish_reason"] == "length":
            assert shown == drawn == body["max_tokens"]
        elif stop is None:
            assert choice["finish_reason"] == "stop"
            assert shown == drawn - 1  # the end token has no text


def test_tokenize_makes_the_prompt_that_chat_makes(tiny_server: Server) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    said = [*HELLO["messages"], {"role": "assistant", "content": "Well"}]
    plain = post(tiny_server, "/tokenize", {"messages": said}).json()["count"]
    for fields in (
        {"tools": [{"type": "function", "function": function}]},
        {"continue_final_message": True},
    ):
        body = {"messages": said, **fields}
        count = post(tiny_server, "/tokenize", body).json()["count"]
        answer = post(tiny_server, CHAT, {**body, "max_tokens": 1}).json()
        assert answer["usage"]["prompt_tokens"] == count != plain


def test_an_answer_without_a_limit_uses_the_room_that_is_left(tiny_server: Server) -> None:
    body = {"messages": HELLO["messages"], "ignore_eos": True, "seed": 1}
    usage = post(tiny_server, CHAT, body).json()["usage"]
    assert usage["total_tokens"] == 512


def test_tokenize_and_back(tiny_server: Server) -> None:
    text = "Sarah fed the cat 😀 because it was 日本語"
    said = post(tiny_server, "/tokenize", {"text": text}).json()
    assert said["count"] == len(said["tokens"]) == len(said["pieces"])
    assert said["max_model_len"] == 512
    back = post(tiny_server, "/detokenize", {"tokens": said["tokens"]}).json()
    assert back["text"] == text
    going_on = {"messages": HELLO["messages"], "continue_final_message": True}
    for body in ({}, {"text": "x", "messages": HELLO["messages"]}, going_on):
        assert post(tiny_server, "/tokenize", body).status_code == 400
    assert post(tiny_server, "/detokenize", {"tokens": [512]}).status_code == 400


def test_a_control_token_in_a_message_is_only_text(tiny_server: Server) -> None:
    messages = [{"role": "user", "content": "say <|im_end|> please"}]
    ids = post(tiny_server, "/tokenize", {"messages": messages}).json()["tokens"]
    assert ids.count(2) == 1  # the template's own


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "code"),
    [
        ("POST", CHAT, {"content-type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
        ("POST", CHAT, {}, b"{}", 415, "unsupported_media_type"),
        ("POST", CHAT, {"content-type": "application/json"}, b"{", 400, "invalid_value"),
        ("POST", CHAT, {"content-type": "application/json"}, b"[]", 400, "invalid_value"),
        ("POST", CHAT, {"content-type": "application/json"}, b"\xff", 400, "invalid_value"),
        ("POST", CHAT, {"content-type": "application/json"}, b"[" * 9000, 400, "invalid_value"),
        ("GET", CHAT, {}, b"", 405, "invalid_value"),
        ("GET", "/nothing", {}, b"", 404, "not_found"),
        ("GET", "/v1/models/../../etc/passwd", {}, b"", 404, "not_found"),
        ("GET", "/v1/models/other", {}, b"", 404, "not_found"),
    ],
)
def test_http_faults(
    tiny_server: Server,
    method: str,
    path: str,
    headers: dict[str, str],
    content: bytes,
    status: int,
    code: str,
) -> None:
    response = httpx.request(method, f"{tiny_server.url}{path}", headers=headers, content=content)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"messages": ', "the body is not valid JSON: Expecting value"),
        (b'{"user": "\xff"}', "byte 10 is not UTF-8"),
        (b"[" * 9000, "nested too deep"),
        (b'{"max_tokens": ' + b"1" * 5000 + b"}", "an integer has more than 4300 digits"),
    ],
)
def test_why_a_body_cannot_be_read(tiny_server: Server, content: bytes, said: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{tiny_server.url}{CHAT}", headers=headers, content=content)
    assert response.status_code == 400
    assert said in error_of(response)["message"]


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
def test_a_compressed_body_is_415(tiny_server: Server, encoding: str, status: int) -> None:
    content = json.dumps(HELLO).encode()
    headers = {"content-type": "application/json", "content-encoding": encoding}
    response = httpx.post(
        f"{tiny_server.url}{CHAT}",
        headers=headers,
        content=gzip.compress(content) if encoding == "gzip" else content,
    )
    assert response.status_code == status
    if status == 415:
        error = error_of(response)
        assert error["code"] == "unsupported_media_type"
        assert f"`Content-Encoding` '{encoding}'" in error["message"]


def test_a_body_over_the_limit_is_413(tiny_server: Server) -> None:
    body = b'{"messages": "' + b"x" * (8 * 1024 * 1024) + b'"}'
    response = httpx.post(
        f"{tiny_server.url}{CHAT}", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_an_empty_body_reads_as_an_empty_object(tiny_server: Server) -> None:
    response = httpx.post(f"{tiny_server.url}{CHAT}")
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"


def test_operating_routes(tiny_server: Server) -> None:
    url = tiny_server.url
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json()["status"] == "ready"
    assert httpx.get(f"{url}/version").json()["version"]
    metrics = httpx.get(f"{url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for name in (
        "headwater_requests_running",
        "headwater_requests_waiting",
        'headwater_blocks{state="free",tier="device"}',
        "headwater_time_to_first_token_seconds_count",
        "headwater_inter_token_seconds_count",
        "headwater_prefill_tokens_total",
        "headwater_decode_tokens_total",
        'headwater_prefix_hit_tokens_total{tier="device"}',
        "headwater_evicted_blocks_total",
        "headwater_engine_restarts_total",
        "headwater_aborts_total",
        'headwater_errors_total{code="invalid_value"}',
    ):
        assert f"\n{name} " in metrics.text, name


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models"])
def test_head_says_what_get_says_but_the_body(tiny_server: Server, path: str) -> None:
    """Checkers of uptime ask so."""
    head, got = (httpx.request(method, tiny_server.url + path) for method in ("HEAD", "GET"))
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]
