"""An answer's text as runs of one kind in their order: thoughts, words, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.text.answer_text import AnswerPart

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True, frozen=True)
class Run:
    """More of one kind. A run with a `name` begins a call; its text, and that of the call's runs
    that follow, is its arguments."""

    kind: Kind
    text: str
    name: str | None = None


def runs_of(part: AnswerPart) -> list[Run]:
    """What a part shows, in its order."""
    runs = [Run("reasoning", part.reasoning)] if part.reasoning else []
    for each in part.rest:
        if isinstance(each, str):
            runs.append(Run("text", each))
        else:
            runs.append(Run("call", each.arguments, each.name))
    return runs
