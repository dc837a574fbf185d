"""A client of sessions, as the tests of them use it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.e2e.streams import Reader
from tests.fixtures.server import Server

BLOCK = 16
END_OF_TURN = 2  # the tiny model's
SAMPLED = {"temperature": 1.0, "seed": 11, "ignore_eos": True}


def connected(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=90, limits=httpx.Limits(keepalive_expiry=2))


class Session:
    """One session, as a client has it."""

    def __init__(self, client: httpx.Client, id: str | None = None, **fields: Any) -> None:
        self.client = client
        self.id = id or client.post("/v1/sessions", json=fields).raise_for_status().json()["id"]
        self.url = f"/v1/sessions/{self.id}"

    def post(self, what: str, **fields: Any) -> httpx.Response:
        return self.client.post(f"{self.url}/{what}", json=fields)

    def turn(self, text: str | list[Any], **fields: Any) -> dict[str, Any]:
        """Append and answer; the answer's turn."""
        return ok(self.post("turns", input=text, **fields))

    def begin(self, text: str, **fields: Any) -> Reader:
        """Begin an answer, and leave before it is there."""
        body = {"input": text, "stream": True, **fields}
        with self.client.stream("POST", f"{self.url}/turns", json=body) as response:
            assert response.status_code == 200, response.read()
            return Reader(self.client, response.headers["x-headwater-generation"])

    def fork(self, **fields: Any) -> Session:
        return Session(self.client, ok(self.post("fork", **fields))["id"])

    def get(self) -> dict[str, Any]:
        return ok(self.client.get(f"{self.url}?include=token_ids"))

    def turns(self) -> list[dict[str, Any]]:
        return list(self.get()["turns"])

    def last(self) -> dict[str, Any]:
        return self.turns()[-1]

    def tokens(self) -> list[int]:
        """All tokens of the path to the head."""
        return [id_ for t in self.turns() for id_ in t["prompt_token_ids"] + t["token_ids"]]

    def tree(self) -> list[dict[str, Any]]:
        return list(ok(self.client.get(f"{self.url}/tree"))["turns"])

    def cache(self) -> dict[str, Any]:
        return ok(self.client.get(f"{self.url}/cache"))

    def usage(self, turn: dict[str, Any]) -> dict[str, Any]:
        done = Reader(self.client, turn["generation"]).read_all().done
        assert done is not None
        usage: dict[str, Any] = done["usage"]
        return usage

    def delete(self) -> None:
        assert self.client.delete(self.url).status_code == 204


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["code"] == code
    return found


def text_of(turn: dict[str, Any]) -> str:
    return "".join(item["text"] for item in turn["content"])


def computed(server: Server) -> float:
    return server.metric("headwater_prefill_tokens_total")


def emoji_bias(client: httpx.Client) -> dict[str, int]:
    said = ok(client.post("/tokenize", json={"text": "😀🦊", "add_special_tokens": False}))
    return {str(id_): 100 for id_ in said["tokens"]}
