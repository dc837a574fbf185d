"""Requests with grammars through the real engine, on a random model with a tokenizer of bytes."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import msgspec
import pytest

from model.engine.engine import Engine
from model.engine.messages import RequestError, Submit, TokenOutput
from model.engine.request import Grammar, SamplingParams
from model.grammar import vocabulary
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.model.decoding import make_tokens
from tests.model.engine.test_generation import load

END = 2
REGEX = Grammar("regex", "[a-z]{3,40}(-[0-9]{1,9}){1,3}")
SCHEMA = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "ages": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": -9, "maximum": 999},
                    "maxItems": 3,
                },
            },
            "required": ["name", "ages"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["reference", "auto"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    engine, _ = load(folder, ops=request.param, tokenizer=folder / "tokenizer.json")
    return engine


def run(engine: Engine, *submissions: Submit) -> dict[str, tuple[list[int], str | RequestError]]:
    """Each request's tokens and how it ended."""
    compiled = threading.Event()
    assert engine.grammars is not None
    engine.grammars.on_compiled = compiled.set
    tokens: dict[str, list[int]] = {one.request_id: [] for one in submissions}
    ends: dict[str, str | RequestError] = {}
    for one in submissions:
        engine.submit(one)
    while len(ends) < len(submissions):
        if not engine.has_work:
            assert compiled.wait(20)
        compiled.clear()
        engine.submit_compiled()
        for output in engine.step().outputs if engine.has_work else []:
            _note(output, tokens, ends)
    return {name: (tokens[name], ends[name]) for name in tokens}


def _note(
    output: TokenOutput, tokens: dict[str, list[int]], ends: dict[str, str | RequestError]
) -> None:
    tokens[output.request_id] += output.token_ids
    if output.finish_reason is not None:
        ends[output.request_id] = output.error or output.finish_reason


def params(grammar: Grammar | None, seed: int = 0, **more: object) -> SamplingParams:
    given = {"temperature": 1.0, "max_tokens": 150, "seed": seed, **more}
    return msgspec.structs.replace(msgspec.convert(given, SamplingParams), grammar=grammar)


def text_of(folder: Path, token_ids: list[int]) -> str:
    tokens = vocabulary(folder / "tokenizer.json", 512, (END,))
    return tokens.decode_bytes([i for i in token_ids if i != END]).decode()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_and_end(engine: Engine, folder: Path, temperature: float) -> None:
    answers = run(
        engine,
        *(
            Submit(
                f"{kind}{seed}",
                make_tokens(9, seed),
                params(grammar, seed, temperature=temperature),
            )
            for kind, grammar in (("regex", REGEX), ("schema", SCHEMA))
            for seed in range(4)
        ),
    )
    for name, (token_ids, end) in answers.items():
        assert end == "stop" and token_ids[-1] == END, (name, end)
        text = text_of(folder, token_ids)
        if name.startswith("regex"):
            assert re.fullmatch(REGEX.text, text)
        else:
            answer = json.loads(text)
            assert len(answer["name"]) <= 12 and len(answer["ages"]) <= 3


def test_a_request_beside_others_with_grammars_gets_the_same(engine: Engine) -> None:
    prompt = make_tokens(20, 1)
    free = Submit("free", prompt, params(None, 3, ignore_eos=True, max_tokens=60))
    alone = run(engine, free)["free"]
    others = [Submit(f"o{i}", make_tokens(7, i), params(SCHEMA, i)) for i in range(3)]
    assert run(engine, free, *others)["free"] == alone


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_cut_anywhere_it_goes_on_the_same(engine: Engine, penalty: float) -> None:
    prompt = make_tokens(11, 2)
    wanted = params(SCHEMA, 7, repetition_penalty=penalty, min_tokens=3)
    whole, end = run(engine, Submit("whole", prompt, wanted))["whole"]
    for cut in range(len(whole)):
        rest = run(engine, Submit("rest", prompt, wanted, output_token_ids=whole[:cut]))["rest"]
        assert (whole[:cut] + rest[0], rest[1]) == (whole, end)


def test_preempted_it_goes_on_the_same(folder: Path) -> None:
    submissions = [Submit(f"r{i}", make_tokens(60, i), params(SCHEMA, i)) for i in range(4)]
    ample, _ = load(folder, tokenizer=folder / "tokenizer.json")
    tight, _ = load(folder, tokenizer=folder / "tokenizer.json", kv_tokens=272)
    expected = run(ample, *submissions)
    assert run(tight, *submissions) == expected
    assert tight.scheduler.num_preemptions > 0


def test_ends_come_with_the_grammar_whatever_is_asked_for(engine: Engine, folder: Path) -> None:
    grammar = Grammar("regex", "ab+c")
    for more in ({"ignore_eos": True}, {"min_tokens": 100}, {"min_tokens": 40, "ignore_eos": True}):
        token_ids, end = run(engine, Submit("r", [5], params(grammar, **more)))["r"]
        assert end == "stop"
        assert re.fullmatch("ab+c", text_of(folder, token_ids))


def test_only_the_request_fails_whose_grammar_does(engine: Engine) -> None:
    answers = run(
        engine,
        Submit("bad", [5, 6], params(Grammar("regex", "(a"))),
        Submit("never", [5, 6], params(Grammar("lark", "start: a\na: b\nb: a\n"))),
        Submit("unfit", [5, 6], params(Grammar("regex", "a+"), 0), output_token_ids=[70]),
        Submit("late", [5, 6], params(Grammar("regex", "a{1000000}"), 1)),
        Submit("good", [5, 6], params(REGEX)),
    )
    for name in ("bad", "never", "unfit", "late"):
        error = answers[name][1]
        assert isinstance(error, RequestError) and error.code == "invalid_value", (name, error)
        assert "the grammar of this request cannot be followed" in error.message
    assert answers["good"][1] == "stop"


def test_an_abort_while_its_grammar_is_compiled(engine: Engine) -> None:
    assert engine.grammars is not None
    gate = threading.Event()
    engine.grammars._thread.submit(gate.wait)
    grammar = Grammar("regex", "never seen before")
    engine.submit(Submit("gone", [5], params(grammar), report_blocks=True))
    assert engine.stats().num_waiting == 1 and not engine.has_work
    engine.abort(["gone"])
    (last,) = engine.step().outputs
    assert (last.request_id, last.finish_reason) == ("gone", "abort")
    gate.set()
    assert run(engine, Submit("next", [5], params(grammar)))["next"][1] == "stop"
    assert engine.stats().num_waiting == 0


def test_without_a_vocabulary_a_grammar_is_refused(folder: Path) -> None:
    engine, _ = load(folder)
    engine.submit(Submit("r", [5], params(REGEX)))
    (output,) = engine.step().outputs
    assert output.error is not None and "vocabulary" in output.error.message
