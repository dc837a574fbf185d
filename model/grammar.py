"""Grammars by llguidance, and the vocabulary that it needs: the one place of `model` where tokens
are bytes.

A grammar comes from a client. One can be made that llguidance spends minutes on, or that overflows
its stack. So each is tried first in a process of its own, `python -m model.grammar`, over an
alphabet of single bytes, which takes milliseconds; only what passes goes on to the engine.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import msgspec

from model.engine.request import MAX_GRAMMAR_BYTES, Grammar

MAX_MESSAGE_CHARACTERS = 400
STACK_BYTES, TRIAL_STACK_BYTES = 16 << 20, 4 << 20
_TRIAL_STEPS = 32
_TRIAL_CPU_SECONDS = 5
_TRIAL_MEMORY_BYTES = 2 << 30
# Without them one step may take seconds and one grammar a gigabyte.
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False
)


class GrammarError(ValueError):
    """A grammar, or a text within one, that llguidance refuses. One line for people."""


def source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises GrammarError."""
    if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case "json_object" | "json_schema":
            schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
            # Compact, also where the schema asks for more: small models never come to an end
            # where white space is allowed.
            compact: Any = {"whitespace_flexible": False, "whitespace_pattern": None}
            try:
                return matcher.grammar_from_json_schema(schema, overrides=compact)
            except ValueError as error:
                raise GrammarError(_line(str(error))) from None
        case "regex":
            return matcher.grammar_from_regex(grammar.text)
        case "lark":
            return matcher.grammar_from_lark(grammar.text)


def compiled(grammar: Grammar, vocabulary: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the grammar's start. Raises GrammarError."""
    matcher = llguidance.LLMatcher(vocabulary, source(grammar), log_level=0, limits=_LIMITS)
    check(matcher)
    return matcher


def check(matcher: llguidance.LLMatcher) -> None:
    """Raises GrammarError where the matcher has come into a state in which nothing fits."""
    if matcher.is_error():
        text = matcher.get_error()
        if "NoExtensionBias" in text:
            text = "no text satisfies it"
        raise GrammarError(_line(text))


def vocabulary(
    tokenizer: Path, vocab_size: int, end_token_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """The tokens of a tokenizer.json; ids up to `vocab_size` that it does not have are none. Those
    that were added to the vocabulary are no text: a grammar has them by name only (`<name>`).

    Raises ValueError for a file that llguidance cannot read."""
    text = tokenizer.read_text()
    named = max(
        [-1, *(token["id"] for token in json.loads(text).get("added_tokens", []))],
    )
    return llguidance.LLTokenizer(
        text, n_vocab=max(vocab_size, named + 1), eos_token=list(end_token_ids)
    )


class Trial(msgspec.Struct, frozen=True):
    """What `main` reads: a grammar, and the names that it may have for special tokens."""

    grammar: Grammar
    special_tokens: tuple[str, ...] = ()


def deep_thread(name: str) -> ThreadPoolExecutor:
    """One thread, running, with a stack that is deeper than that of a trial."""
    previous = threading.stack_size(STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        executor.submit(int).result()
    finally:
        threading.stack_size(previous)
    return executor


def problem(trial: Trial) -> str | None:
    """What is wrong with a grammar, found out over an alphabet of bytes by taking its first steps;
    None when nothing is. It may not return: see `main`."""
    alphabet = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Bytes(trial.special_tokens)), slices=[]
    )
    try:
        matcher = compiled(trial.grammar, alphabet)
        for _ in range(_TRIAL_STEPS):
            mask = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << 256) - 1)
            check(matcher)
            if not mask or matcher.is_stopped():
                break
            matcher.consume_token(mask.bit_length() - 1)
            check(matcher)
    except GrammarError as error:
        return str(error)
    return None


class _Bytes:
    """A tokenizer whose tokens are the 256 bytes, an end, and special ones."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, special_tokens: tuple[str, ...]) -> None:
        names = ["<end>", *special_tokens]
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in names]
        self.special_token_ids = range(256, len(self.tokens))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _line(text: str) -> str:
    """An error of llguidance as one line: without the drawings that follow it."""
    if "regex parse error" in text:
        text = text.rpartition("\nerror: ")[2]
    text = text.removesuffix("<non-verbose/>").strip().partition("\n")[0]
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS] + "…"


def main() -> None:
    """Read a Trial in msgpack from stdin; write what is wrong with it, or nothing, to stdout.

    It ends by a signal where the grammar takes too much time, memory or stack."""
    with contextlib.suppress(ValueError, OSError):  # where the hard limits are lower still
        resource.setrlimit(resource.RLIMIT_CPU, (_TRIAL_CPU_SECONDS, _TRIAL_CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_TRIAL_MEMORY_BYTES, _TRIAL_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trial = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Trial)

    def try_it() -> None:
        sys.stdout.buffer.write((problem(trial) or "").encode())

    threading.stack_size(TRIAL_STACK_BYTES)
    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
