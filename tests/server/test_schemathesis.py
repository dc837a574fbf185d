"""Bodies, queries and paths that schemathesis makes of /openapi.json, good ones and bad ones: no
answer is a 5xx, and each is what the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.answer_schemas import SCHEMAS
from tests.fixtures.server import Server
from tests.server.test_openapi import closed

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
LENGTHS = {  # of an answer, where nothing else is asked for, so that no case takes seconds
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
    "/v1/sessions/{id}/turns": "max_tokens",
    "/v1/sessions/{id}/regenerate": "max_tokens",
    "/v1/sessions/{id}/continue": "max_tokens",
}


class Known:
    """Things of each kind that are there, so that not all paths lead nowhere. Some are deleted on
    the way; then there are others."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def named(self, path: str, method: str) -> dict[str, str]:
        """Parameters for that path."""
        deletes = method == "DELETE"
        if path.startswith("/v1/sessions/"):
            return {"id": self._made("/v1/sessions", defaults={"max_tokens": 4})}
        if path.startswith("/v1/conversations/"):
            message = {"role": "user", "content": "Hello"}
            id = self._made("/v1/conversations", items=[message])
            items = self._http.get(f"/v1/conversations/{id}/items").json()["data"]
            return {"id": id, "item_id": items[0]["id"]}
        if path.startswith(("/v1/responses/", "/v1/streams/")):
            id = self._made("/v1/responses", input="Hello", max_output_tokens=2 if deletes else 8)
            return {"id": id if "responses" in path else id.replace("resp_", "gen_")}
        return {}

    def _made(self, path: str, **body: Any) -> str:
        response = self._http.post(path, json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])


@pytest.fixture(scope="module")
def known(tiny_server: Server) -> Iterator[Known]:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as http:
        yield Known(http)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_all_answers_are_as_described(tiny_server: Server, known: Known, count: int) -> None:
    document = httpx.get(f"{tiny_server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    schemas |= {name: closed(schemas[name]) for name in SCHEMAS}  # no field that is not described
    api = schemathesis.openapi.from_dict(document, config=schemathesis.Config())
    cases = st.one_of([api.as_strategy(mode) for mode in schemathesis.GenerationMode])
    statuses: list[int] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= 150,  # what always runs is always the same
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, is_known=st.booleans())
    def ask(case: schemathesis.Case[Any], is_known: bool) -> None:
        if is_known:
            case.path_parameters |= known.named(case.path, case.method)
        length = LENGTHS.get(case.path)
        if length is not None and isinstance(case.body, dict):
            case.body.setdefault(length, 6)
        response = case.call_and_validate(
            tiny_server.url, session=session, checks=CHECKS, timeout=60
        )
        statuses.append(response.status_code)

    with requests.Session() as session:
        ask()
    assert len(statuses) >= count
    for status in (200, 400, 404):
        assert statuses.count(status) >= count / 50, statuses
    tiny_server.wait_idle(30)
    assert tiny_server.ready()
    assert "unhandled" not in tiny_server.log
