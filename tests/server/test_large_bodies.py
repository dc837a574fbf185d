"""Bodies as large as they may be, made to take long: nobody else waits for them."""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from collections.abc import Iterator
from typing import Any, get_type_hints

import httpx
import pytest
from pydantic import BaseModel

from server import api as routes
from server.api.body import Body
from server.middleware import MAX_BODY_BYTES
from tests.fixtures.server import Server

SIZE = MAX_BODY_BYTES - 1000
LONGEST_PAUSE_SECONDS = 3.0  # on a machine that does something else meanwhile; it was 97 once


def many(item: str) -> str:
    return "[" + ",".join([item] * (SIZE // (len(item) + 1))) + "]"


def keys(value: str) -> str:
    return "{" + ",".join(f'"k{i}":{value}' for i in range(SIZE // (len(value) + 11))) + "}"


MESSAGE = '{"messages":[{"role":"user","content":@}]}'
WITH = '{"messages":[{"role":"user","content":"Hi"}],@}'
SCHEMA = '"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":@}}}'
TRANSCRIPT = '{"format":"headwater.session","version":1,"session":{"created_at":0},"turns":@}'
CHAT = "/v1/chat/completions"
# A route, a body, and what stands in it at the @.
BODIES = {
    "parts that are none": (CHAT, MESSAGE, many("3")),
    "parts": (CHAT, MESSAGE, many('{"type":"text","text":""}')),
    "messages": (CHAT, '{"messages":@}', many("{}")),
    "a text": (CHAT, MESSAGE, '"' + "a river, " * (SIZE // 9) + '"'),
    "digits": ("/v1/completions", '{"prompt":"@"}', "1" * SIZE),
    "biases": (CHAT, WITH, '"logit_bias":' + keys("1")),
    "fields": (CHAT, WITH, keys("1")[1:-1]),
    "a schema": (CHAT, WITH, SCHEMA.replace("@", many("3"))),
    "keywords": (CHAT, WITH, '"chat_template_kwargs":{"documents":' + many("3") + "}"),
    "prompts": ("/v1/completions", '{"prompt":[@]}', many("{}")),
    "items": ("/v1/responses", '{"input":@}', many("{}")),
    "blocks": ("/v1/messages", MESSAGE.replace("{", '{"max_tokens":5,', 1), many("3")),
    "unknown fields": ("/v1/sessions", "@", keys("1")),
    "metadata": ("/v1/sessions", '{"metadata":@}', keys("[]")),
    "turns": ("/v1/sessions/import", TRANSCRIPT, many("3")),
    "layers": ("/v1/inspect/forward", '{"token_ids":[1],"layers":@}', many('"x"')),
    "a text to split": ("/tokenize", '{"text":"@"}', "1" * SIZE),
}


class Pulse(threading.Thread):
    """Asks for /health again and again, and keeps the longest time that it took."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._over = threading.Event()
        self.longest = 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while not self._over.is_set():
                started = time.monotonic()
                assert http.get("/health").status_code == 200
                self.longest = max(self.longest, time.monotonic() - started)
                self._over.wait(0.002)

    def end(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture
def pulse(tiny_server: Server) -> Iterator[Pulse]:
    pulse = Pulse(tiny_server.url)
    pulse.start()
    yield pulse
    pulse.end()


@pytest.mark.alone
@pytest.mark.parametrize("name", BODIES)
def test_nobody_waits_for_it(tiny_server: Server, pulse: Pulse, name: str) -> None:
    path, template, filling = BODIES[name]
    body = template.replace("@", filling)
    assert len(body) <= MAX_BODY_BYTES
    answer = httpx.post(
        tiny_server.url + path,
        content=body,
        headers={"content-type": "application/json"},
        timeout=120,
    )
    assert answer.status_code == 400, answer.text[:500]
    assert len(answer.content) < 2000
    pulse.end()
    assert pulse.longest < LONGEST_PAUSE_SECONDS


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All parts of a pydantic schema."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from schemas(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from schemas(value)


def bodies() -> set[type[BaseModel]]:
    """All that routes take: in each module of theirs, what a route has as `body`."""
    found = set()
    for module in pkgutil.iter_modules(routes.__path__, "server.api."):
        router = getattr(importlib.import_module(module.name), "router", None)
        for route in getattr(router, "routes", ()):
            body = get_type_hints(route.endpoint).get("body")
            if body is not None:
                found.add(body)
    return found


def test_each_list_is_given_up_at_its_first_fault() -> None:
    assert len(bodies()) > 20
    for body in bodies():
        for schema in schemas(body.__pydantic_core_schema__):
            if schema.get("type") == "list" and "items_schema" in schema:
                assert schema.get("fail_fast"), f"{body}: a list of {schema['items_schema']}"


def test_unknown_fields_that_are_told_of_are_few() -> None:
    for body in bodies():
        assert body.model_config.get("extra") == "ignore" or issubclass(body, Body), body


def test_types_are_not_bent() -> None:
    for body in bodies():
        for schema in schemas(body.__pydantic_core_schema__):
            if schema.get("type") == "model":
                assert schema["config"].get("strict"), f"{body}: {schema['cls']}"
