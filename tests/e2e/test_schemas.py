"""Random JSON schemas, followed by the default model: every complete answer is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from tests.fixtures.schemas import random_schema
from tests.fixtures.server import Server

pytestmark = pytest.mark.e2e

STREAMS = 16
MAX_TOKENS = 512
LEAST_COMPLETE = 0.95


@pytest.fixture(scope="module")
def http(default_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=default_server.url, timeout=120) as client:
        yield client


def answer(http: httpx.Client, seed: int, temperature: float) -> tuple[int, str, str]:
    """Seed, finish reason and text of an answer that follows the schema of that seed."""
    body = {
        "messages": [{"role": "user", "content": f"Invent an example, number {seed}, as JSON."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "example", "strict": True, "schema": random_schema(seed)},
        },
        "temperature": temperature,
        "max_tokens": MAX_TOKENS,
        "seed": seed,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, (seed, response.text)
    choice: dict[str, Any] = response.json()["choices"][0]
    return seed, choice["finish_reason"], choice["message"]["content"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_complete_answers_are_valid(http: httpx.Client, count: int, temperature: float) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(lambda seed: answer(http, seed, temperature), range(count)))
    num_complete = 0
    for seed, finish_reason, text in answers:
        if finish_reason == "stop":
            schema = random_schema(seed)
            validator = jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            validator.validate(json.loads(text))
            num_complete += 1
    assert num_complete >= LEAST_COMPLETE * count
