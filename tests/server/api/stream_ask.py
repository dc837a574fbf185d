"""One case on a server: its request in one piece, its stream, and what is done to that."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlencode

import httpx
import msgspec

from tests.server.api.stream_cases import PATHS, WHOLE, Case, Json
from tests.server.api.wires.checker import Answer, Checker
from tests.server.api.wires.chunks import ChatStream
from tests.server.api.wires.responses import ResponseStream
from tests.server.api.wires.turns import TurnStream


class Ask:
    def __init__(self, client: httpx.Client, case: Case) -> None:
        self._client = client
        self._case = case
        self._path = PATHS[case.wire]
        self.checker = case.checker()
        self.generation = ""
        if case.wire == "turns":
            self._session = client.post("/v1/sessions", json={}).json()["id"]
            self._path = self._path.format(session=self._session)

    def whole(self) -> Answer:
        body = self._case.whole_body
        if self._case.wire == "turns":
            body["parent"] = None
        response = self._client.post(self._path, json=body)
        assert response.status_code == 200, response.text
        return WHOLE[self._case.wire](response.json())

    @contextmanager
    def stream(self) -> Iterator[Iterator[bytes]]:
        body = {"parent": None} if self._case.wire == "turns" else {}
        with self._pieces("POST", self._path, self._case.body | body) as (response, pieces):
            assert response.status == 200, response.read()
            self.generation = response.headers["x-headwater-generation"]
            yield pieces

    def read(self, pieces: Iterator[bytes], num_frames: int = 1 << 30) -> None:
        for piece in pieces:
            self.checker.feed(piece)
            if self.checker.num_frames >= num_frames:
                break

    def cancel(self) -> None:
        """Stop it. It may have ended before, and nobody knows plain ones then."""
        match self._case.wire:
            case "turns":
                response = self._client.post(f"/v1/sessions/{self._session}/cancel")
            case "responses" | "background":
                response = self._client.post(f"/v1/responses/{self.response_id}/cancel")
            case _:
                response = self._client.delete(f"/v1/streams/{self.generation}")
        assert response.status_code in (200, 404, 409), response.text

    def read_the_rest(self) -> None:
        """Go on, on another connection, with one that goes on without its client."""
        checker, query, headers = self.checker, {}, {}
        path = f"/v1/streams/{self.generation}"
        match checker:
            case ChatStream():
                query = {"format": "chat", "after": str(checker.place)}
            case TurnStream():
                headers = {"last-event-id": str(checker.place)}
            case ResponseStream():
                path = f"/v1/responses/{self.response_id}"
                query = {"stream": "true"}
                if checker.number >= 0:
                    query["starting_after"] = str(checker.number)
        path = f"{path}?{urlencode(query)}"
        with self._pieces("GET", path, None, headers) as (response, pieces):
            if response.status == 204:  # nothing was left but the mark of the end
                self.checker.feed(b"data: [DONE]\n\n")
                return
            assert response.status == 200, response.read()
            self.read(pieces)

    @property
    def response_id(self) -> str:
        return self.generation.replace("gen_", "resp_", 1)

    def found(self) -> Json:
        """The response as it is told now."""
        document: Json = self._client.get(f"/v1/responses/{self.response_id}").json()
        return document

    @contextmanager
    def _pieces(
        self, method: str, path: str, body: Json | None, headers: dict[str, str] | None = None
    ) -> Iterator[tuple[http.client.HTTPResponse, Iterator[bytes]]]:
        url = self._client.base_url
        connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
        try:
            content = None if body is None else msgspec.json.encode(body)
            sent = {"content-type": "application/json"} if content else {}
            connection.request(method, path, content, sent | (headers or {}))
            response = connection.getresponse()
            with response:
                yield response, iter(lambda: response.read1(self._case.size), b"")
        finally:
            connection.close()


def compare(case: Case, checker: Checker, whole: Answer, *, stopped: int = 0) -> None:
    """`stopped`: so many choices may have been cancelled before their end, from the first on."""
    said = checker.answer
    choices = said.choices
    if case.wire == "turns":  # one in one piece has none
        choices = [replace(choice, logprobs=[]) for choice in choices]
    for i, (choice, expected) in enumerate(zip(choices, whole.choices, strict=True)):
        cut = i < stopped and choice != expected
        assert choice.begins(expected) if cut else choice == expected, (choice, expected)
    if not stopped and said.usage is not None and whole.usage is not None:
        assert said.usage == whole.usage
