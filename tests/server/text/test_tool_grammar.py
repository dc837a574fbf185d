"""Enforced calls: all that their grammar lets through is read back as valid calls."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from model.engine.request import Grammar
from server.text.answer_text import Markup, WholeAnswer, read_whole
from server.text.tool_grammar import calls_grammar
from server.text.tool_prompt import Notation

END = 2
FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "note": {"type": "string", "maxLength": 5},
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "boolean"}},
                    "required": ["x"],
                },
            },
            "required": ["city"],
            "$defs": {"city": {"enum": ['Rome "}', "Zürich", "</tool_call>"]}},
        },
    },
    {"name": "now"},
    {"name": "empty", "parameters": {}},
    {
        "name": "either",
        "parameters": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {name: {"const": 1}},
                    "required": [name],
                    "additionalProperties": False,
                }
                for name in ("a", "b")
            ]
        },
    },
]
NAMES = tuple(function["name"] for function in FUNCTIONS)


@pytest.fixture(scope="module")
def vocabulary(default_folder: Path) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer((default_folder / "tokenizer.json").read_text(), eos_token=END)


def said(vocabulary: llguidance.LLTokenizer, grammar: Grammar, seed: int) -> str:
    """What a model that knows nothing says within the grammar; it ends as soon as it may."""
    rng = random.Random(seed)
    assert grammar.kind == "lark"
    matcher = llguidance.LLMatcher(
        vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar.text), log_level=0
    )
    assert not matcher.get_error()
    token_ids: list[int] = []
    while not matcher.is_stopped():
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if END in allowed and rng.random() < 0.5:
            break
        token_id = int(rng.choice([id_ for id_ in allowed if id_ != END]))
        assert matcher.consume_token(token_id)
        token_ids.append(token_id)
        assert len(token_ids) < 1000
    return vocabulary.decode_str(token_ids)


def check(answer: WholeAnswer, max_calls: int) -> None:
    assert answer.content == ""
    assert 1 <= len(answer.calls) <= max_calls
    for call in answer.calls:
        (function,) = [each for each in FUNCTIONS if each["name"] == call.name]
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        Draft202012Validator(function.get("parameters", {"maxProperties": 0})).validate(arguments)


@pytest.mark.parametrize("notation", ["hermes", "llama", "mistral"])
def test_all_that_fits_is_valid(vocabulary: llguidance.LLTokenizer, notation: Notation) -> None:
    grammar = calls_grammar(FUNCTIONS, notation, max_calls=3)
    counts = set()
    for seed in range(25):
        answer = read_whole(Markup(NAMES), said(vocabulary, grammar, seed))
        check(answer, 3)
        counts.add(len(answer.calls))
    assert counts == {1, 2, 3}


def test_one_call_after_the_end_of_thinking(vocabulary: llguidance.LLTokenizer) -> None:
    before = "\n</think>\n\n"
    grammar = calls_grammar(FUNCTIONS[:1], "hermes", max_calls=1, before=before)
    for seed in range(5):
        text = said(vocabulary, grammar, seed)
        assert text.startswith(before)
        check(read_whole(Markup(NAMES, thinking="does"), text), 1)


def test_calls_or_an_answer_of_a_schema(vocabulary: llguidance.LLTokenizer) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer_grammar = Grammar("json_schema", json.dumps({**schema, "additionalProperties": False}))
    grammar = calls_grammar(FUNCTIONS[1:3], "hermes", max_calls=1, otherwise=answer_grammar)
    kinds = set()
    for seed in range(12):
        answer = read_whole(Markup(NAMES), said(vocabulary, grammar, seed))
        kinds.add(bool(answer.calls))
        if answer.calls:
            check(answer, 1)
        else:
            Draft202012Validator(schema).validate(json.loads(answer.content))
    assert kinds == {True, False}
    anything = calls_grammar(
        FUNCTIONS[1:2], "hermes", max_calls=1, otherwise=Grammar("json_object", "")
    )
    assert '"type":"object"' in anything.text
    matcher = llguidance.LLMatcher(
        vocabulary, llguidance.LLMatcher.grammar_from_lark(anything.text), log_level=0
    )
    for text in ('{"n":[1]}', '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        assert matcher.validate_tokens(vocabulary.tokenize_str(text)) == len(
            vocabulary.tokenize_str(text)
        )


def test_objects_are_closed_only_where_that_is_safe() -> None:
    def arguments(parameters: dict[str, Any]) -> Any:
        text = calls_grammar([{"name": "f", "parameters": parameters}], "hermes").text
        schema = json.loads(text.rsplit("%json ", 1)[1])
        assert schema.pop("x-guidance") == {"whitespace_flexible": False}
        return schema

    inner = {"type": "object", "properties": {}}
    closed = {**inner, "additionalProperties": False}
    assert arguments({"properties": {"a": inner, "b": {"type": "array", "items": inner}}}) == {
        "type": "object",
        "properties": {"a": closed, "b": {"type": "array", "items": closed}},
        "additionalProperties": False,
    }
    for open_one in (
        {**inner, "additionalProperties": True},
        {**inner, "allOf": [inner]},
        {**inner, "required": ["not among the properties"]},
    ):
        assert arguments(open_one) == open_one
