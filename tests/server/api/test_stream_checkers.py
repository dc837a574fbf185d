"""The checkers of streams refuse what is broken: real streams with an event less, twice, or later,
and such that end too early."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fixtures.server import Server
from tests.server.api.stream_ask import Ask, compare
from tests.server.api.stream_cases import Case, Json, Wire

CALL: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 6, "maxLength": 9}},
            "required": ["city"],
        },
    },
}
FLAT: Json = {"type": "function", **CALL["function"]}
HEAD: Json = {"stream": True, "seed": 11, "temperature": 1}
SPEAK: Json = {**HEAD, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 12}
USAGE: Json = {"stream_options": {"include_usage": True}}
ANSWER: Json = {**HEAD, "input": "Why?", "ignore_eos": True, "max_output_tokens": 12}
RECORDED: list[tuple[Wire, Json]] = [
    ("chat", SPEAK | USAGE | {"logprobs": True, "ignore_eos": True}),
    ("chat", SPEAK | {"tools": [CALL], "tool_choice": "required", "max_tokens": 200}),
    ("resumable", SPEAK | {"resumable": True, "ignore_eos": True}),
    ("completions", HEAD | USAGE | {"prompt": ["Why?"], "logprobs": 1, "ignore_eos": True}),
    ("responses", ANSWER | {"include": ["message.output_text.logprobs"]}),
    (
        "background",
        ANSWER
        | {
            "tools": [FLAT],
            "tool_choice": "required",
            "background": True,
            "max_output_tokens": 200,
        },
    ),
    ("messages", SPEAK | {"ignore_eos": True}),
    (
        "messages",
        SPEAK
        | {
            "tools": [{"name": "f", "input_schema": CALL["function"]["parameters"]}],
            "tool_choice": {"type": "any"},
            "max_tokens": 200,
        },
    ),
    ("turns", HEAD | {"input": "Why?", "max_tokens": 12, "ignore_eos": True}),
]


@pytest.fixture(scope="module")
def client(wide_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=wide_server.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(("wire", "body"), RECORDED)
def test_checkers_refuse_broken_streams(client: httpx.Client, wire: Wire, body: Json) -> None:
    case = Case(0, wire, body)
    ask = Ask(client, case)
    whole = ask.whole()
    with ask.stream() as pieces:
        text = re.sub(r"(?m)^: .*\n|^event: progress\ndata: .*\n\n", "", b"".join(pieces).decode())
    frames = [frame + "\n\n" for frame in text.split("\n\n")[:-1]]
    assert len(frames) > 6

    def take(frames: list[str], end: str = "") -> None:
        checker = case.checker()
        checker.feed(("".join(frames) + end).encode())
        checker.close()
        compare(case, checker, whole)

    def accepted(frames: list[str], end: str = "") -> bool:
        try:
            take(frames, end)
        except AssertionError:
            return False
        return True

    take(frames)
    for i, frame in enumerate(frames):
        before, after = frames[:i], frames[i + 1 :]
        assert not accepted([*before, *after]), f"without {frame!r}"
        assert not accepted([*before, frame, frame, *after]), f"twice {frame!r}"
        assert not accepted(before, frame[:-1]), f"cut in {frame!r}"
        assert not accepted(before), f"ended before {frame!r}"
        if after and not commute(frame, after[0]):
            assert not accepted([*before, after[0], frame, *after[1:]]), f"later {frame!r}"


def commute(first: str, second: str) -> bool:
    """Whether two deltas say the same in either order."""
    said = re.compile(r'"(?:text|partial_json|arguments|content)":"((?:[^"\\]|\\.)*)"')
    texts: list[Any] = [said.search(frame) for frame in (first, second)]
    if None in texts or said.sub("", first) != said.sub("", second):
        return False
    one, other = (match[1] for match in texts)
    return bool(one + other == other + one)
