"""Transcripts: what goes out comes back in, and nothing that does not hang together does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from model.engine.request import Grammar
from server.errors import InvalidRequest
from server.responses import validation_error
from server.store.records import SessionRecord, TurnRecord
from server.text.appended_text import message_of
from server.text.tokenizer import Tokenizer
from server.transcript import (
    MAX_GRAMMARS,
    MAX_TURNS,
    Transcript,
    exported,
    grammars,
    imported,
    markdown,
)
from tests.fixtures.tiny_tokenizer import write_tokenizer

MINE = "this tokenizer and template"
VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def a_session(**fields: Any) -> SessionRecord:
    given: dict[str, Any] = {
        "id": "sess_0",
        "owner": "ann",
        "title": "Rivers",
        "instructions": "Be short.",
        "metadata": {"topic": "water", "depth": 3, "deep": True, "none": None, "width": 0.5},
        "defaults": {"temperature": 0.5, "stop": ["x"], "logit_bias": {"5": 1.0}},
        "overflow": "drop_oldest",
        "head": "turn_c",
        "created_at": 1000.5,
        "updated_at": 1001.5,
        **fields,
    }
    return SessionRecord(**given)


def the_turns(tokenizer: Tokenizer) -> list[TurnRecord]:
    """A question, two answers to it, and an answer that still runs."""

    def turn(id: str, parent: str | None, role: str, text: str, **fields: Any) -> TurnRecord:
        ids = tokenizer.encode(text, special=False)
        if role == "user":
            ids = [*tokenizer.encode("<|im_start|>user\n"), *ids, *tokenizer.encode("<|im_end|>\n")]
        return TurnRecord(
            id=id,
            session="sess_0",
            parent=parent,
            role=role,
            content=[{"type": "text", "text": text}],
            token_ids=ids,
            tokenizer=MINE,
            created_at=1000.75,
            **fields,
        )

    params = {"temperature": 0.5, "seed": 7, "max_tokens": 9, "logit_bias": {"5": 1.0}}
    return [
        turn("turn_a", None, "user", "Why do rivers bend?"),
        turn("turn_b", "turn_a", "assistant", "They do.", finish_reason="stop"),
        turn(
            "turn_c",
            "turn_a",
            "assistant",
            "Water, naïve 😀",
            prompt_token_ids=tokenizer.encode("<|im_start|>assistant\n"),
            finish_reason="length",
            notes={"params": params, "stop": ["x"], "prompt_tokens": 9, "cached_tokens": {"a": 1}},
        ),
        turn("turn_d", "turn_b", "user", "And?", replaces_history=True, notes={"dropped": 2}),
        turn("turn_e", "turn_d", "assistant", "", status="running"),
    ]


@pytest.fixture
def document(tokenizer: Tokenizer) -> dict[str, Any]:
    """An export, as it comes over the wire."""
    whole = exported(a_session(), the_turns(tokenizer))
    read: dict[str, Any] = json.loads(json.dumps(whole))
    return read


def bring_in(
    document: dict[str, Any], tokenizer: Tokenizer, fingerprint: str = MINE
) -> tuple[SessionRecord, list[TurnRecord]]:
    transcript = Transcript.model_validate(document)
    return imported(transcript, "ben", tokenizer, fingerprint, VOCAB_SIZE)


def test_out_and_in_again(document: dict[str, Any], tokenizer: Tokenizer) -> None:
    record, turns = bring_in(document, tokenizer)
    old = a_session()
    assert record.id != old.id and record.id.startswith("sess_")
    assert record.owner == "ben"
    for name in ("title", "instructions", "metadata", "overflow"):
        assert getattr(record, name) == getattr(old, name)
    assert record.defaults == {"temperature": 0.5, "stop": ["x"], "logit_bias": {5: 1.0}}
    originals = the_turns(tokenizer)
    new_ids = {old.id: new.id for old, new in zip(originals, turns, strict=True)}
    assert record.head == new_ids["turn_c"]
    assert len({*new_ids.values()} | {*new_ids}) == 2 * len(turns)
    for original, turn in zip(originals, turns, strict=True):
        assert turn.session == record.id
        assert turn.parent == (None if original.parent is None else new_ids[original.parent])
        assert turn.generation is None
        for name in ("role", "content", "token_ids", "prompt_token_ids", "replaces_history"):
            assert getattr(turn, name) == getattr(original, name)
    assert [turn.status for turn in turns] == ["complete"] * 4 + ["interrupted"]
    # What going on needs, and no report of another server's cache.
    assert turns[2].notes == {
        "params": {"temperature": 0.5, "seed": 7, "max_tokens": 9, "logit_bias": {5: 1.0}},
        "stop": ["x"],
    }
    assert turns[3].notes == {"dropped": 2, "stop": []}


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}


def with_tools(document: dict[str, Any]) -> dict[str, Any]:
    """The document with a call of a tool and what the tool said, and an answer with a grammar."""
    _, call, answer, said, _ = document["turns"]
    call["notes"] = {"message": {"tool_calls": [CALL]}}
    said |= {"role": "tool", "notes": {"message": {"tool_call_id": "call_1", "name": "weather"}}}
    answer["notes"]["params"]["grammar"] = {"kind": "regex", "text": "[a-c]+"}
    return document


def test_tools_and_grammars_come_back(document: dict[str, Any], tokenizer: Tokenizer) -> None:
    document = with_tools(document)
    record, turns = bring_in(document, tokenizer)
    assert message_of(turns[1]) == {
        "role": "assistant",
        "content": "They do.",
        "tool_calls": [CALL],
    }
    assert message_of(turns[3]) == {
        "role": "tool",
        "content": "And?",
        "tool_call_id": "call_1",
        "name": "weather",
    }
    assert turns[2].notes["params"]["grammar"] == {"kind": "regex", "text": "[a-c]+"}
    transcript = Transcript.model_validate(document)
    assert grammars(transcript) == [Grammar("regex", "[a-c]+")]
    out = json.loads(json.dumps(exported(record, turns)))
    for before, after in zip(document["turns"], out["turns"], strict=True):
        for name in ("message", "params"):
            assert after["notes"].get(name) == before["notes"].get(name)


MARKUP = {"tools": ("weather",), "parallel": False}
GENERATION = "gen_" + "0f" * 16


def test_the_calls_of_a_response_come_back(tokenizer: Tokenizer) -> None:
    turns = the_turns(tokenizer)
    turns[1].notes = {"response": {"markup": MARKUP, "conversation": "conv_0"}}
    turns[1].generation = GENERATION
    whole = json.loads(json.dumps(exported(a_session(), turns)))
    notes = bring_in(whole, tokenizer)[1][1].notes
    assert notes == {"response": {"markup": MARKUP}, "generation": GENERATION, "stop": []}
    del whole["turns"][1]["notes"]["generation"]  # as it was written before
    assert bring_in(whole, tokenizer)[1][1].notes == {"response": {"markup": MARKUP}, "stop": []}


@pytest.mark.parametrize(
    "notes",
    [
        {"response": {}},
        {"response": {"markup": {"tools": "weather"}}},
        {"response": {"markup": {"tools": ["a b"]}}},
        {"response": {"markup": {"tools": ["a"] * 129}}},
        {"response": {"markup": {"thinking": "perhaps"}}},
        {"generation": "gen_0"},
    ],
)
def test_how_an_answer_is_read_has_bounds(
    document: dict[str, Any], tokenizer: Tokenizer, notes: dict[str, Any]
) -> None:
    document["turns"][1]["notes"] = notes
    with pytest.raises(ValidationError):
        bring_in(document, tokenizer)


def test_an_answer_that_was_given_stands_within_the_templates_tokens(
    document: dict[str, Any], tokenizer: Tokenizer
) -> None:
    given = document["turns"][1]
    header, end = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.encode("<|im_end|>\n")
    given |= {"finish_reason": None, "token_ids": [*header, *given["token_ids"], *end]}
    assert bring_in(document, tokenizer)[1][1].token_ids == given["token_ids"]
    for drawn in ({"finish_reason": "stop"}, {"status": "interrupted"}):
        with pytest.raises(InvalidRequest, match="do not spell"):
            bring_in(document | {"turns": [document["turns"][0], given | drawn]}, tokenizer)
    given["content"] = [{"type": "text", "text": "They do not."}]
    with pytest.raises(InvalidRequest, match="do not spell"):
        bring_in(document, tokenizer)


def test_each_different_grammar_is_tried_and_not_too_many(
    document: dict[str, Any], tokenizer: Tokenizer
) -> None:
    answer = document["turns"][2]

    def drawn_with(count: int) -> Transcript:
        """A document with so many different grammars, each of them twice."""
        turns = []
        for i in range(2 * count):
            turn = copy.deepcopy(answer) | {"id": f"turn_{i}", "parent": None}
            turn["notes"]["params"]["grammar"] = {"kind": "regex", "text": f"a{i // 2}"}
            turns.append(turn)
        session = document["session"] | {"head": None}
        return Transcript.model_validate(document | {"turns": turns, "session": session})

    found = grammars(drawn_with(MAX_GRAMMARS))
    assert {grammar.text for grammar in found} == {f"a{i}" for i in range(MAX_GRAMMARS)}
    assert len(found) == MAX_GRAMMARS
    with pytest.raises(InvalidRequest, match=f"{MAX_GRAMMARS + 1} different grammars") as caught:
        grammars(drawn_with(MAX_GRAMMARS + 1))
    assert caught.value.param == "turns"


def test_an_export_of_an_import_is_the_same(document: dict[str, Any], tokenizer: Tokenizer) -> None:
    once = json.loads(json.dumps(exported(*bring_in(document, tokenizer))))
    twice = json.loads(json.dumps(exported(*bring_in(once, tokenizer))))

    def plain(transcript: dict[str, Any]) -> dict[str, Any]:
        copied = copy.deepcopy(transcript)
        number: dict[str | None, int | None] = {None: None}
        number |= {turn["id"]: i for i, turn in enumerate(copied["turns"])}
        for turn in copied["turns"]:
            turn["id"], turn["parent"] = number[turn["id"]], number[turn["parent"]]
        copied["session"]["head"] = number[copied["session"]["head"]]
        del copied["session"]["created_at"]
        return copied

    assert plain(once) == plain(twice)


def test_an_answer_that_ends_in_half_a_character(
    document: dict[str, Any], tokenizer: Tokenizer
) -> None:
    half = tokenizer.token_bytes.index("😀".encode()[:1])
    turn = document["turns"][2]
    turn["token_ids"] = [*tokenizer.encode("ab", special=False), half]
    for shown in ("ab", "ab�"):  # a cancelled one, and one at its limit
        turn["content"] = [{"type": "text", "text": shown}]
        _, turns = bring_in(document, tokenizer)
        assert turns[2].token_ids == turn["token_ids"]


def test_tokens_of_another_model_are_kept(document: dict[str, Any], tokenizer: Tokenizer) -> None:
    document["turns"][1]["token_ids"] = [100_000, 3]
    _, turns = bring_in(document, tokenizer, fingerprint="another")
    assert turns[1].token_ids == [100_000, 3]
    assert turns[1].tokenizer == MINE


def change(path: str, value: Any) -> Any:
    return pytest.param(path, value, id=f"{path}={str(value)[:24]}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        change("turns.1.id", "turn_a"),
        change("turns.1.parent", "turn_e"),
        change("turns.1.parent", "turn_b"),
        change("turns.0.parent", "nobody"),
        change("session.head", "nobody"),
        change("turns.1.token_ids", [3]),
        change("turns.1.token_ids", [512]),
        change("turns.2.prompt_token_ids", [512]),
        change("turns.0.token_ids", [1]),
        change("turns.2.notes.params.stop_token_ids", [512]),
        change("turns.2.notes.params.logit_bias", {"512": 1.0}),
    ],
)
def test_what_does_not_hang_together_is_refused(
    document: dict[str, Any], tokenizer: Tokenizer, path: str, value: Any
) -> None:
    put(document, path, value)
    with pytest.raises(InvalidRequest) as caught:
        bring_in(document, tokenizer)
    where = caught.value.param
    assert where and path.startswith(where) and f"`{where}" in caught.value.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        change("format", "other"),
        change("version", 2),
        change("more", 1),
        change("session.more", 1),
        change("session.title", "x" * 1025),
        change("session.instructions", "\ud800"),
        change("session.metadata", {"a": {"b": 1}}),
        change("session.metadata", {"a": "\ud800"}),
        change("session.metadata", {"a": "x" * 4097}),
        change("session.metadata", {"a" * 65: 1}),
        change("session.metadata", {str(i): i for i in range(65)}),
        change("session.metadata", {"a": float("inf")}),
        change("session.metadata", {"a": 2**63}),
        change("session.defaults.temperature", "hot"),
        change("session.defaults.temperature", 3),
        change("session.defaults.more", 3),
        change("session.overflow", "drop"),
        change("session.created_at", float("inf")),
        change("turns.0.more", 1),
        change("turns.0.role", "developer"),
        change("turns.0.status", "running"),
        change("turns.0.content", "text"),
        change("turns.0.content", [{"type": "image", "text": "x"}]),
        change("turns.0.content", [{"type": "text", "text": "\ud800"}]),
        change("turns.0.token_ids", [-1]),
        change("turns.0.token_ids", [2**32]),
        change("turns.0.token_ids", ["a"]),
        change("turns.0.created_at", float("nan")),
        change("turns.0.tokenizer", None),
        change("turns.3.notes.dropped", -1),
        change("turns.3.notes.dropped", MAX_TURNS + 1),
        change("turns.2.notes.stop", [""]),
        change("turns.2.notes.stop", ["x" * 129]),
        change("turns.2.notes.params", "x"),
        change("turns.2.notes.params.temperature", "hot"),
        change("turns.2.notes.params.temperature", -1.0),
        change("turns.2.notes.params.top_p", 0.0),
        change("turns.2.notes.params.top_k", -2),
        change("turns.2.notes.params.repetition_penalty", 0.0),
        change("turns.2.notes.params.top_logprobs", 21),
        change("turns.2.notes.params.logit_bias", {"-5": 1.0}),
        change("turns.2.notes.params.logit_bias", {"5": 1000.0}),
        change("turns.2.notes.params.seed", 2**64 + 2**63),
        change("turns.2.notes.params.prompt_index", 1),
        change("turns.2.notes.params.prompt_logprobs", True),
        change("turns.2.notes.params.grammar", "a+"),
        change("turns.2.notes.params.grammar", {"kind": "perl", "text": "a+"}),
        change("turns.2.notes.params.grammar", {"kind": "regex", "text": "x" * 65537}),
        change("turns.1.notes.message", [CALL]),
        change("turns.1.notes.message", {"role": "system"}),
        change("turns.1.notes.message", {"content": "Something else."}),
        change("turns.1.notes.message", {"tool_calls": [{**CALL, "function": {"name": ""}}]}),
        change("turns.1.notes.message", {"tool_calls": [CALL] * 129}),
        change("turns.1.notes.message", {"tool_call_id": "x" * 257}),
        change("turns.1.notes.message", {"more": "x" * (1 << 20)}),
    ],
)
def test_bounds(document: dict[str, Any], path: str, value: Any) -> None:
    put(document, path, value)
    with pytest.raises(ValidationError) as caught:
        Transcript.model_validate(document)
    told = validation_error(RequestValidationError(caught.value.errors()))
    assert told.param is not None
    assert told.param.startswith(path) or path.startswith(told.param), told.message


def put(document: dict[str, Any], path: str, value: Any) -> None:
    at: Any = document
    *names, last = path.split(".")
    for name in names:
        at = at[int(name) if name.isdecimal() else name]
    at[last] = value


def test_as_many_turns_as_fit(document: dict[str, Any], tokenizer: Tokenizer) -> None:
    document["session"]["head"] = None
    turn = {**document["turns"][0], "parent": None}
    document["turns"] = [{**turn, "id": f"turn_{i}"} for i in range(MAX_TURNS)]
    assert len(bring_in(document, tokenizer)[1]) == MAX_TURNS
    document["turns"].append({**turn, "id": "one more"})
    with pytest.raises(ValidationError, match="at most 10000"):
        Transcript.model_validate(document)


def test_markdown(tokenizer: Tokenizer) -> None:
    turns = the_turns(tokenizer)
    text = markdown(a_session(instructions="Be short.\nBe true."), [turns[0], turns[1]])
    assert text == (
        "# Rivers\n\n> Be short.\n> Be true.\n\n\n## User\n\nWhy do rivers bend?\n\n"
        "## Assistant\n\nThey do.\n"
    )
    turns[1].status = "interrupted"
    assert "## Assistant (interrupted)\n" in markdown(a_session(), turns[:2])
    assert markdown(a_session(title=None, instructions=None), []) == "# A conversation\n"
