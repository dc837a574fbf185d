"""An answer's text as runs of one kind in their order: thoughts, words, calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from server.text.answer_text import AnswerPart, AnswerReader, Markup

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Run:
    """More of one kind. A run with a `name` begins a call; its text, and that of the call's runs
    that follow, is its arguments."""

    kind: Kind
    text: str
    name: str | None = None


class AnswerRuns:
    """Reads one answer. What the runs say in all does not depend on how the text was cut."""

    def __init__(self, markup: Markup) -> None:
        self._plain = not markup.tools and markup.thinking == "no"
        self._reader = AnswerReader(markup)

    def feed(self, text: str) -> list[Run]:
        """What may be shown after more of the text."""
        if self._plain:
            return [Run("text", text)] if text else []
        # Character by character, or what comes after a call would change places with it.
        return _runs(self._reader.feed(character) for character in text)

    def finish(self) -> list[Run]:
        """What was held back."""
        return _runs([self._reader.finish()])


def _runs(parts: Iterable[AnswerPart]) -> list[Run]:
    runs: list[Run] = []

    def add(kind: Kind, text: str, name: str | None = None) -> None:
        if name is None and runs and runs[-1].kind == kind:
            runs[-1].text += text
        elif name is not None or text:
            runs.append(Run(kind, text, name))

    for part in parts:
        add("reasoning", part.reasoning)
        add("text", part.content)
        for call in part.calls:
            add("call", call.arguments, call.name)
    return runs
