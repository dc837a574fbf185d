"""A server that comes back with another model: what ran waits for its own, and is not spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.session_client import Session, connected, error, ok, text_of
from tests.e2e.streams import Reader
from tests.fixtures.server import serving, wait_until

pytestmark = pytest.mark.e2e

LONG: dict[str, Any] = {"ignore_eos": True, "seed": 5, "temperature": 1}
TURN = {**LONG, "max_tokens": 400}
CHAT = {**TURN, "messages": [{"role": "user", "content": "Hills?"}], "resumable": True}
RESPONSE = {**LONG, "input": "Seas?", "max_output_tokens": 400, "background": True}


def response(client: httpx.Client, id: str) -> dict[str, Any]:
    return ok(client.get(f"/v1/responses/{id}"))


def whole_response(client: httpx.Client, id: str) -> str:
    """The text of a response, once it is at its end."""
    ends = ("completed", "incomplete", "failed", "cancelled")
    wait_until(lambda: response(client, id)["status"] in ends, 60, "the response does not end")
    found = response(client, id)
    assert found["status"] == "incomplete"
    text: str = found["output"][0]["content"][0]["text"]
    return text


def begin_chat(client: httpx.Client) -> Reader:
    with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        assert stream.status_code == 200, stream.read()
        return Reader(client, stream.headers["x-headwater-generation"], chat=True)


def test_what_ran_waits_for_the_model_that_it_was_begun_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    with serving(str(tiny_model), env=env) as server, connected(server) as client:
        expected_turn = text_of(Session(client).turn("Rivers?", **TURN))
        expected_chat = begin_chat(client).read_all().text
        expected_response = whole_response(
            client, ok(client.post("/v1/responses", json=RESPONSE))["id"]
        )
        background = ok(client.post("/v1/responses", json=RESPONSE))["id"]
        unwanted = ok(client.post("/v1/responses", json=RESPONSE))["id"]
        session = Session(client)
        turn, chat = session.begin("Rivers?", **TURN), begin_chat(client)
        assert not chat.read(3) and not turn.read(3)
        wait_until(lambda: bool(response(client, background)["output"]), 10, "it does not begin")
        server.engine.suspend()
        assert session.get()["generating"] == turn.generation, "too late"
        assert response(client, background)["status"] == "in_progress", "too late"
        server.kill_all()

    quantized = ["--quantize", "q8"]
    with serving(str(tiny_model), *quantized, env=env) as server, connected(server) as client:
        assert server.log.count("generation_of_another_model") == 4
        waiting = Session(client, session.id)
        before = waiting.get()
        assert (before["generating"], before["turns"][-1]["status"]) == (None, "running")
        # Nothing comes after an answer that is not at its end.
        for what, body in (
            ("continue", {}),
            ("fork", {}),
            ("turns", {"input": "And?"}),
            ("turns", {"input": "And?", "on_busy": "queue"}),
            ("turns", {"input": "And?", "answer": False}),
        ):
            message = error(waiting.post(what, **body), 409, "session_busy")["message"]
            assert turn.generation in message and "another model" in message
        error(client.post(f"{waiting.url}/cancel"), 409, "invalid_value")
        for reader in (turn, chat):
            for method in ("GET", "DELETE"):
                path = f"/v1/streams/{reader.generation}"
                message = error(client.request(method, path), 404, "stream_expired")
                assert "another model" in message["message"]
        found = response(client, background)
        assert (found["status"], found["output"], found["usage"]) == ("queued", [], None)
        refused = error(client.post(f"/v1/responses/{background}/cancel"), 409, "invalid_value")
        assert "another model" in refused["message"]
        stream = client.get(f"/v1/responses/{background}?stream=true")
        assert "another model" in error(stream, 404, "stream_expired")["message"]
        ok(client.get(f"/v1/responses/{background}/input_items"))
        assert ok(client.delete(f"/v1/responses/{unwanted}"))["deleted"]
        error(client.get(f"/v1/responses/{unwanted}"), 404, "not_found")
        next_one = {"input": "And?", "previous_response_id": background}
        error(client.post("/v1/responses", json=next_one), 400, "invalid_value")
        for path in ("/tree", "/export", "/export?format=markdown", "/cache"):
            assert client.get(waiting.url + path).status_code == 200, path
        assert waiting.get() == before
        # The other model answers others meanwhile, and beside it.
        other = ok(waiting.post("regenerate", **{**TURN, "max_tokens": 20}))
        assert waiting.turn("And?", **{**TURN, "max_tokens": 20})["status"] == "complete"
        assert not expected_turn.startswith(text_of(other)), "it draws as the first one does"

    with serving(str(tiny_model), env=env) as server, connected(server) as client:
        assert server.log.count("generation_resumed") == 3
        for reader in (turn, chat):
            reader.client = client
            reader.read_all()
        assert (turn.text, chat.text) == (expected_turn, expected_chat)
        assert whole_response(client, background) == expected_response
        tree = Session(client, session.id).tree()
        assert [t["status"] for t in tree] == ["complete"] * 5
        assert text_of(next(t for t in tree if t["generation"] == turn.generation)) == turn.text
        server.wait_idle()
