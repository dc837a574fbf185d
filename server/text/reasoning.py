"""What a model thinks aloud, `<think>...</think>`, apart from what it says.

As with tool calls the text is read character by character, so that any cut of it gives the same.
The line breaks around the marks are no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from server.text.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"

Thinking = Literal["no", "may", "does"]
"""Whether an answer thinks: it never does; it does if it begins with the mark; the prompt has
begun it already."""


def thinking(template_source: str, tokenizer: Tokenizer, prompt: Sequence[int]) -> Thinking:
    """How the answer to `prompt` (token ids) is to be read, by the model's chat template and by
    the prompt's end."""
    if OPEN not in template_source and CLOSE not in template_source:
        return "no"
    end = tokenizer.decode(prompt[-8:], skip_special=False)
    return "does" if end.rstrip().endswith(OPEN) else "may"


class ReasoningSplitter:
    """Splits an answer's text into reasoning and the rest. `num_held` characters at the end are
    neither yet."""

    def __init__(self, mode: Thinking) -> None:
        self._state: Literal["before", "inside", "behind", "rest"] = {
            "no": "rest",
            "may": "before",
            "does": "inside",
        }[mode]  # type: ignore[assignment]
        self._held: list[str] = []
        self._tail = ""  # the held characters after the space: the beginning of a mark
        self._said = False  # some reasoning was shown

    @property
    def num_held(self) -> int:
        return len(self._held)

    def feed(self, text: str) -> tuple[str, str]:
        """More reasoning, and more of the rest."""
        if self._state == "rest":
            return "", text
        reasoning: list[str] = []
        for at, character in enumerate(text):
            rest = self._take(character, reasoning)
            if rest:
                return "".join(reasoning), rest + text[at + 1 :]
        return "".join(reasoning), ""

    def finish(self) -> tuple[str, str]:
        """The end: what was held back belongs to where it stands."""
        held = "".join(self._held)
        self._held = []
        if self._state == "inside":
            return (held if self._tail else ""), ""
        return "", "" if self._state == "behind" else held

    def _take(self, character: str, reasoning: list[str]) -> str:
        """One character; what it shows of the rest, which begins with it then."""
        if self._state == "behind":
            if character.isspace():
                return ""
            self._state = "rest"
            return character
        if character.isspace() and not self._tail:
            self._held.append(character)
            return ""
        mark = OPEN if self._state == "before" else CLOSE
        tail = self._tail + character
        if mark.startswith(tail):
            self._held.append(character)
            self._tail = tail
            if tail == mark:
                self._state = "inside" if mark == OPEN else "behind"
                self._held, self._tail = [], ""
            return ""
        if self._state == "before":
            self._state = "rest"
            held, self._held = self._held, []
            return "".join(held) + character
        return self._inside(character, reasoning)

    def _inside(self, character: str, reasoning: list[str]) -> str:
        """A character of the reasoning that goes on no mark; it may begin one."""
        if not self._said:  # without the line breaks after the mark that began it
            while self._held and self._held[0].isspace():
                del self._held[0]
        reasoning += self._held
        self._said = self._said or bool(self._held)
        self._held, self._tail = [], ""
        if character.isspace() or character == CLOSE[0]:
            self._held = [character]
            self._tail = character.strip()
        else:
            reasoning.append(character)
            self._said = True
        return ""
