"""Chat and completions: chunks of choices, usage where it was asked for, `[DONE]`."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.server.api.wires.checker import (
    Answer,
    Checker,
    Json,
    Said,
    called,
    need,
    spent,
)


class ChunkStream(Checker):
    """What chat and completions have in common: choices, usage, errors, `[DONE]`."""

    has_names = False
    kind: ClassVar[str]

    def __init__(self, num_choices: int = 1, *, usage: bool = False) -> None:
        super().__init__()
        self.choices = [Said() for _ in range(num_choices)]
        self._wants_usage = usage
        self._usage: tuple[int, int] | None = None
        self._head: Json | None = None

    @property
    def answer(self) -> Answer:
        return Answer(self.choices, self._usage)

    def _take(self, document: Json) -> None:
        need(self.error is None, "something comes after the error")
        if "error" in document:
            self.error = document["error"]
            return
        head = {key: document[key] for key in ("id", "object", "created", "model")}
        need(head["object"] == self.kind, "the object's kind")
        need(self._head in (None, head), "another id, object, created or model")
        self._head = head
        if not document["choices"]:
            need(self._wants_usage and self._usage is None, "usage that nobody asked for")
            need(all(choice.reason for choice in self.choices), "usage before the end")
            self._usage = spent(document["usage"])
            return
        need("usage" not in document, "usage beside a choice")
        (choice,) = document["choices"]
        said = self.choices[choice["index"]]
        need(said.reason is None, "a choice goes on after its end")
        self._choice(choice, said)
        said.reason = choice["finish_reason"]

    def _choice(self, choice: Json, said: Said) -> None:
        raise NotImplementedError

    def _done(self) -> None:
        if self.error is None:
            need(all(choice.reason for choice in self.choices), "[DONE] before all choices ended")
            need((self._usage is not None) == self._wants_usage, "usage, or none")
        self.ended = True


class ChatStream(ChunkStream):
    """With `resumable`, `place` is where the reader is."""

    kind = "chat.completion.chunk"

    def __init__(
        self, num_choices: int = 1, *, usage: bool = False, resumable: bool = False
    ) -> None:
        super().__init__(num_choices, usage=usage)
        self.place = 0
        self._resumable = resumable

    def _take(self, document: Json) -> None:
        if self._resumable and document.get("choices"):
            need(document["headwater"]["event"] > self.place, "places that do not rise")
            self.place = document["headwater"]["event"]
        super()._take(document)

    def _choice(self, choice: Json, said: Said) -> None:
        need(set(choice) == {"index", "delta", "logprobs", "finish_reason"}, "a chunk's fields")
        delta, reason = choice["delta"], choice["finish_reason"]
        is_role = self.num_frames < len(self.choices)
        need(("role" in delta) == is_role, "roles that are not in front")
        if is_role:
            need(choice["index"] == self.num_frames, "the order of the roles")
            need(delta == {"role": "assistant", "content": ""} and reason is None, "a role alone")
            return
        need(set(delta) <= {"content", "reasoning_content", "tool_calls"}, "a delta's fields")
        says = any(delta.values()) or choice["logprobs"]
        fits = says if reason is None else not says or self._resumable
        need(fits, "an empty delta, or a last one that says something")
        said.reasoning += delta.get("reasoning_content", "")
        said.text += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            self._call(call, said.calls)
        if choice["logprobs"] is not None:
            said.logprobs += choice["logprobs"]["content"]

    def _call(self, call: Json, calls: list[tuple[str, str]]) -> None:
        arguments = call["function"]["arguments"]
        if call["index"] == len(calls):
            begun = call["type"] == "function" and call["id"].startswith("call_")
            need(begun, "a call's beginning")
            calls.append((call["function"]["name"], arguments))
        else:
            need(call["index"] == len(calls) - 1, "a call that is none, or over")
            need(set(call) == {"index", "function"}, "a call that begins twice")
            need(set(call["function"]) == {"arguments"}, "a name that comes twice")
            calls[-1] = (calls[-1][0], calls[-1][1] + arguments)


def whole_chat(document: Json) -> Answer:
    choices = []
    for choice in document["choices"]:
        message = choice["message"]
        choices.append(
            Said(
                message["content"] or "",
                message.get("reasoning_content", ""),
                [called(call["function"]) for call in message.get("tool_calls", [])],
                (choice["logprobs"] or {"content": []})["content"],
                choice["finish_reason"],
            )
        )
    return Answer(choices, spent(document["usage"]))


class CompletionStream(ChunkStream):
    kind = "text_completion"

    def _choice(self, choice: Json, said: Said) -> None:
        need(set(choice) == {"index", "text", "logprobs", "finish_reason"}, "a chunk's fields")
        says = choice["text"] or choice["logprobs"]
        need(bool(says) == (choice["finish_reason"] is None), "an empty chunk, or a full last one")
        said.text += choice["text"]
        said.logprobs += _rows(choice["logprobs"])


def whole_completion(document: Json) -> Answer:
    choices = [
        Said(c["text"], logprobs=_rows(c["logprobs"]), reason=c["finish_reason"])
        for c in document["choices"]
    ]
    return Answer(choices, spent(document["usage"]))


def _rows(logprobs: Json | None) -> list[Any]:
    if logprobs is None:
        return []
    columns = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return list(zip(*(logprobs[name] for name in columns), strict=True))
