"""Listener: a client in a thread of its own that follows one answer to its end."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.streams import StreamEvent, stream_events
from tests.fixtures.server import Server, wait_until


@dataclass(frozen=True)
class Ask:
    """A request for a stream."""

    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """What came of one: `token_ids` on session streams only."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


class Listener(threading.Thread):
    """Sends `ask` and keeps what comes. `times` are those of its tokens' arrivals; `place` is the
    id of the last event that had one (of the last chunk, in a resumable chat)."""

    def __init__(self, url: str, ask: Ask, headers: dict[str, str] | None = None) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._ask = ask
        self._headers = headers or {}
        self.status = 0
        self.generation = ""
        self.answer = Answer()
        self.start_data: dict[str, Any] = {}
        self.done: dict[str, Any] = {}
        self.error_id: int | None = None
        self.place = 0
        self.times: list[float] = []

    def run(self) -> None:
        with httpx.stream(
            "POST",
            f"{self._url}{self._ask.path}",
            json={**self._ask.body, "stream": True},
            headers=self._headers,
            timeout=120,
        ) as response:
            self.status = response.status_code
            self.generation = response.headers.get("x-headwater-generation", "")
            if self.status != 200:
                response.read()
                self.answer.error = response.json()["error"]["code"]
                return
            for event in stream_events(response):
                self._take(event)

    def _take(self, event: StreamEvent) -> None:
        answer, data = self.answer, event.data
        place = data["headwater"]["event"] if "headwater" in data else event.id
        if place is not None:
            assert place > self.place, "the ids do not rise"
            self.place = place
        if "error" in data:
            answer.error, self.error_id = data["error"]["code"], event.id
        elif event.event == "start":
            self.start_data = data
        elif event.event == "delta":
            answer.text += data["text"]
            answer.token_ids += data["token_ids"]
            answer.logprobs += data.get("logprobs", [])
            self.times += [time.monotonic()] * len(data["token_ids"])
        elif event.event == "done":
            self.done, answer.finish_reason = data, data["finish_reason"]
        elif event.event == "message":
            (choice,) = data["choices"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            answer.text += text
            if choice["logprobs"]:
                answer.logprobs += choice["logprobs"]["content"]
            answer.finish_reason = choice["finish_reason"]
            if text:
                self.times.append(time.monotonic())


def new_session(server: Server, **fields: Any) -> str:
    answer = httpx.post(f"{server.url}/v1/sessions", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def mixed_asks(server: Server, count: int, max_tokens: int, **fields: Any) -> list[Ask]:
    """Turns of new sessions and chats by turns; sampled with a seed each, a quarter of them greedy;
    one chat and one turn with logprobs."""
    asks = []
    for i in range(count):
        question = f"Tell me of river {i}."
        body: dict[str, Any] = {
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": 1000 + i,
            "temperature": 0 if i % 4 == 3 else 1,
            "top_p": 0.9 if i % 3 else 1,
            **fields,
        }
        if i in (1, 2):
            body |= {"logprobs": True, "top_logprobs": 3}
        if i % 2:
            body["messages"] = [{"role": "user", "content": question}]
            asks.append(Ask("/v1/chat/completions", body))
        else:
            session = new_session(server)
            asks.append(Ask(f"/v1/sessions/{session}/turns", {**body, "input": question}))
    return asks


def listen(server: Server, asks: list[Ask]) -> list[Listener]:
    """Ask all of it at once."""
    listeners = [Listener(server.url, ask, server.headers) for ask in asks]
    for listener in listeners:
        listener.start()
    return listeners


def answers(listeners: list[Listener], seconds: float = 90.0) -> list[Answer]:
    """Wait for all of them."""
    deadline = time.monotonic() + seconds
    for listener in listeners:
        listener.join(max(deadline - time.monotonic(), 0.0))
        assert not listener.is_alive(), f"a stream hangs at {listener.place}: {listener.answer}"
    return [listener.answer for listener in listeners]


def num_heard(listeners: list[Listener]) -> int:
    return sum(len(listener.times) for listener in listeners)


def wait_heard(listeners: list[Listener], count: int, seconds: float = 60.0) -> None:
    """Until so many tokens (or chunks with text) have come in all."""
    wait_until(lambda: num_heard(listeners) >= count, seconds, f"{count} tokens have not come")


def engine_changed(server: Server, pid: int) -> bool:
    """Whether there is another engine process than `pid`, ready or not."""
    try:
        return bool(server.engine.pid != pid)
    except LookupError:
        return False


def wait_new_engine(server: Server, pid: int, seconds: float = 60.0) -> None:
    """Until another engine than `pid` takes requests."""
    wait_until(lambda: engine_changed(server, pid), seconds, "there is no new engine")
    wait_until(server.ready, seconds, "the new engine is not ready")


def goals(chooser: random.Random, count: int, total: int) -> list[int]:
    """`count` random places among `total` tokens, in order; none in the last tenth."""
    return sorted(chooser.sample(range(total * 9 // 10), count))
