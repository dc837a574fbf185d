"""Tool calls in an answer's text, found while it comes.

Known notations: Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (`{"name": ...,
"parameters": {...}}`, with or without `<|python_tag|>`, several parted by `;`), Mistral
(`[TOOL_CALLS][{...}]`, and `[TOOL_CALLS]name[ARGS]{...}`), and an answer that is a JSON object or
list of them. One with no mark in front is a call only if it begins the answer and names a tool
that the request has.

The parser goes character by character, so what it gives for a text does not depend on how the text
was cut. What may still become a call is held back; what turns out to be none is shown as text. A
call's arguments are handed on as they come once its name is known; if the model breaks its JSON
after that, they are what the model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from blake3 import blake3

HERMES, PYTHON_TAG, MISTRAL = "<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"
CLOSE = "</tool_call>"
MARKS = (HERMES, PYTHON_TAG, MISTRAL)
NAME = r"[a-zA-Z0-9_-]{1,64}"

_SPACE = " \t\r\n"
_MAX_HEAD = 512  # characters before the arguments; a longer head is read when the object is whole
_MAX_FIRST_KEY = 64
_MAX_MISTRAL_HEAD = 160
_KEYS = ("name", "arguments", "parameters", "id", "type", "function")
_OTHER = r'(?:"(?:id|type)"\s*:\s*"[^"\\]*"\s*,\s*)*'
_HEAD = re.compile(
    rf'\{{\s*{_OTHER}"name"\s*:\s*"({NAME})"\s*,\s*{_OTHER}"(?:arguments|parameters)"\s*:\s*\{{'
)
_MISTRAL_HEAD = re.compile(rf"({NAME})(?:\[CALL_ID\][a-zA-Z0-9_-]*)?(?:\[ARGS\])?\{{")
_MISTRAL_CHARACTER = re.compile(r"[a-zA-Z0-9_\-\[\]{]")


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call. `name` comes once, with the first delta of its `index`; the `arguments` of
    all of them together are a JSON object."""

    index: int
    name: str | None
    arguments: str


Shown = str | ToolCallDelta
"""Text, or more of a call."""


def call_id(generation_id: str, index: int) -> str:
    """The id of an answer's call: the same whenever the answer is read again."""
    return "call_" + blake3(f"{generation_id}:{index}".encode()).hexdigest(length=12)


class ToolCallParser:
    """Splits an answer's text into text and calls, in the order in which they stand.

    `names` are the request's tools. With `parallel=False` every call after the first is dropped.
    `num_calls` were found so far; `num_held` characters at the end are neither shown nor used yet.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self.num_calls = 0
        self._names = names
        self._parallel = parallel
        self._state: Callable[[str], None] = self._in_text
        self._held: list[str] = []
        self._tail = ""  # in text: the held characters after the space, which may become a mark
        self._head: list[str] = []  # of a call, from its `{` on
        self._first_key = False
        self._mark = ""
        self._begins = True  # an unmarked call may begin here
        self._between = _SPACE  # what may stand before a call and is no text then
        self._in_list = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        # What is to be shown, in its order: the pieces of a text (None), or of a call's arguments.
        self._shown: list[tuple[ToolCallDelta | None, list[str]]] = []

    @property
    def num_held(self) -> int:
        return len(self._held)

    def feed(self, text: str) -> list[Shown]:
        """What may be shown after more of the answer."""
        for character in text:
            self._state(character)
        return self._take()

    def finish(self, text: str = "") -> list[Shown]:
        """The end, after the rest of the answer: what was held back is text, but for what closes a
        call and the space there."""
        for character in text:
            self._state(character)
        between = self._state == self._in_text and self.num_calls and not self._tail
        if self._state != self._after_call and not between:
            self._show(self._held)
        self._held = []
        self._state = _ended
        return self._take()

    def _take(self) -> list[Shown]:
        shown, self._shown = self._shown, []
        return [
            "".join(pieces) if delta is None else replace(delta, arguments="".join(pieces))
            for delta, pieces in shown
        ]

    def _show(self, characters: list[str]) -> None:
        if characters:
            if not self._shown or self._shown[-1][0] is not None:
                self._shown.append((None, []))
            self._shown[-1][1].extend(characters)
            self._begins = self._begins and "".join(characters).isspace()

    def _reject(self, character: str | None = None) -> None:
        """It was no call after all; `character` is not looked at yet."""
        self._show(self._held)
        self._begin_text()
        if character is not None:
            self._in_text(character)

    def _begin_text(self) -> None:
        self._held, self._tail, self._in_list = [], "", False
        self._state = self._in_text

    # ------------------------------------------------------------------------- outside of calls

    def _in_text(self, character: str) -> None:
        if not self._tail and character in self._between:
            self._held.append(character)
            return
        tail = self._tail + character
        if any(mark.startswith(tail) for mark in MARKS):
            self._held.append(character)
            self._tail = tail
            if tail in MARKS:
                self._mark, self._state = tail, self._after_mark
            return
        if self._begins and tail[0] in "[{":
            inner = tail[1:].lstrip(_SPACE)
            self._in_list = tail[0] == "["
            if tail == "{" or (self._in_list and inner == "{"):
                self._mark = ""
                self._begin_call(character)
                return
            if self._in_list and not inner and len(tail) < _MAX_FIRST_KEY:
                self._held.append(character)
                self._tail = tail
                return
        again = bool(self._tail)
        self._show(self._held if again else [*self._held, character])
        self._between = _SPACE
        self._begin_text()
        if again:  # the character may begin another mark
            self._in_text(character)

    def _after_mark(self, character: str) -> None:
        opened = self._in_list
        if character == "{":
            self._begin_call(character)
        elif character in _SPACE or (character == "[" and not opened):
            self._in_list = opened or character == "["
            self._held.append(character)
        elif self._mark == MISTRAL and not opened and _MISTRAL_CHARACTER.match(character):
            self._held.append(character)
            self._head = [character]
            self._state = self._in_mistral_head
        else:
            self._reject(character)

    def _in_mistral_head(self, character: str) -> None:
        if len(self._head) > _MAX_MISTRAL_HEAD or not _MISTRAL_CHARACTER.match(character):
            self._reject(character)
            return
        self._held.append(character)
        self._head.append(character)
        if character == "{":
            match = _MISTRAL_HEAD.fullmatch("".join(self._head))
            if match is None:
                self._reject()
                return
            self._depth, self._in_string = 1, False
            self._commit(match[1], "{")
            self._state = self._in_bare_arguments

    # ---------------------------------------------------------------------------- inside a call

    def _begin_call(self, character: str) -> None:
        self._held.append(character)
        self._head = [character]
        self._first_key = True
        self._depth, self._in_string, self._escaped = 1, False, False
        self._state = self._in_head

    def _in_head(self, character: str) -> None:
        self._held.append(character)
        self._head.append(character)
        before = self._depth
        self._scan(character)
        if self._first_key and not self._may_be_call():
            self._reject()
        elif self._depth == 0:
            self._read_whole()
        elif character == "{" and (before, self._depth) == (1, 2) and len(self._head) <= _MAX_HEAD:
            match = _HEAD.fullmatch("".join(self._head))
            if match is not None and (self._mark or match[1] in self._names):
                self._commit(match[1], "{")
                self._state = self._in_arguments
            elif match is not None:
                self._reject()

    def _may_be_call(self) -> bool:
        """Whether the object's first key, as far as it is there, is one that a call may have."""
        text = "".join(self._head[1:]).lstrip(_SPACE)
        if not text:
            return len(self._head) < _MAX_FIRST_KEY
        key, closed, _ = text[1:].partition('"')
        if closed:
            self._first_key = False
            return text[0] == '"' and key in _KEYS
        return text[0] == '"' and any(known.startswith(key) for known in _KEYS)

    def _read_whole(self) -> None:
        """The object is complete and its head was none of the usual."""
        call = _call_of("".join(self._head))
        if call is None or not (self._mark or call[0] in self._names):
            self._reject()
            return
        self._commit(*call)
        self._state = self._after_call

    def _in_arguments(self, character: str) -> None:
        self._more(character)
        self._scan(character)
        if self._depth == 1:
            self._state = self._after_arguments

    def _in_bare_arguments(self, character: str) -> None:
        self._more(character)
        self._scan(character)
        if self._depth == 0:
            self._state = self._after_call

    def _after_arguments(self, character: str) -> None:
        self._scan(character)
        if self._depth == 0:
            self._state = self._after_call

    def _after_call(self, character: str) -> None:
        held = "".join(self._held[-len(CLOSE) :]).lstrip(_SPACE)
        if self._in_list:
            if character == "{":
                self._begin_call(character)
            elif character == "]":
                self._held = []
                self._in_list = False
            elif character in _SPACE or character == ",":
                self._held.append(character)
            else:
                self._end_calls(character)
        elif self._mark == HERMES and CLOSE.startswith(held + character):
            self._held.append(character)
            if held + character == CLOSE:
                self._held = []
                self._end_calls()
        elif self._mark == HERMES and character in _SPACE and not held:
            self._held.append(character)
        else:
            self._end_calls(character)

    def _end_calls(self, character: str = "") -> None:
        """On with text, and with what is held here: it may begin another mark."""
        held = self._held
        self._begins = self._mark in ("", PYTHON_TAG)
        self._between = _SPACE + ";" if self._begins else _SPACE
        self._begin_text()
        for each in [*held, *character]:
            self._state(each)

    def _scan(self, character: str) -> None:
        """How deep in JSON's brackets, and whether in a string."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _commit(self, name: str, arguments: str) -> None:
        self._held, self._head, self._tail = [], [], ""
        self.num_calls += 1
        if self._kept:
            self._shown.append((ToolCallDelta(self.num_calls - 1, name, ""), [arguments]))

    def _more(self, character: str) -> None:
        if self._kept:
            if not self._shown or self._shown[-1][0] is None:
                self._shown.append((ToolCallDelta(self.num_calls - 1, None, ""), []))
            self._shown[-1][1].append(character)

    @property
    def _kept(self) -> bool:
        return self._parallel or self.num_calls == 1


def _ended(character: str) -> None:
    raise RuntimeError(f"{character!r} came after the end of the answer")


def _call_of(text: str) -> tuple[str, str] | None:
    """The name and the arguments of a call whose object is whole; None where it is none."""
    try:
        document: Any = msgspec.json.decode(text)
        if isinstance(document, dict) and isinstance(document.get("function"), dict):
            document = document["function"]
        arguments = document.get("arguments", document.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError, AttributeError):
        return None
    name = document.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        return None
    if not isinstance(arguments, dict | None):
        return None
    return name, msgspec.json.encode(arguments or {}).decode()
