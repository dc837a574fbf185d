"""The events of a response as a function of its log: in order, and with the log-probabilities of
what is said, whatever stands beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.responses_wire import Event, ResponseEvents
from server.sse import event_frame
from server.text.answer_text import Markup, read_whole
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.server.api.wires.responses import ResponseStream, whole_response

CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Bern 😀"}}\n</tool_call>'
PARTS = [CALL, CALL, "The river ", "bends.\n", "日本語", " 😀 ", "<tool", " ", "</tool_call>", "x"]
THOUGHT = "<think>\nWell, because </th of it\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text that each of its tokens completes."""
    detokenizer = Detokenizer(tokenizer.token_bytes)
    pieces = [detokenizer.feed(token_id).text for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    return pieces


def head(status: str, output: list[Event]) -> Event:
    usage = {"input_tokens": 1, "output_tokens": 1}
    return {"id": "resp_0", "status": status, "output": output, "error": None, "usage": usage}


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=7), thinks=st.booleans())
def test_log_probabilities_are_of_what_is_said(
    tokenizer: Tokenizer, parts: list[str], thinks: bool
) -> None:
    markup = Markup(tools=("f",), thinking="may")
    text = THOUGHT * thinks + "".join(parts)
    walk = ResponseEvents(head("in_progress", []), "0" * 32, "gen_0", markup)
    events = walk.start()
    spans = []
    at = 0
    for i, piece in enumerate(pieces_of(tokenizer, text)):
        events += walk.feed(piece, [{"token": i}])
        spans.append((at, at + len(piece)))
        at += len(piece)
    events += walk.end("completed")
    events.append(walk.last("completed", head("completed", walk.output)))

    checker = ResponseStream()
    for event in events:
        checker.feed(event_frame(event["type"], event))
    checker.close()
    (said,) = whole_response(checker.response).choices
    whole = read_whole(markup, text)
    assert (said.reasoning, said.calls) == (whole.reasoning, [tuple(c) for c in whole.calls])
    assert said.text == whole.content
    assert "logprobs" not in str([item for item in walk.output if item["type"] != "message"])

    told = [entry["token"] for entry in said.logprobs]
    assert told == sorted(set(told))
    marked = [m.span() for m in re.finditer(re.escape(CALL), text)]
    marked += [(0, len(THOUGHT))] * thinks
    for i, (start, end) in enumerate(spans):
        if start == end:  # half a character, which goes with the other half
            continue
        if any(first <= start and end <= last for first, last in marked):
            assert i not in told, (i, text[start:end])
        elif not any(first < end and start < last for first, last in marked):
            assert i in told or text[start:end].isspace(), (i, text[start:end])
