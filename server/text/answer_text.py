"""An answer's text as what it holds: reasoning, tool calls, and the rest."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from server.text.reasoning import ReasoningSplitter, Thinking
from server.text.tool_calls import Shown, ToolCallDelta, ToolCallParser


class Markup(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an answer's text is to be read. It is kept with the generation, so that whoever reads
    the answer later reads it the same way. `tools` are the names of those that may be called."""

    tools: tuple[str, ...] = ()
    parallel: bool = True
    thinking: Thinking = "no"


PLAIN = Markup()


class AnswerPart(NamedTuple):
    """What more of the text has shown: `reasoning`, and behind it text and calls in their order."""

    reasoning: str = ""
    rest: list[Shown] = []  # noqa: RUF012  # never changed

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.rest)

    @property
    def content(self) -> str:
        return "".join([each for each in self.rest if isinstance(each, str)])

    @property
    def calls(self) -> list[ToolCallDelta]:
        return [each for each in self.rest if isinstance(each, ToolCallDelta)]


class AnswerReader:
    """Reads one answer. The parts for a text, put together, do not depend on how it was cut."""

    def __init__(self, markup: Markup) -> None:
        self._splitter = ReasoningSplitter(markup.thinking)
        self._parser = (
            ToolCallParser(frozenset(markup.tools), parallel=markup.parallel)
            if markup.tools
            else None
        )

    @property
    def num_calls(self) -> int:
        return self._parser.num_calls if self._parser is not None else 0

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text are held back."""
        held = self._parser.num_held if self._parser is not None else 0
        return self._splitter.num_held + held

    def feed(self, text: str) -> AnswerPart:
        """What may be shown after more of the text."""
        reasoning, rest = self._splitter.feed(text)
        if self._parser is None:
            return AnswerPart(reasoning, [rest] if rest else [])
        return AnswerPart(reasoning, self._parser.feed(rest))

    def finish(self) -> AnswerPart:
        """The end of the text: what was held back."""
        reasoning, rest = self._splitter.finish()
        if self._parser is None:
            return AnswerPart(reasoning, [rest] if rest else [])
        return AnswerPart(reasoning, self._parser.finish(rest))


class Call(NamedTuple):
    """A whole tool call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class WholeAnswer(NamedTuple):
    """An answer read to its end."""

    content: str
    reasoning: str
    calls: list[Call]


def read_whole(markup: Markup, text: str) -> WholeAnswer:
    """A whole text at once."""
    reader = AnswerReader(markup)
    parts = [reader.feed(text), reader.finish()]
    calls: list[Call] = []
    for delta in (delta for part in parts for delta in part.calls):
        if delta.name is not None:
            calls.append(Call(delta.name, delta.arguments))
        else:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + delta.arguments)
    return WholeAnswer(
        "".join([part.content for part in parts]),
        "".join([part.reasoning for part in parts]),
        calls,
    )
