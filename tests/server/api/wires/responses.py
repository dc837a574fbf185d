"""Responses: numbered events, items and their parts, the whole response at the end."""

from __future__ import annotations

from typing import Any

from tests.server.api.wires.checker import (
    Answer,
    BrokenStream,
    Checker,
    Json,
    Said,
    called,
    need,
)

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_ENDS = {
    "completed": ("completed",),
    "incomplete": ("incomplete", "cancelled"),
    "failed": ("failed",),
}


class ResponseStream(Checker):
    """`response` is the one that the last event has."""

    def __init__(self) -> None:
        super().__init__()
        self.number = -1
        self.response: Json = {}
        self._output: list[Json] = []
        self._item: Json | None = None
        self._next = "created"  # where one thing only may come
        self._text = ""
        self._logprobs: list[Any] = []

    @property
    def answer(self) -> Answer:
        need(self.ended, "it has not ended")
        return whole_response(self.response)

    def _take(self, document: Json) -> None:
        name = document["type"].removeprefix("response.")
        drains = name == "failed" and document["response"]["error"]["code"] == "server_draining"
        step = document["sequence_number"] - self.number
        need(step == 1 or (drains and step == 0), f"the number {document['sequence_number']}")
        self.number = document["sequence_number"]
        need(not self._next or name == self._next or name == "failed", f"{name} in that place")
        if name in ("created", "in_progress"):
            need(self._next == name, f"{name} in that place")
            self._next = "in_progress" if name == "created" else ""
            need(self.response in ({}, document["response"]), "two beginnings")
            self.response = document["response"]
            need(self.response["output"] == [], "output before there is any")
        elif name in _ENDS:
            self._end(name, document["response"])
        elif name == "output_item.added":
            self._added(document)
        else:
            need(self._item is not None, f"{name} outside of an item")
            need(document["output_index"] == len(self._output), "the index of an item")
            self._of_item(name, document)

    def _added(self, document: Json) -> None:
        item = document["item"]
        need(self._item is None, "an item within an item")
        need(document["output_index"] == len(self._output), "the index of an item")
        need(item["status"] == "in_progress", "the status of a new item")
        need(item["id"] not in {other["id"] for other in self._output}, "the id of an item twice")
        self._item, self._text, self._logprobs = item, "", []
        self._next = "content_part.added" if item["type"] in _PARTS else ""

    def _of_item(self, name: str, document: Json) -> None:
        assert self._item is not None
        if name != "output_item.done":
            need(document["item_id"] == self._item["id"], "the id of an item")
        kind = self._item["type"]
        prefix = _PARTS.get(kind, "function_call_arguments")
        if name == f"{prefix}.delta":
            need(document["delta"], "a delta that says nothing")
            self._text += document["delta"]
            self._logprobs += document.get("logprobs", [])
        elif name == f"{prefix}.done":
            told = document["arguments" if kind == "function_call" else "text"]
            need(told == self._text, "what is done is not what was said")
            told_logprobs = document.get("logprobs", [])
            need(told_logprobs[: len(self._logprobs)] == self._logprobs, "other log-probabilities")
            self._logprobs = told_logprobs
            self._next = "content_part.done" if kind in _PARTS else "output_item.done"
        elif name == "content_part.added" and kind in _PARTS:
            need(self._next == name, "a second part")
            need(document["part"]["text"] == "", "a new part that says something")
            self._next = ""
        elif name == "content_part.done":
            need(self._next == name, "the end of a part in that place")
            need(document["part"]["type"] == prefix, "the type of a part")
            need(document["part"]["text"] == self._text, "what the part says")
            need(document["part"].get("logprobs", []) == self._logprobs, "log-probabilities")
            self._next = "output_item.done"
        elif name == "output_item.done":
            need(self._next == name, "the end of an item in that place")
            need(_text_of(document["item"]) == self._text, "what the item says")
            need(document["item"]["id"] == self._item["id"], "the id of an item")
            self._output.append(document["item"])
            self._item, self._next = None, ""
        else:
            raise BrokenStream(f"{name} in an item of type {kind}")

    def _end(self, name: str, response: Json) -> None:
        need(response["status"] in _ENDS[name], "the status at the end")
        need(response["id"] == self.response["id"], "the id at the end")
        need(self._item is None or name == "failed", "the end within an item")
        if self._item is None:
            need(response["output"] == self._output, "the output at the end")
        need((response["error"] is not None) == (name == "failed"), "the error at the end")
        self.error = response["error"]
        self.response, self.ended = response, True


def _text_of(item: Json) -> str:
    said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
    return str(said)


def whole_response(document: Json) -> Answer:
    said = Said(reason=document["status"])
    for item in document["output"]:
        if item["type"] == "message":
            said.text += _text_of(item)
            said.logprobs += item["content"][0]["logprobs"]
        elif item["type"] == "reasoning":
            said.reasoning += _text_of(item)
        else:
            said.calls.append(called(item))
    usage = document["usage"]
    counts = None if usage is None else (usage["input_tokens"], usage["output_tokens"])
    return Answer([said], counts)
