"""Tool calls and reasoning in an answer's text: what is found, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level_metadata, from_metadata

from server.text.answer_text import AnswerPart, AnswerReader, Call, Markup, WholeAnswer, read_whole
from server.text.detokenizer import shown_text
from server.text.reasoning import Thinking
from server.text.tool_calls import ToolCallDelta, call_id

TOOLS = Markup(tools=("f", "g"))
THINKING = Markup(tools=("f", "g"), thinking="may")


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


F = '{"name": "f", "arguments": {"a": {"b": [1, "}"]}}}'
G = '{"arguments": {"x":1}, "name": "g"}'
CALL_F = Call("f", '{"a": {"b": [1, "}"]}}')
CALL_G = Call("g", '{"x":1}')

FOUND = {
    call(F): ("", [CALL_F]),
    f"Well. {call(F)}\n{call(G)}\n": ("Well.", [CALL_F, CALL_G]),
    f"<tool_call>[{F}, {G}]</tool_call> Done.": (" Done.", [CALL_F, CALL_G]),
    f"<tool_call>{F}\n<tool_call>{G}</tool_c": ("", [CALL_F, CALL_G]),  # a mark is missing
    f"<tool_call>{F}<b>": ("<b>", [CALL_F]),
    f"<{call(F)}": ("<", [CALL_F]),
    '<tool_call>{"name": "other", "arguments": {}}</tool_call>': ("", [Call("other", "{}")]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [Call("f", "{}")]),
    r'<tool_call>{"name":"f","arguments":"{\"a\": 1}"}</tool_call>': ("", [Call("f", '{"a":1}')]),
    '{"name": "f", "parameters": {"é": "\\""}}': ("", [Call("f", '{"é": "\\""}')]),
    f"\n{F}; {G}": ("", [CALL_F, CALL_G]),
    f"{F} and": (" and", [CALL_F]),
    '<|python_tag|>{"name": "x", "parameters": {}}': ("", [Call("x", "{}")]),
    f"[{F},\n {G}]": ("", [CALL_F, CALL_G]),
    '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}': (
        "",
        [Call("f", '{"a":1}')],
    ),
    '{"id": "1", "type": "function", "name": "f", "arguments": {}}': ("", [Call("f", "{}")]),
    f"[TOOL_CALLS][{F}]": ("", [CALL_F]),
    '[TOOL_CALLS]f[ARGS]{"q": 1}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{}': (
        "",
        [Call("f", '{"q": 1}'), Call("g", "{}")],
    ),
}

TEXT = [
    "",
    "  \n",
    "Hello <b> [x] {y} <tool_",
    "[1, 2]",
    "[[",
    "{",
    "{}",
    '{"answer": {"name": "f", "arguments": {}}}',
    '{"name": "other", "arguments": {}}',  # no mark, and no tool of that name
    '{"name": 3, "arguments": {}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "argum',
    f"It is {F}",  # no mark, and not where the answer begins
    "<tool_call>none</tool_call>",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "f u", "arguments": "no"}</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": ',
    "<|python_tag|>print(1)",
    "[TOOL_CALLS] is a mark",
    "[TOOL_CALLS]f[ARGS]x{",
    "[" + "\n" * 200,
    "{" + " " * 200 + '"name": "f"}',
    '{"name": ' + "[" * 2000,
]


def read(markup: Markup, pieces: list[str]) -> WholeAnswer:
    """The answer from its pieces, checking on the way what each delta must be."""
    reader = AnswerReader(markup)
    parts: list[AnswerPart] = []
    num_fed = num_told = 0
    for piece in pieces:
        parts.append(reader.feed(piece))
        num_fed += len(piece)
        assert 0 <= reader.num_held <= num_fed
        assert num_fed - reader.num_held >= num_told, "what was shown is held again"
        num_told = num_fed - reader.num_held
    parts.append(reader.finish())
    assert reader.num_held == 0
    calls: list[tuple[str, str]] = []
    for delta in (delta for part in parts for delta in part.calls):
        if delta.name is None:
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
        else:
            assert delta.index == len(calls)
            calls.append((delta.name, delta.arguments))
    assert reader.num_calls >= len(calls)
    content = "".join(part.content for part in parts)
    reasoning = "".join(part.reasoning for part in parts)
    return WholeAnswer(content, reasoning, [Call(*each) for each in calls])


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@pytest.mark.parametrize("text", FOUND)
def test_calls_are_found(text: str) -> None:
    content, calls = FOUND[text]
    assert read_whole(TOOLS, text) == WholeAnswer(content, "", calls)
    assert read(TOOLS, list(text)) == WholeAnswer(content, "", calls)
    for each in calls:
        assert isinstance(json.loads(each.arguments), dict)


@pytest.mark.parametrize("text", TEXT)
def test_what_is_no_call_is_text(text: str) -> None:
    assert read_whole(TOOLS, text) == WholeAnswer(text, "", [])
    assert read(TOOLS, list(text)) == WholeAnswer(text, "", [])


def test_arguments_come_as_they_are_written() -> None:
    reader = AnswerReader(TOOLS)
    assert not reader.feed('<tool_call>{"name": "f", "arguments"')
    assert [reader.feed(piece) for piece in (": {", '"a": ', '"x', 'y"}', "}\n</tool_call>")] == [
        AnswerPart(rest=[ToolCallDelta(0, "f", "{")]),
        AnswerPart(rest=[ToolCallDelta(0, None, '"a": ')]),
        AnswerPart(rest=[ToolCallDelta(0, None, '"x')]),
        AnswerPart(rest=[ToolCallDelta(0, None, 'y"}')]),
        AnswerPart(),
    ]


def test_text_and_calls_keep_their_order() -> None:
    part = AnswerReader(TOOLS).feed(f"One {call(F)} two {call(G)} three")
    assert part.rest == [
        "One",
        ToolCallDelta(0, "f", CALL_F.arguments),
        " two",
        ToolCallDelta(1, "g", CALL_G.arguments),
        " three",
    ]


def test_plain_text_is_not_held_back() -> None:
    reader = AnswerReader(TOOLS)
    assert reader.feed("Rivers").content == "Rivers"
    assert reader.feed(" bend").content == " bend"
    assert reader.feed(' {"name": "f"').content == ' {"name": "f"'


def test_json_that_is_no_call_is_shown_from_its_first_key_on() -> None:
    assert AnswerReader(TOOLS).feed('{"ans').content == '{"ans'
    assert AnswerReader(TOOLS).feed('{"name": "other", "arguments": {').content


def test_without_parallel_calls_the_first_is_all() -> None:
    one = Markup(tools=("f", "g"), parallel=False)
    for text in (f"{call(F)}\n{call(G)}", f"[{F}, {G}]", f"{F}; {G}"):
        assert read(one, list(text)) == WholeAnswer("", "", [CALL_F])


def test_without_tools_all_is_text() -> None:
    assert read_whole(Markup(), call(F)) == WholeAnswer(call(F), "", [])


THOUGHT = {
    "<think>\nHm.\n\nYes. \n</think>\n\nYes": ("Yes", "Hm.\n\nYes."),
    "\n<think>a < b</think>": ("", "a < b"),
    "<think></think>ok": ("ok", ""),
    "<think>\n\n</think>\n\nok": ("ok", ""),
    "<think>on and </thi": ("", "on and </thi"),
    "<think>on and \n": ("", "on and"),
    "No <think>tags</think>": ("No <think>tags</think>", ""),
    "<thin": ("<thin", ""),
    "\n <b": ("\n <b", ""),
}


@pytest.mark.parametrize("text", THOUGHT)
def test_reasoning_is_told_apart(text: str) -> None:
    content, reasoning = THOUGHT[text]
    assert read_whole(THINKING, text) == WholeAnswer(content, reasoning, [])
    assert read(THINKING, list(text)) == WholeAnswer(content, reasoning, [])
    if text.startswith("<think>"):  # the prompt may have begun it already
        begun = Markup(thinking="does")
        assert read_whole(begun, text.removeprefix("<think>")) == WholeAnswer(
            content, reasoning, []
        )
    assert read_whole(Markup(), text).content == text


def test_calls_in_the_reasoning_are_thoughts() -> None:
    text = f"<think>{call(G)}</think>\n{call(F)}"
    assert read_whole(THINKING, text) == WholeAnswer("", call(G), [CALL_F])


MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>"]
PIECES = [F, G, "</think>", '"name"', '"arguments"', '"f"', "tool_call>", "</", "Well. "]
SOUP = st.lists(st.sampled_from([*MARKS, *PIECES, *'<{}[]"\\,;:\n fé']), max_size=30).map("".join)


@settings(max_examples=250, deadline=None)
@given(st.one_of(SOUP, st.sampled_from([*FOUND, *TEXT, *THOUGHT])), st.data())
def test_any_cut_gives_the_same(text: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 7), max_size=30))
    modes: list[Thinking] = ["no", "may", "does"]
    thinking = data.draw(st.sampled_from(modes))
    markup = Markup(tools=("f", "g"), parallel=data.draw(st.booleans()), thinking=thinking)
    assert read(markup, cut(text, sizes)) == read_whole(markup, text)


@settings(max_examples=300, deadline=None)
@given(SOUP)
@example("{ }")
def test_nothing_is_lost(text: str) -> None:
    """Where no call is found, the text is what it was."""
    answer = read_whole(TOOLS, text)
    if not answer.calls:
        assert answer.content == text


NAMES = st.sampled_from(["f", "g"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(st.text(max_size=4), JSON, max_size=3)), min_size=1, max_size=3
)
NOTATIONS = {
    "hermes": ("", "arguments", "<tool_call>\n", "\n</tool_call>", "\n", ""),
    "one list": ("[", "arguments", "", "", ", ", "]"),
    "llama": ("", "parameters", "", "", "; ", ""),
    "mistral": ("[TOOL_CALLS][", "arguments", "", "", ", ", "]"),
}


@settings(max_examples=100, deadline=None)
@given(CALLS, st.sampled_from(sorted(NOTATIONS)), st.booleans())
def test_any_call_in_any_notation_is_read_back(
    calls: list[tuple[str, dict[str, object]]], notation: str, name_first: bool
) -> None:
    begin, key, before, after, between, end = NOTATIONS[notation]
    spelled = []
    for name, arguments in calls:
        items = [("name", name), (key, arguments)]
        spelled.append(before + json.dumps(dict(items if name_first else items[::-1])) + after)
    answer = read_whole(TOOLS, begin + between.join(spelled) + end)
    assert answer.content == ""
    assert [(c.name, json.loads(c.arguments)) for c in answer.calls] == calls


def test_marks_that_are_control_tokens_are_text() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][4] = "<tool_call>"
    metadata["tokenizer.ggml.token_type"][4] = 3
    tokenizer = from_metadata(metadata)
    assert tokenizer.special_tokens["<tool_call>"] == 4
    assert shown_text(tokenizer.token_bytes, tokenizer.encode(f"<tool_call>{F}")).startswith(
        '<tool_call>{"name'
    )
    assert tokenizer.encode("<tool_call>", special=False) != [4]


def test_ids_are_stable_and_their_own() -> None:
    ids = {call_id(f"gen_{generation}", index) for generation in "ab" for index in range(12)}
    assert len(ids) == 24
    assert call_id("gen_a", 0) in ids
    assert all(id.startswith("call_") and len(id) == 29 for id in ids)
