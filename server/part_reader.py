"""A reader's way through the log of a generation whose text is more than text."""

from __future__ import annotations

from collections.abc import Sequence

from model.engine.messages import TokenLogprob
from server.generation import Generation
from server.text.answer_text import AnswerPart, AnswerReader


class ShownTokens:
    """How many tokens of a log are shown (`count`) where some of its text is held back: one counts
    when all of its text is. It is a function of the tokens so far, however they were grouped."""

    def __init__(self) -> None:
        self.count = 0
        self._ends: list[int] = []  # where each token's text ends, in characters
        self._num_characters = 0

    @property
    def num_fed(self) -> int:
        return len(self._ends)

    @property
    def next_is_begun(self) -> bool:
        """Whether some of the text of the first token that does not count yet is shown."""
        start = self._ends[self.count - 1] if self.count else 0
        return self._num_characters > start

    def feed(self, pieces: Sequence[str], num_held: int) -> int:
        """Takes the text of more tokens, where so many characters at its end are held back now.
        Returns how many tokens more are shown."""
        for piece in pieces:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
        self._num_characters = (self._ends[-1] if self._ends else 0) - num_held
        before = self.count
        while self.count < len(self._ends) and self._ends[self.count] <= self._num_characters:
            self.count += 1
        return self.count - before


class PartReader:
    """The log as reasoning, tool calls and the rest, from `after` output tokens on.

    What is held back (see `AnswerReader`) comes later, with the log-probabilities of its tokens
    (see `ShownTokens`)."""

    def __init__(self, generation: Generation, after: int | None = None) -> None:
        self._generation = generation
        self._reader = AnswerReader(generation.markup)
        self._after = after or 0
        self._shown = ShownTokens()

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return self._reader.num_calls

    def read(self, end: int) -> tuple[AnswerPart, list[TokenLogprob]]:
        """What the tokens up to `end` show that was not shown before."""
        if self._shown.num_fed < self._after:
            self._feed(min(end, self._after))
        return self._feed(end)

    def finish(self) -> tuple[AnswerPart, list[TokenLogprob]]:
        """What was held back to the end of the log; it counts as one token more."""
        num_tokens = len(self._generation.token_ids)
        self.read(num_tokens)
        part, start = self._reader.finish(), self._shown.count
        if self._after > num_tokens:
            return AnswerPart(), []
        return part, self._generation.logprobs[start:]

    def _feed(self, end: int) -> tuple[AnswerPart, list[TokenLogprob]]:
        pieces = self._generation.pieces[self._shown.num_fed : end]
        part = self._reader.feed("".join(pieces))
        start = self._shown.count
        self._shown.feed(pieces, self._reader.num_held)
        return part, self._generation.logprobs[start : self._shown.count]
