"""Messages to the text, and the token ids, that the model expects.

A chat template is a Jinja program that came with the model, so it is run as a stranger's: in the
sandbox of `template_sandbox.py`, on plain JSON values only, with a bound on the output and on the
time.

`encode_chat` keeps what people write apart from what the template writes: the spelling of a
control token inside a message is quoted, and is encoded as the ordinary text it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from blake3 import blake3

from server.text.template_sandbox import BoundError, RefusedError, TemplateSandbox
from server.text.tokenizer import Tokenizer

Message = dict[str, Any]

MAX_SOURCE_BYTES = 1 << 20
MAX_OUTPUT_BYTES = 32 << 20
MAX_SECONDS = 5.0
MAX_DEPTH = 64
# What a request may pass to a template beside messages and tools; all else is refused by name.
ALLOWED_KEYWORDS = frozenset(
    {"enable_thinking", "thinking", "reasoning_effort", "documents", "date_string"}
    | {"builtin_tools", "custom_tools", "tools_in_user_message", "preserve_thinking"}
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class TemplateError(ValueError):
    """The template is broken, refused the messages, or went over a bound. One line."""


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads at once.

    `fingerprint` is the blake3 of the source. Raises TemplateError if it cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None,
        eos_token: str | None,
        *,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        if len(source.encode("utf-8", "surrogatepass")) > MAX_SOURCE_BYTES:
            raise TemplateError(f"the chat template is longer than {MAX_SOURCE_BYTES} bytes")
        self.source = source
        self.fingerprint = blake3(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._max_output_bytes = max_output_bytes
        self._environment = TemplateSandbox(max_output_bytes, max_seconds)
        self._environment.start_clock()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid, line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:
            raise TemplateError(f"the chat template cannot be compiled: {error}") from None

    @classmethod
    def for_tokenizer(cls, source: str | None, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's template; without one, ChatML where the vocabulary has its two tokens, else
        lines of "role: content"."""
        if not source:
            chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
            source = CHATML if chatml else PLAIN
        return cls(source, tokenizer.bos_token, tokenizer.eos_token)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **allowed: Any,
    ) -> str:
        """The prompt's text.

        `continue_final_message` leaves the last message open (and adds no generation prompt).
        Raises TemplateError.
        """
        unknown = sorted(allowed.keys() - ALLOWED_KEYWORDS)
        if unknown:
            raise TemplateError(f"the chat template takes no argument {unknown[0]!r}")
        values = plain({"messages": list(messages), "tools": tools and list(tools), **allowed})
        mark = ""
        if continue_final_message:
            add_generation_prompt = False
            mark = _unused_character(values)
            _append(values["messages"], mark + " ")
        values.update(self._tokens, add_generation_prompt=add_generation_prompt)
        text = self._run(values)
        if not continue_final_message:
            return text
        end = text.rfind(mark)
        if end < 0:
            raise TemplateError("the chat template drops the final message; it cannot be continued")
        # The space after the mark is gone where the template strips what is said; then the text
        # before the mark has to be stripped as well.
        return text[:end] if text.startswith(" ", end + 1) else text[:end].rstrip()

    def _run(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        self._environment.start_clock()
        try:
            for piece in self._template.generate(values):
                self._environment.check_clock()
                size += len(piece.encode("utf-8", "surrogatepass"))
                if size > self._max_output_bytes:
                    raise BoundError(f"its output is over {self._max_output_bytes} bytes")
                pieces.append(piece)
        except RefusedError as error:
            raise TemplateError(
                f"the chat template refused the messages: {error.message}"
            ) from None
        except Exception as error:
            detail = str(error) or type(error).__name__
            raise TemplateError(f"the chat template failed: {detail}") from None
        return "".join(pieces)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **allowed: Any,
) -> list[int]:
    """The prompt's token ids. BOS is there only if the template writes it. Raises TemplateError,
    or TokenizerError for text that is not Unicode."""
    values = plain({"messages": list(messages), "tools": tools and list(tools), **allowed})
    check_messages(values["messages"])
    quoted = Quoted(values, tokenizer.special_tokens)
    text = template.render(
        **quoted.values,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    return quoted.encode(tokenizer, text)


def check_messages(messages: Iterable[Message]) -> None:
    """Raises TemplateError for a role that nobody has, and joins neighbouring parts of text."""
    for message in messages:
        # A template may write the role between <| and |>.
        if message.get("role") not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise TemplateError(f"the role {message.get('role')!r} is not known; expected {known}")
        if isinstance(message.get("content"), list):
            # Two parts may each hold half of a control token's spelling.
            message["content"] = _joined(message["content"])


# ---------------------------------------------------------------------------------- quoting


class Quoted:
    """`values` with the spelling of each control token in their strings replaced by a character
    that none of them has; `unused` gives more of those."""

    def __init__(self, values: Any, special_tokens: Iterable[str]) -> None:
        self.unused = _unused_characters(values)
        found = _spellings_in(values, special_tokens)
        marks = dict(zip(found, self.unused, strict=False))
        self._spelling_of = {mark: spelling for spelling, mark in marks.items()}
        if marks:
            longest_first = sorted(marks, key=len, reverse=True)
            values = _quote(values, re.compile("|".join(map(re.escape, longest_first))), marks)
        self.values = values

    def encode(self, tokenizer: Tokenizer, text: str, *, begun: bool = False) -> list[int]:
        """The ids of a rendered text: control tokens where the template wrote them, ordinary text
        where a message spells one. `begun`: other text stands before it."""
        ids: list[int] = []
        marks = f"([{''.join(self._spelling_of)}])" if self._spelling_of else "(?!)"
        for piece in re.split(marks, text):
            spelling = self._spelling_of.get(piece)
            ids += tokenizer.encode(spelling or piece, special=spelling is None, continues=begun)
            begun = begun or bool(piece)
        return ids


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _spellings_in(values: Any, special_tokens: Iterable[str]) -> list[str]:
    """The control tokens that some string spells. The first characters sort out most texts."""
    first = {token[0] for token in special_tokens}
    texts = [text for text in _strings(values) if any(character in text for character in first)]
    return [token for token in special_tokens if any(token in text for text in texts)]


def _quote(value: Any, pattern: re.Pattern[str], marks: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: marks[match[0]], value)
    if isinstance(value, dict):
        return {
            _quote(key, pattern, marks): _quote(item, pattern, marks) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_quote(item, pattern, marks) for item in value]
    return value


def _unused_characters(values: Any) -> Iterator[str]:
    """Private-use characters (planes 15 and 16) that are in none of the strings."""
    used = {character for text in _strings(values) for character in text if character > "\uffff"}
    planes = itertools.chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    return (character for code in planes if (character := chr(code)) not in used)


def _unused_character(values: Any) -> str:
    return next(_unused_characters(values))


def _joined(parts: list[Any]) -> list[Any]:
    """The parts of a message, neighbouring parts of text being one."""
    result: list[Any] = []
    for part in parts:
        text = isinstance(part, dict) and part.get("type") == "text" and part.get("text")
        if text and result and isinstance(result[-1], dict) and result[-1].get("type") == "text":
            result[-1] = {**result[-1], "text": f"{result[-1].get('text') or ''}{text}"}
        else:
            result.append(part)
    return result


def _append(messages: list[Message], text: str) -> None:
    """Appends to the last message's text, in place."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + text
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += text
            return
    raise TemplateError("continue_final_message needs a final message with text to go on from")


def plain(value: Any, depth: int = 0) -> Any:
    """A copy made of JSON's types only, so that a template meets no object with methods of note."""
    if depth > MAX_DEPTH:
        raise TemplateError(f"the messages or tools are nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    raise TemplateError(f"the messages hold a {type(value).__name__}; expected JSON values only")
