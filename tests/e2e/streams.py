"""Reader: a client that follows one generation over as many connections as it likes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class StreamEvent:
    event: str
    id: int | None
    data: dict[str, Any]


def stream_events(response: httpx.Response) -> Iterator[StreamEvent]:
    """The events of an answer; comments are left out."""
    name, id_, data = "message", None, ""
    for line in response.iter_lines():
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "id":
            id_ = int(value)
        elif key == "data":
            data = value
        elif not line and data:
            if data != "[DONE]":
                yield StreamEvent(name, id_, json.loads(data))
            name, id_, data = "message", None, ""


@dataclass
class Reader:
    """What has come of `generation` so far; `read` goes on after `place`, on a new connection.

    `places` are the ids that came, `shown` what the text was at each of them. `done` is the data
    of the last event (of the last chunk with a finish reason, where `chat`)."""

    client: httpx.Client
    generation: str
    chat: bool = False
    place: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    shown: dict[int, str] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._had = max(self.place - 1, 0)  # tokens that somebody else has read

    def read(self, count: int = 1 << 30) -> bool:
        """Take `count` events that have an id, then drop the connection. True at the end."""
        url, headers = f"/v1/streams/{self.generation}", {"last-event-id": str(self.place)}
        if self.chat:
            url, headers = f"{url}?format=chat&after={self.place}", {}
        with self.client.stream("GET", url, headers=headers) as response:
            assert response.status_code == 200, response.read()
            for event in stream_events(response):
                assert "error" not in event.data, event.data
                if self._take(event):
                    count -= 1
                if count == 0:
                    break
        return self.done is not None

    def read_all(self) -> Reader:
        assert self.read(), "the stream broke off"
        return self

    def _take(self, event: StreamEvent) -> bool:
        place = event.data["headwater"]["event"] if self.chat else event.id
        if place is None:
            assert event.event == "progress"
            return False
        assert place > self.place, "the ids do not rise"
        assert self.done is None, "something came after the end"
        self.place = place
        self.places.append(place)
        if self.chat:
            self._take_chunk(event.data)
        elif event.event == "start":
            self.start = event.data
        elif event.event == "done":
            self.done = event.data
        else:
            self.text += event.data["text"]
            self.token_ids += event.data["token_ids"]
            self.logprobs += event.data.get("logprobs", [])
            assert place == 1 + self._had + len(self.token_ids)
        self.shown[place] = self.text
        return True

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        (choice,) = chunk["choices"]
        self.text += choice["delta"].get("content", "")
        if choice["logprobs"]:
            self.logprobs += choice["logprobs"]["content"]
        if choice["finish_reason"] is not None:
            self.done = choice
