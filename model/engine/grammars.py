"""Grammars: those that are compiled, and where each request is in its own.

Compiling takes milliseconds to seconds and is done by a thread; the steps go on meanwhile. A
matcher is a copy of a compiled grammar. It takes in the request's tokens when the next mask is
wanted, so a resumed or recomputed request needs nothing of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llguidance

from model.engine.request import Grammar, SamplingParams
from model.grammar import GrammarError, check, compiled, deep_thread
from model.sampling.allowed import AllowedTokens

MAX_COMPILED = 64
MAX_COMPILED_BYTES = 1024 * 1024  # of their texts: compiled, they take many times as much


class Matcher:
    """Where one request is in its grammar. `allowed` are the tokens that may come next, once
    `advance` has returned. Not safe to be used from two threads at once."""

    def __init__(
        self, start: llguidance.LLMatcher, params: SamplingParams, vocabulary: Vocabulary
    ) -> None:
        num_tokens = vocabulary.tokens.vocab_size
        ends = {*vocabulary.end_token_ids, *params.stop_token_ids}
        self.allowed = AllowedTokens(num_tokens)
        self._ends = AllowedTokens(num_tokens, ends).bits
        self._others = ~self._ends
        self._ignore_eos = params.ignore_eos
        self._matcher = start.deep_copy()
        self._num_taken = 0

    def advance(self, output_token_ids: Sequence[int]) -> None:
        """Take in the output tokens after those taken so far, and find what may follow: end tokens
        exactly where the grammar accepts. Raises GrammarError."""
        new = list(output_token_ids[self._num_taken :])
        self._num_taken = len(output_token_ids)
        if new and self._matcher.try_consume_tokens(new) != len(new):
            check(self._matcher)
            raise GrammarError("the answer so far does not fit it")
        allowed = self.allowed
        self._matcher.unsafe_compute_mask_ptr(allowed.address, allowed.bits.nbytes)
        check(self._matcher)
        allowed.bits &= self._others
        allowed.must_end = False
        if self._matcher.is_accepting():
            allowed.must_end = not allowed.bits.any()
            if allowed.must_end or not self._ignore_eos:
                allowed.bits |= self._ends


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """llguidance's view of the model's tokens, and the model's own end tokens."""

    tokens: llguidance.LLTokenizer
    end_token_ids: tuple[int, ...]


class Grammars:
    """The compiled grammars, the last used ones, of a vocabulary that `load` makes. `on_compiled`
    is called from the compiling thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self.on_compiled: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher | GrammarError] = OrderedDict()
        self._num_bytes = 0
        self._pending: set[Grammar] = set()
        self._thread = deep_thread("grammars")
        self._vocabulary = self._thread.submit(load)

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """A matcher for a new request with a grammar; None while that is being compiled, which
        this begins. Raises GrammarError where it cannot be."""
        grammar = params.grammar
        assert grammar is not None
        with self._lock:
            start = self._compiled.get(grammar)
            if start is None:
                if grammar not in self._pending:
                    self._pending.add(grammar)
                    self._thread.submit(self._compile, grammar)
                return None
            self._compiled.move_to_end(grammar)
        if isinstance(start, GrammarError):
            raise start
        return Matcher(start, params, self._vocabulary.result())

    def _compile(self, grammar: Grammar) -> None:
        result: llguidance.LLMatcher | GrammarError
        try:
            vocabulary = self._vocabulary.result()
            if not vocabulary.end_token_ids:
                raise GrammarError("this model has no end token, and no grammar can do without")
            result = compiled(grammar, vocabulary.tokens)
        except GrammarError as error:
            result = error
        except BaseException as error:  # a panic in Rust is no Exception
            result = GrammarError(f"it cannot be compiled: {error}")
        with self._lock:
            self._pending.discard(grammar)
            self._compiled[grammar] = result
            self._num_bytes += len(grammar.text)
            while len(self._compiled) > 1 and (
                len(self._compiled) > MAX_COMPILED or self._num_bytes > MAX_COMPILED_BYTES
            ):
                evicted, _ = self._compiled.popitem(last=False)
                self._num_bytes -= len(evicted.text)
        self.on_compiled()
