"""A reader's way through the log of a generation whose text is more than text."""

from __future__ import annotations

from model.engine.messages import TokenLogprob
from server.generation import Generation
from server.text.answer_text import AnswerPart, AnswerReader


class PartReader:
    """The log as reasoning, tool calls and the rest, from `after` output tokens on.

    What is held back (see `AnswerReader`) comes later, with the log-probabilities of its tokens: a
    token counts as shown when all of its text is. So what has come after N tokens is a function of
    those N tokens, however they were grouped."""

    def __init__(self, generation: Generation, after: int | None = None) -> None:
        self._generation = generation
        self._reader = AnswerReader(generation.markup)
        self._after = after or 0
        self._ends: list[int] = []  # where each token's text ends, in characters
        self._num_shown = 0  # tokens

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return self._reader.num_calls

    def read(self, end: int) -> tuple[AnswerPart, list[TokenLogprob]]:
        """What the tokens up to `end` show that was not shown before."""
        self._feed(min(end, self._after))
        return self._feed(end)

    def finish(self) -> tuple[AnswerPart, list[TokenLogprob]]:
        """What was held back to the end of the log; it counts as one token more."""
        num_tokens = len(self._generation.token_ids)
        self.read(num_tokens)
        part, start = self._reader.finish(), self._num_shown
        if self._after > num_tokens:
            return AnswerPart(), []
        return part, self._generation.logprobs[start:]

    def _feed(self, end: int) -> tuple[AnswerPart, list[TokenLogprob]]:
        pieces = self._generation.pieces[len(self._ends) : end]
        for piece in pieces:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
        part = self._reader.feed("".join(pieces))
        start = self._num_shown
        num_characters = (self._ends[-1] if self._ends else 0) - self._reader.num_held
        while self._num_shown < len(self._ends) and self._ends[self._num_shown] <= num_characters:
            self._num_shown += 1
        return part, self._generation.logprobs[start : self._num_shown]
