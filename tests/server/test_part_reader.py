"""Logs read as parts: wherever a reader begins, it gets what it has not got, and once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.messages import TokenLogprob, TokenOutput
from model.engine.request import SamplingParams
from server.generation import Generation
from server.owners import Owner
from server.part_reader import PartReader
from server.text.answer_text import Markup, read_whole
from server.text.tokenizer import Tokenizer
from tests.fixtures.tiny_tokenizer import write_tokenizer

MARKUP = Markup(tools=("f",), thinking="may")
CALL = '<tool_call>\n{"name": "f", "arguments": {"é": "😀"}}\n</tool_call>'
TEXTS = [
    f"<think>Well </th</think>\nSo: {CALL} {CALL} and <tool",
    "<tool_call>\n日本 no",
    "plain text\n",
    '{"name": "f", "arguments": {}}',
    "<think>on and on \n",
]


class Got(NamedTuple):
    """All that some reads gave, put together."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[int, str | None, str], ...] = ()
    logprobs: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def ended(tokenizer: Tokenizer, text: str) -> Generation:
    """A generation that said the text; the log-probability of its token i is that of id i."""
    generation = Generation(
        id="gen_0",
        owner=Owner("ann", b""),
        prompt_token_ids=[5],
        params=SamplingParams(max_tokens=1000, top_logprobs=0),
        stop=(),
        tokenizer=tokenizer,
        on_end=lambda generation, event: generation.publish(event),
        markup=MARKUP,
    )
    token_ids = tokenizer.encode(text)
    logprobs = [TokenLogprob(i, -0.5) for i in range(len(token_ids))]
    generation.feed(
        TokenOutput("gen_0", token_ids=token_ids, logprobs=logprobs, finish_reason="length")
    )
    assert generation.text == text
    return generation


def read(reader: PartReader, ends: list[int], *, finish: bool) -> Got:
    got = Got()
    steps = [lambda end=end: reader.read(end) for end in ends]
    for step in [*steps, *([reader.finish] if finish else [])]:
        part, logprobs = step()
        got = Got(
            got.content + part.content,
            got.reasoning + part.reasoning,
            (*got.calls, *((c.index, c.name, c.arguments) for c in part.calls)),
            (*got.logprobs, *(entry.token_id for entry in logprobs)),
        )
    return got


def joined(*parts: Got) -> Got:
    """Several gots one after the other, with the pieces of each call as one."""
    calls: list[tuple[int, str | None, str]] = []
    for index, name, arguments in (call for part in parts for call in part.calls):
        if name is None and calls:
            calls[-1] = (index, calls[-1][1], calls[-1][2] + arguments)
        else:
            calls.append((index, name, arguments))
    return Got(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(calls),
        sum((part.logprobs for part in parts), ()),
    )


@settings(max_examples=150, deadline=None)
@given(text=st.sampled_from(TEXTS), data=st.data())
def test_a_reader_that_comes_back_gets_the_rest(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    generation = ended(tokenizer, text)
    num_tokens = len(generation.token_ids)
    whole = joined(read(PartReader(generation), [num_tokens], finish=True))
    answer = read_whole(MARKUP, text)
    assert whole.content == answer.content
    assert whole.reasoning == answer.reasoning
    assert whole.calls == tuple((i, c.name, c.arguments) for i, c in enumerate(answer.calls))
    assert whole.logprobs == tuple(range(num_tokens))
    places = st.lists(st.integers(0, num_tokens), max_size=6).map(sorted)
    place = data.draw(st.integers(0, num_tokens))
    before = read(PartReader(generation), [p for p in data.draw(places) if p < place] + [place],
                  finish=False)  # fmt: skip
    rest = [p for p in data.draw(places) if p > place] + [num_tokens]
    after = read(PartReader(generation, place), rest, finish=True)
    assert joined(before, after) == whole


def test_after_the_end_nothing_is_left(tokenizer: Tokenizer) -> None:
    generation = ended(tokenizer, TEXTS[0])
    end = len(generation.token_ids)
    assert read(PartReader(generation, end), [end], finish=True).content == " <tool"
    assert read(PartReader(generation, end + 1), [end], finish=True) == Got()


def test_logprobs_wait_for_the_text_of_their_tokens(tokenizer: Tokenizer) -> None:
    generation = ended(tokenizer, "a <tool_call> b")
    reader = PartReader(generation)
    told: list[int] = []
    shown = ""
    for end in range(1, len(generation.token_ids) + 1):
        part, logprobs = reader.read(end)
        shown += part.content
        told += [entry.token_id for entry in logprobs]
        lengths = [len("".join(generation.pieces[:i])) for i in range(end + 1)]
        assert len(told) == max(i for i in range(end + 1) if lengths[i] <= len(shown))
