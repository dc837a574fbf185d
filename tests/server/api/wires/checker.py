"""What the checkers of all wires have in common: frames, what was said, the one end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

Json = dict[str, Any]


class BrokenStream(AssertionError):
    pass


def need(condition: object, message: str) -> None:
    if not condition:
        raise BrokenStream(message)


@dataclass
class Said:
    """One choice of an answer. `calls` are names and arguments; `logprobs` as the wire has them."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    num_tokens: int | None = None  # where the wire tells it for each choice

    def begins(self, whole: Said) -> bool:
        """Whether this is what was said of `whole` until somebody stopped it. What stood there of a
        call that had not begun yet is text; of a call's arguments, an escape ends what is compared,
        since not all wires keep its spelling."""
        text_fits = whole.text.startswith(self.text)
        if len(self.calls) < len(whole.calls) and self.text.startswith(whole.text):
            text_fits |= self.text[len(whole.text) :].lstrip().startswith("<")
        *before, (name, arguments) = self.calls or [("", "")]
        calls_fit = not self.calls or (
            before == whole.calls[: len(before)]
            and len(before) < len(whole.calls)
            and name == whole.calls[len(before)][0]
            and whole.calls[len(before)][1].startswith(arguments.partition("\\")[0])
        )
        return text_fits and calls_fit and whole.reasoning.startswith(self.reasoning)


class Answer(NamedTuple):
    """All choices, and (prompt tokens, completion tokens) where they are told."""

    choices: list[Said]
    usage: tuple[int, int] | None


class Frame(NamedTuple):
    id: int | None
    event: str | None
    data: str


class FrameReader:
    """Frames from bytes that come in pieces of any size. Each has `id`, `event` and one line of
    `data`, in that order, of which the first two may be missing; comments stand in between."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self._line = b""
        self._fields: dict[str, str] = {}

    @property
    def is_between(self) -> bool:
        return not self._line and not self._fields

    def feed(self, data: bytes) -> list[Frame]:
        *lines, self._line = (self._line + data).split(b"\n")
        frames = [self._take(line.decode()) for line in lines]
        return [frame for frame in frames if frame is not None]

    def _take(self, line: str) -> Frame | None:
        need("\r" not in line, "a carriage return")
        if line.startswith(":"):
            need(not self._fields, "a comment within a frame")
            self.comments.append(line[1:].strip())
            return None
        if line:
            key, _, value = line.partition(": ")
            allowed = ("id", "event", "data")
            place = allowed.index(max(self._fields, key=allowed.index)) + 1 if self._fields else 0
            need(key in allowed[place:], f"the line {line[:40]!r} in that place")
            self._fields[key] = value
            return None
        need("data" in self._fields, "a frame without data")
        fields, self._fields = self._fields, {}
        number = fields.get("id")
        return Frame(None if number is None else int(number), fields.get("event"), fields["data"])


class Checker:
    """`ended`: the last frame came. `error`: what the stream broke with, in its own words."""

    has_names: ClassVar[bool] = True
    has_ids: ClassVar[bool] = False

    def __init__(self) -> None:
        self.ended = False
        self.num_frames = 0
        self.error: Json | None = None
        self.reader = FrameReader()
        self.frame = Frame(None, None, "")

    def feed(self, data: bytes) -> None:
        for frame in self.reader.feed(data):
            need(not self.ended, "something comes after the end")
            need((frame.event is not None) == self.has_names, "an event's name, or none")
            need(self.has_ids or frame.id is None, "an `id:` field")
            if frame.data == "[DONE]":
                self._done()
            else:
                document = json.loads(frame.data)
                need(self.has_ids or not self.has_names or document["type"] == frame.event, "type")
                self.frame = frame
                try:
                    self._take(document)
                except KeyError as missing:
                    raise BrokenStream(f"the field {missing} is missing") from None
            self.num_frames += 1

    def close(self) -> None:
        """The stream is over."""
        need(self.ended, "the stream ends in the middle")
        need(self.reader.is_between, "half a frame at the end")

    def cut(self) -> None:
        """The connection is gone; half a frame is lost, and comes again with the next one."""
        self.reader = FrameReader()

    @property
    def answer(self) -> Answer:
        raise NotImplementedError

    def _take(self, document: Json) -> None:
        raise NotImplementedError

    def _done(self) -> None:
        raise BrokenStream("[DONE] on a wire that has none")


def called(function: Json) -> tuple[str, str]:
    return function["name"], function["arguments"]


def spent(usage: Json) -> tuple[int, int]:
    """Prompt and completion tokens, in the words of OpenAI's older routes."""
    need(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], "the total")
    return usage["prompt_tokens"], usage["completion_tokens"]
