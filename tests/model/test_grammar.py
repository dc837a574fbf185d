"""Grammars over small vocabularies, where every mask can be checked by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence

import llguidance
import msgspec
import pytest

from model.engine import grammars
from model.engine.grammars import Grammars, Matcher, Vocabulary
from model.engine.request import MAX_GRAMMAR_BYTES, Grammar, SamplingParams
from model.grammar import GrammarError, Trial, compiled, problem

END, STOP = 0, 1
TEXTS = ["", "", "a", "b", "c", "ab", "bc", "abc", "ba", "aa", "cc", '{"', "{", '"', "}", ":", "1"]


class Letters:
    """A tokenizer of a few tokens; the first two are special."""

    eos_token_id = END
    bos_token_id = None
    tokens = tuple(text.encode() for text in ["<end>", "<stop>", *TEXTS[2:]])
    special_token_ids = (END, STOP)

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self.tokens.index(raw[i : i + 1]) for i in range(len(raw))]


def letters() -> Vocabulary:
    wrapper = llguidance.TokenizerWrapper(Letters())
    return Vocabulary(llguidance.LLTokenizer(wrapper, eos_token=[END], slices=[]), (END,))


def matcher(kind: str, text: str, **params: object) -> Matcher:
    grammar = msgspec.convert({"kind": kind, "text": text}, Grammar)
    sampling = msgspec.convert(params, SamplingParams)
    vocabulary = letters()
    return Matcher(compiled(grammar, vocabulary.tokens), sampling, vocabulary)


def allowed(matcher: Matcher, output: Sequence[int]) -> set[int]:
    matcher.advance(output)
    return {i for i, yes in enumerate(matcher.allowed.as_booleans(len(TEXTS))) if yes}


def test_masks_are_those_of_brute_force() -> None:
    """Of random finite languages: a token may come where some text of the language goes on so.
    Where only one byte can come next, llguidance leaves one spelling of it, the tokenizer's own."""
    rng = random.Random(5)
    num_masks = 0
    for _ in range(150):
        language = {"".join(rng.choice("abc") for _ in range(rng.randint(1, 7))) for _ in range(4)}
        one = matcher("regex", "|".join(sorted(language)))
        output: list[int] = []
        said = ""
        while True:
            expected = {
                i
                for i, text in enumerate(TEXTS)
                if text and any(whole.startswith(said + text) for whole in language)
            }
            if said in language:
                expected.add(END)
            got = allowed(one, output)
            rests = {whole[len(said) :] for whole in language if whole.startswith(said)}
            if len({rest[:1] for rest in rests}) == 1:
                assert got and got <= expected, (language, said)
            else:
                assert got == expected, (language, said)
                num_masks += 1
            token = rng.choice(sorted(got))
            if token == END:
                break
            output.append(token)
            said += TEXTS[token]
    assert num_masks > 150


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(ab|bc)*c?"),
        ("json_schema", '{"type":"object","properties":{"a":{"const":1}},"required":["a"]}'),
        ("json_object", ""),
        ("lark", 'start: x*\nx: "a" | "b" x "c"\n'),
    ],
)
def test_a_new_matcher_takes_in_what_was_said(kind: str, text: str) -> None:
    rng = random.Random(3)
    one = matcher(kind, text)
    output: list[int] = []
    for _ in range(12):
        here = allowed(one, output)
        assert here == allowed(matcher(kind, text), output)
        going_on = sorted(here - {END})
        if not going_on:
            break
        output.append(rng.choice(going_on))
    assert output


def test_end_tokens_come_exactly_where_the_grammar_accepts() -> None:
    a, b = TEXTS.index("a"), TEXTS.index("b")
    plain = matcher("regex", "a+b?")
    assert END not in allowed(plain, [])
    assert END in allowed(plain, [a])
    assert allowed(plain, [a, b]) == {END} and plain.allowed.must_end

    stopping = matcher("regex", "a+b?", stop_token_ids=[STOP, b])
    assert allowed(stopping, []) & {END, STOP, b} == set()
    assert allowed(stopping, [a]) >= {END, STOP, b}

    ignoring = matcher("regex", "a+b?", ignore_eos=True)
    assert END not in allowed(ignoring, [a])
    assert allowed(ignoring, [a, b]) == {END} and ignoring.allowed.must_end


def test_white_space_is_compact_whatever_the_schema_says() -> None:
    schema = {
        "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": "[ ]+"},
        "type": "array",
        "items": {"const": 1},
    }
    assert problem(Trial(Grammar("json_schema", json.dumps(schema)))) is None
    start = compiled(Grammar("json_schema", json.dumps(schema)), _bytes())
    assert start.try_consume_tokens(list(b"[1,1]")) == 5
    start = compiled(Grammar("json_schema", json.dumps(schema)), _bytes())
    assert start.try_consume_tokens(list(b"[1, 1]")) == 3


def _bytes() -> llguidance.LLTokenizer:
    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = (*(bytes([i]) for i in range(256)), b"<end>")
        special_token_ids = (256,)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), slices=[])


def test_a_token_that_does_not_fit_is_an_error() -> None:
    one = matcher("regex", "ab")
    with pytest.raises(GrammarError, match="answer so far does not fit"):
        one.advance([TEXTS.index("c")])


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"type":"strng"}', "strng"),
        ("json_schema", '{"not":{"type":"string"}}', "not"),
        ("json_schema", '{"type":"object","properties":{"a":false},"required":["a"]}', "'a'"),
        ("json_schema", '{"$ref":"#"}', "no text satisfies it"),
        ("json_schema", '{"$ref":"file:///etc/passwd"}', "Default retriever does not fetch"),
        ("json_schema", "{", "EOF"),
        ("json_schema", "[]", "object"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "no text satisfies it"),
        ("regex", "(" * 20_000 + "a" + ")" * 20_000, "nest"),
        ("regex", "a" * (MAX_GRAMMAR_BYTES + 1), "longer than 65536 bytes"),
        ("lark", "start: foo", "foo"),
        ("lark", "x: /a/", "start"),
        ("lark", "start: <|nothing|>", "nothing"),
        ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(kind: str, text: str, words: str) -> None:
    said = problem(Trial(msgspec.convert({"kind": kind, "text": text}, Grammar)))
    assert said is not None and words in said
    assert "\n" not in said and len(said) < 500


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("json_schema", "{}"),
        ("regex", "[a-z]+@[a-z]+"),
        ("lark", 'start: <|im_start|> "x" %json {"type": "integer"}\n'),
    ],
)
def test_good_ones_have_no_problem(kind: str, text: str) -> None:
    grammar = msgspec.convert({"kind": kind, "text": text}, Grammar)
    assert problem(Trial(grammar, ("<|im_start|>",))) is None


def test_what_overflows_the_stack_ends_the_trial_alone() -> None:
    rules = "".join(f'r{i}: r{i + 1} | "y{i}"\n' for i in range(2500))
    trial = Trial(Grammar("lark", f'start: r0\n{rules}r2500: "z"\n'))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "model.grammar"],
        input=msgspec.msgpack.encode(trial),
        capture_output=True,
        check=False,
    )
    assert done.returncode < 0 and not done.stdout


# ------------------------------------------------------------------------------ the compiled ones


def ask(cache: Grammars, grammar: Grammar) -> Matcher | None:
    return cache.matcher(SamplingParams(grammar=grammar))


def wait(cache: Grammars) -> None:
    """Until all that was asked for is compiled: its thread works in order."""
    cache._thread.submit(int).result()


def test_a_grammar_is_compiled_once_and_failures_are_kept() -> None:
    told: list[None] = []
    cache = Grammars(letters)
    cache.on_compiled = lambda: told.append(None)
    good, bad = Grammar("regex", "a+"), Grammar("regex", "(a")
    assert ask(cache, good) is None and ask(cache, good) is None and ask(cache, bad) is None
    wait(cache)
    assert len(told) == 2
    first, second = ask(cache, good), ask(cache, good)
    assert first is not None and second is not None
    first.advance([TEXTS.index("aa")])  # each is somewhere else
    assert END in allowed(first, [TEXTS.index("aa")]) and END not in allowed(second, [])
    for _ in range(2):
        with pytest.raises(GrammarError, match="unclosed"):
            ask(cache, bad)
    assert len(told) == 2


def test_the_cache_is_bounded_by_entries_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_COMPILED", 3)
    monkeypatch.setattr(grammars, "MAX_COMPILED_BYTES", 100)
    cache = Grammars(letters)
    few = [Grammar("regex", "a" * n) for n in (1, 2, 3)]
    for grammar in few:
        ask(cache, grammar)
        wait(cache)
    assert ask(cache, few[0]) is not None  # used last: the second goes first
    ask(cache, Grammar("regex", "abc"))
    wait(cache)
    assert ask(cache, few[0]) is not None and ask(cache, few[1]) is None
    wait(cache)
    large = Grammar("regex", "b" * 99)
    ask(cache, large)
    wait(cache)
    assert ask(cache, large) is not None
    assert cache._num_bytes <= 100 and len(cache._compiled) <= 2


def test_a_model_without_an_end_takes_no_grammar() -> None:
    cache = Grammars(lambda: Vocabulary(letters().tokens, ()))
    ask(cache, Grammar("regex", "a"))
    wait(cache)
    with pytest.raises(GrammarError, match="no end token"):
        ask(cache, Grammar("regex", "a"))


def test_a_vocabulary_that_cannot_be_read_fails_the_grammar_alone() -> None:
    def load() -> Vocabulary:
        raise ValueError("tokenizer.json is odd")

    cache = Grammars(load)
    ask(cache, Grammar("regex", "a"))
    wait(cache)
    with pytest.raises(GrammarError, match="is odd"):
        ask(cache, Grammar("regex", "a"))
