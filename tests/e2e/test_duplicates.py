"""Idempotency keys: many requests at once, one answer."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.session_client import (
    SAMPLED,
    Session,
    connected,
    error,
    ok,
    text_of,
)
from tests.fixtures.server import serving

pytestmark = pytest.mark.e2e


def duplicates(
    client: httpx.Client, path: str, body: dict[str, Any], key: str, count: int
) -> list[httpx.Response]:
    """The same request, `count` times at once."""
    barrier = threading.Barrier(count)

    def send(_: int) -> httpx.Response:
        barrier.wait(30)
        return client.post(path, json=body, headers={"idempotency-key": key})

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(send, range(count)))


def texts_of(responses: list[httpx.Response]) -> set[str]:
    texts = set()
    for response in responses:
        assert response.status_code == 200, response.text
        if response.headers["content-type"].startswith("application/json"):
            document = response.json()
            if "choices" in document:
                texts.add(document["choices"][0]["message"]["content"])
            else:
                texts.add(text_of(document))
        else:
            frames = [
                json.loads(line.removeprefix("data: "))
                for line in response.text.splitlines()
                if line.startswith("data: {")
            ]
            texts.add(
                "".join(
                    f["choices"][0]["delta"].get("content", "") if "choices" in f else f["text"]
                    for f in frames
                    if "choices" in f or "text" in f
                )
            )
    return texts


def test_200_duplicates_at_once_and_after_a_restart(wide_model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, **SAMPLED}
    with (
        serving(str(wide_model), env=env) as server,
        httpx.Client(
            base_url=server.url, timeout=90, limits=httpx.Limits(max_keepalive_connections=0)
        ) as client,
    ):
        session = Session(client)
        requests: dict[str, tuple[str, dict[str, Any]]] = {
            "turn": (f"{session.url}/turns", {"input": "Hi", "max_tokens": 30, **SAMPLED}),
            "streamed turn": (
                f"{session.url}/turns",
                {"input": "Ho", "max_tokens": 30, "stream": True, "on_busy": "queue", **SAMPLED},
            ),
            "chat": ("/v1/chat/completions", chat),
            "streamed chat": ("/v1/chat/completions", {**chat, "stream": True}),
            "resumable chat": ("/v1/chat/completions", {**chat, "resumable": True}),
            "resumable stream": (
                "/v1/chat/completions",
                {**chat, "resumable": True, "stream": True},
            ),
        }
        made: dict[str, tuple[str, set[str]]] = {}
        for key, (path, body) in requests.items():
            before = server.metric("headwater_decode_tokens_total")
            answers = duplicates(client, path, body, key, 200)
            (generation,) = {answer.headers["x-headwater-generation"] for answer in answers}
            texts = texts_of(answers)
            assert len(texts) == 1, key
            assert len(next(iter(texts))) > 10
            made[key] = generation, texts
            server.wait_idle()
            assert server.metric("headwater_decode_tokens_total") - before == 30, key
            changed = client.post(
                path, json={**body, "max_tokens": 31}, headers={"idempotency-key": key}
            )
            error(changed, 409, "idempotency_conflict")
        assert [t["role"] for t in session.turns()] == ["user", "assistant"] * 2
        answers = duplicates(client, "/v1/sessions", {"title": "Once"}, "session", 200)
        (created,) = {answer.json()["id"] for answer in answers}
        assert len(ok(client.get("/v1/sessions?q=Once"))["data"]) == 1
        forks = duplicates(client, f"{session.url}/fork", {}, "fork", 20)
        assert len({answer.json()["id"] for answer in forks}) == 1
        for key in ("", "x" * 256):
            sent = client.post("/v1/sessions", json={}, headers={"idempotency-key": key})
            error(sent, 400, "invalid_value")
        server.kill_all()
    with serving(str(wide_model), env=env) as server, connected(server) as client:
        for key in ("turn", "streamed turn", "resumable chat", "resumable stream"):
            path, body = requests[key]
            answer = client.post(path, json=body, headers={"idempotency-key": key})
            generation, texts = made[key]
            assert answer.headers["x-headwater-generation"] == generation
            assert texts_of([answer]) == texts
            changed = client.post(
                path, json={**body, "max_tokens": 31}, headers={"idempotency-key": key}
            )
            error(changed, 409, "idempotency_conflict")
        again = client.post(
            "/v1/sessions", json={"title": "Once"}, headers={"idempotency-key": "session"}
        )
        assert ok(again)["id"] == created
        assert server.metric("headwater_decode_tokens_total") == 0
