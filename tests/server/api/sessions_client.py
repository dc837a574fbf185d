"""What the tests of sessions and streams share: making, asking, reading events, checking errors."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import httpx

TINY = {"max_tokens": 8, "ignore_eos": True}


class Event(NamedTuple):
    id: int | None
    name: str
    data: dict[str, Any]


def events(text: str) -> list[Event]:
    """All events of a stream; every frame must be a comment or `[id:] event: data:`."""
    found = []
    for frame in re.sub(r"^: .*\n", "", text, flags=re.MULTILINE).split("\n\n")[:-1]:
        match = re.fullmatch(r"(?:id: (\d+)\n)?event: (\w+)\ndata: (\{.*\})", frame)
        assert match, f"not a frame: {frame!r}"
        number = None if match[1] is None else int(match[1])
        found.append(Event(number, match[2], json.loads(match[3])))
    return found


def made(http: httpx.Client, **fields: Any) -> str:
    """The id of a new session whose answers have 8 tokens."""
    response = http.post("/v1/sessions", json={"defaults": TINY, **fields})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def asked(http: httpx.Client, session: str, text: str = "Why?", **fields: Any) -> dict[str, Any]:
    """The turn that answers."""
    response = http.post(f"/v1/sessions/{session}/turns", json={"input": text, **fields})
    assert response.status_code == 200, response.text
    turn: dict[str, Any] = response.json()
    return turn


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error of that kind, after a look at its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    if param is not None:
        assert error["param"] == param
        assert param in error["message"]
    return str(error["message"])
