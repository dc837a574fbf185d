"""Token ids to text, one at a time, for one stream.

Two things keep text back: a character whose bytes are not all there yet, and a tail that may be
the beginning of a stop string. Both are decided by what was fed alone, so the text after N tokens
is a pure function of those N tokens. Nothing is decoded twice and nothing here asks a tokenizer.

Stop strings are found with the automaton of Aho and Corasick (1975): one step a character, however
many strings there are. The earliest match is the one that is complete first; of several that are
complete with the same character, the longest.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Delta(NamedTuple):
    """Text that may be shown now, and how many tokens it completes: a token counts once its last
    byte is shown (one without bytes, once everything before it is; one that ends in half a
    character, with the token that ends it)."""

    text: str
    num_tokens: int


class _Automaton(NamedTuple):
    """For each state: where a character leads, where to go on if it leads nowhere, the longest stop
    string that ends here ("" for none), and the longest tail that may still become one."""

    go: list[dict[str, int]]
    fail: list[int]
    match: list[str]
    hold: list[int]


class Detokenizer:
    """Turns one generation's ids into text.

    `token_bytes[id]` are a token's bytes, b"" for special tokens; ids beyond have none.
    `prompt_tail` is the end of the prompt, as bytes or ids: half a character there is completed by
    the output and no other part of it is ever shown. A stop string counts only if it is complete
    when at least `min_tokens` tokens were fed.
    `stopped` is the stop string that was found. `released_ends` is where the tokens end that the
    deltas so far completed, `num_shown` where their text does, in characters from the start.
    Raises ValueError for an empty stop string.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        prompt_tail: bytes | Sequence[int] = b"",
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        if "" in stop:
            raise ValueError("a stop string must have at least one character")
        self.stopped: str | None = None
        self.released_ends: list[int] = []
        self.num_shown = 0
        self._token_bytes = token_bytes
        self._min_tokens = min_tokens
        self._automaton = _build(tuple(stop)) if stop else None
        self._state = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if not isinstance(prompt_tail, bytes):
            prompt_tail = _tail_bytes(token_bytes, prompt_tail)
        self._prompt_half = _half_character(prompt_tail)
        self._held = ""
        self._num_decoded = 0  # characters decoded, shown or held
        self._num_fed = 0
        self._num_released = 0
        # For each token that is not released, how many characters must be shown to show all of it,
        # and how many it and those before it complete.
        self._ends: deque[tuple[int, int]] = deque()
        self._finished = False

    @property
    def num_held_tokens(self) -> int:
        """Tokens that were fed and are not wholly shown yet."""
        return self._num_fed - self._num_released

    @property
    def num_held(self) -> int:
        """Characters that are held back, since they may be the beginning of a stop string."""
        return len(self._held)

    def feed(self, token_id: int) -> Delta:
        """Takes the next token. After a stop string, and after `finish`, nothing more comes."""
        if self._finished:
            return Delta("", 0)
        self._num_fed += 1
        data = self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""
        if self._prompt_half and data:
            self._continue_prompt(data[:1])
        text = self._decoder.decode(data)
        self._num_decoded += len(text)
        # Bytes that wait for the rest of their character become exactly one character, whether it
        # is completed or turns out to be broken.
        waiting = bool(self._decoder.getstate()[0])
        needed = self._num_decoded + waiting
        # A token that ends in half a character counts with the one that ends it: a stop string may
        # cut that one off, and what is left is tokenised again from the character's start.
        for i in range(len(self._ends) - 1, -1, -1):
            before, completed = self._ends[i]
            if before == completed:
                break
            self._ends[i] = (max(before, needed), completed)
        self._ends.append((needed, self._num_decoded))
        return self._advance(text)

    def finish(self, *, half: bool = True) -> Delta:
        """The end of the stream: shows all that was held back. Half a character is U+FFFD, or with
        `half=False` (the stream may go on another day) not shown."""
        if self._finished:
            return Delta("", 0)
        text = self._decoder.decode(b"", final=True) if half else ""
        self._num_decoded += len(text)
        delta = self._advance(text)
        if self.stopped is not None:
            return delta
        self._finished = True
        held, self._held = self._held, ""
        return Delta(delta.text + held, delta.num_tokens + self._release(self._num_decoded))

    def _continue_prompt(self, byte: bytes) -> None:
        """Gives the decoder the prompt's half character if the output really goes on with it; else
        that half is the prompt's own and must not be shown, not even as U+FFFD."""
        try:
            codecs.utf_8_decode(self._prompt_half + byte, "strict", False)
        except UnicodeDecodeError:
            pass
        else:
            self._decoder.decode(self._prompt_half)
        self._prompt_half = b""

    def _advance(self, text: str) -> Delta:
        """Takes decoded characters, shows what cannot become a stop string."""
        automaton = self._automaton
        if automaton is None:
            return Delta(text, self._release(self._num_decoded))
        text = self._held + text
        # The held characters went through the automaton when they came.
        go, fail, state = automaton.go, automaton.fail, self._state
        for index in range(len(self._held), len(text)):
            character = text[index]
            while state and character not in go[state]:
                state = fail[state]
            state = go[state].get(character, 0)
            stop = automaton.match[state]
            if stop and self._num_fed >= self._min_tokens:
                self._finished, self.stopped, self._held = True, stop, ""
                end = index + 1 - len(stop)
                return Delta(text[:end], self._release(self._num_decoded - len(text) + end))
        self._state = state
        cut = len(text) - automaton.hold[state]
        self._held = text[cut:]
        return Delta(text[:cut], self._release(self._num_decoded - len(self._held)))

    def _release(self, num_shown: int) -> int:
        """How many tokens more are wholly within the first `num_shown` characters."""
        ends, count = self._ends, 0
        self.num_shown = num_shown
        while ends and ends[0][0] <= num_shown:
            self.released_ends.append(ends.popleft()[1])
            count += 1
        self._num_released += count
        return count


def shown_text(
    token_bytes: Sequence[bytes], ids: Sequence[int], prompt_tail: Sequence[int] = ()
) -> str:
    """The text of whole tokens after a prompt; of half a character at the end, nothing."""
    detokenizer = Detokenizer(token_bytes, prompt_tail)
    return "".join([detokenizer.feed(id_).text for id_ in ids])


@lru_cache(maxsize=256)
def _build(stops: tuple[str, ...]) -> _Automaton:
    go: list[dict[str, int]] = [{}]
    match = [""]
    depth = [0]
    for stop in stops:
        state = 0
        for character in stop:
            if character not in go[state]:
                go[state][character] = len(go)
                go.append({})
                match.append("")
                depth.append(depth[state] + 1)
            state = go[state][character]
        match[state] = stop
    fail = [0] * len(go)
    hold = [0] * len(go)
    queue = deque(go[0].values())
    while queue:
        state = queue.popleft()
        # A string that is complete and goes no further can only be the start of what its own tail
        # is the start of.
        hold[state] = depth[state] if go[state] else hold[fail[state]]
        match[state] = match[state] or match[fail[state]]
        for character, target in go[state].items():
            back = fail[state]
            while back and character not in go[back]:
                back = fail[back]
            found = go[back].get(character, 0)
            fail[target] = found if found != target else 0
            queue.append(target)
    return _Automaton(go, fail, match, hold)


def _tail_bytes(token_bytes: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """The last bytes of a prompt, enough for half a character. A special token ends a text."""
    tail = b""
    for id_ in reversed(ids):
        data = token_bytes[id_] if id_ < len(token_bytes) else b""
        if not data or len(tail) >= 3:
            break
        tail = data + tail
    return tail


def _half_character(data: bytes) -> bytes:
    """The unfinished character at the end of `data`: one to three bytes, or none."""
    for length in range(1, min(3, len(data)) + 1):
        half = data[-length:]
        if half[0] >= 0xC0:
            try:
                _, used = codecs.utf_8_decode(half, "strict", False)
            except UnicodeDecodeError:
                return b""
            return half if used == 0 else b""
        if half[0] < 0x80:
            break
    return b""
