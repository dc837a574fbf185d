"""What a template writes when messages are appended to a path of turns, and its tokens.

The renderings are compared, never the tokens. As in `encode_chat`, the spelling of a control token
inside a message or a tool is quoted, and is encoded as the ordinary text it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.store.records import TurnRecord
from server.text.chat_template import (
    ChatTemplate,
    Message,
    Quoted,
    TemplateError,
    check_messages,
    plain,
)
from server.text.tokenizer import Tokenizer
from server.text.tool_template import ToolTemplate

# Each of several new messages is rendered on top of those before it, which is quadratic. Beyond
# this many, the last one gets all the tokens.
MAX_SPLIT_MESSAGES = 64
_TEXT_ITEMS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class AppendedText:
    """The renderings for one extension, with the spellings of control tokens in messages quoted.

    `final` is everything, `base` the kept part of the path as far as it has tokens: None if
    `final` does not begin with it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        instructions: str | None,
        kept: Sequence[TurnRecord],
        new: Sequence[Message],
        answer: bool,
    ) -> None:
        self._tokenizer = tokenizer
        system = [] if instructions is None else [{"role": "system", "content": instructions}]
        messages = plain([*system, *map(message_of, kept), *new])
        check_messages(messages)
        tools = list(template.tools) if isinstance(template, ToolTemplate) else []
        self._quoted = Quoted([messages, tools], tokenizer.special_tokens)
        self._sentinel = next(self._quoted.unused)
        messages, tools = self._quoted.values
        if isinstance(template, ToolTemplate):
            template = template.with_tools(tools)
        self._template = template
        self._messages: list[Message] = messages
        # Without a path the instructions belong to the first message.
        self._num_old = len(messages) - len(new) if kept else 0
        # The last turns may have no tokens: those are in a turn that came after, on another branch.
        while kept and not (kept[-1].prompt_token_ids or kept[-1].token_ids):
            kept = [] if kept[-1].replaces_history else kept[:-1]
        self._num_settled = len(system) + len(kept) if kept else 0
        self._last = kept[-1] if kept else None
        self._answer = answer
        self._num_new = len(new)
        self.final = template.render(messages) if answer else self._render(messages)
        base = self._begins(self._num_settled) if kept else 0
        if base is None and kept and kept[-1].role == "assistant":
            base = self._begins_as_said()
        self.base = None if base is None else self.final[:base]

    def _render(self, messages: Sequence[Message]) -> str:
        text = self._template.render(messages, add_generation_prompt=False)
        return self._without_end(text, messages)

    def _without_end(self, text: str, messages: Sequence[Message]) -> str:
        """The text without what some templates (Phi-3's) write only where no answer is asked for:
        the end of the whole text, which nothing may follow."""
        end = self._tokenizer.eos_token
        if end and text.endswith(end):
            try:
                asking = self._template.render(messages)
            except TemplateError:
                return text
            if not asking.startswith(text):
                return text.removesuffix(end)
        return text

    def _begins(self, count: int) -> int | None:
        """The length of the first `count` messages' text if everything begins with it."""
        messages = self._messages[:count]
        try:
            text = self._template.render(messages, add_generation_prompt=False)
        except TemplateError:
            return None
        if not self.final.startswith(text):
            text = self._without_end(text, messages)
        return len(text) if self.final.startswith(text) else None

    def _begins_as_said(self) -> int | None:
        """The same for the path as the model saw and went on with it. A template may write its
        last answer in another way (Qwen3's adds thoughts that were none) that never was."""
        *before, last = self._messages[: self._num_settled]
        try:
            text = self._template.render(before) + str(last["content"])
        except TemplateError:
            return None
        for closing in self._closing_texts():
            if self.final.startswith(text + closing):
                return len(text + closing)
        return None

    def close(self, stored: list[int]) -> tuple[list[int], int]:
        """The path's tokens, closed, and where in `final` they end. `base` must be there."""
        assert self.base is not None
        position = len(self.base)
        history = list(stored)
        if self._last is not None and self._last.role == "assistant":
            text = ""
            for text in self._closing_texts():
                if self.base.endswith(text):
                    break
            closing, ended = self._closing(self._last, text, stored)
            history += closing
            # Some templates end an answer only when something follows it.
            if ended and not text:
                ends = map(self._tokenizer.piece, self._tokenizer.eos_token_ids)
                position += next(
                    (len(end) for end in ends if self.final.startswith(end, position)), 0
                )
        if self._num_settled < self._num_old:
            end = self._begins(self._num_old)
            if end is not None and end > position:
                history += self._ids(self.final[position:end], history)
                position = end
        return history, position

    def _closing_texts(self) -> Iterator[str]:
        """What the template writes after the content of the path's last answer: after the last
        question alone, which is short and enough for nearly every template, and after all."""
        answer = {"role": "assistant", "content": self._sentinel}
        before = self._messages[: self._num_settled - 1]
        users = [index for index, message in enumerate(before) if message["role"] == "user"]
        for context in (before[users[-1] :] if users else [], before):
            try:
                text = self._render([*context, answer])
            except TemplateError:
                continue
            if self._sentinel in text:
                yield text[text.rfind(self._sentinel) + 1 :]

    def _closing(self, turn: TurnRecord, text: str, stored: list[int]) -> tuple[list[int], bool]:
        """Those of the closing text's tokens that the answer does not end with already, and
        whether it ends with some end token."""
        ids, own = self._ids(text, stored), turn.token_ids
        special = self._tokenizer.special_ids
        ends = special.union(self._tokenizer.eos_token_ids)
        at = next((index for index, id_ in enumerate(ids) if id_ in ends), None)
        if at is not None:
            for stop in range(len(ids), at, -1):
                if own[-(stop - at) :] == ids[at:stop]:
                    return ids[stop:], True
        ended = bool(own) and own[-1] in self._tokenizer.eos_token_ids
        if at is not None:
            return ids[at + 1 :] if ended else ids, ended
        # Nothing tells the end of a text that was appended, but it was appended whole.
        sampled = turn.generation or turn.finish_reason or turn.status != "complete"
        return ids if sampled else [], ended

    def anew(self) -> tuple[list[int], int]:
        """The path's tokens from its content alone, and where in `final` they end."""
        position = self._begins(self._num_old) if self._num_old else 0
        if position is None and self._num_new:
            position = self._start_of_first()
        position = position or 0
        return self._ids(self.final[:position], []), position

    def _start_of_first(self) -> int | None:
        """Where the first new message begins, if the template changes what is before it: said
        twice, it is the part that comes twice."""
        old, first = self._messages[: self._num_old], self._messages[self._num_old]
        try:
            once, twice = self._render([*old, first]), self._render([*old, first, first])
        except TemplateError:
            return None
        said = twice.removeprefix(once)
        start = len(once) - len(said)
        known = said != twice and once.endswith(said) and self.final.startswith(once[:start])
        return start if known else None

    def encode(self, history: list[int], position: int) -> tuple[list[list[int]], list[int]]:
        """The tokens of each new message, and of the answer's beginning, from `position` on."""
        ids = list(history)
        own: list[list[int]] = []
        num_messages = len(self._messages)
        for count in range(num_messages - self._num_new + 1, num_messages + 1):
            end: int | None = None
            if count == num_messages and not self._answer:
                end = len(self.final)
            elif count == num_messages or self._num_new <= MAX_SPLIT_MESSAGES:
                end = self._begins(count)
            if end is None or end < position:
                own.append([])
                continue
            own.append(self._ids(self.final[position:end], ids))
            ids += own[-1]
            position = end
        return own, self._ids(self.final[position:], ids)

    def _ids(self, text: str, before: Sequence[int]) -> list[int]:
        """The ids of some rendered text that stands after the tokens `before`."""
        begun = bool(before) and before[-1] not in self._tokenizer.special_ids
        return self._quoted.encode(self._tokenizer, text, begun=begun)


def message_of(turn: TurnRecord) -> Message:
    """A turn as a chat template gets it. Raises TemplateError for items that are not text."""
    texts = []
    for item in turn.content:
        key = _TEXT_ITEMS.get(str(item.get("type")))
        if key is None:
            raise TemplateError(
                f"a {turn.role} turn holds an item of type {item.get('type')!r}; "
                "expected text, which is all that can be put into a prompt"
            )
        texts.append(item.get(key) or "")
    return {**turn.notes.get("message", {}), "role": turn.role, "content": "".join(texts)}
