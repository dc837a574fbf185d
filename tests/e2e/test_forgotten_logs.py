"""Responses whose log is gone: what they tell is what they told while it was there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.e2e.test_responses import get, post
from tests.fixtures.server import Server, serving, wait_until
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import TEMPLATE, write_tokenizer
from tests.server.api.wires.responses import ResponseStream, whole_response

Json = dict[str, Any]
Q_ID, CLOSE_ID = 83, 430


@pytest.fixture(scope="module")
def forgetful_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that thinks, whose logs expire after a second, and whose engine dies of the letter
    q."""
    folder = tmp_path_factory.mktemp("thinking")
    make_tiny("llama", folder, max_position_embeddings=512)
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["<think>", "</think>"])
    assert [tokenizer.token_to_id(text) for text in ("q", "</think>")] == [Q_ID, CLOSE_ID]
    tokenizer.save(str(path))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    begun = "<|im_start|>assistant\n"
    config["chat_template"] = TEMPLATE.replace(begun, begun + "<think>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    env = {"HEADWATER_FAULT": f"die:{Q_ID}"}
    with serving(str(folder), "--stream-retention", "1", env=env) as server:
        yield server


def wait_expired(server: Server, *ids: str) -> None:
    for id in ids:
        url = f"{server.url}/v1/responses/{id}?stream=true"
        wait_until(lambda url=url: httpx.get(url).status_code == 404, 20, "its log is still there")  # type: ignore[misc]


def test_what_was_thought_counts_the_same_without_the_log(forgetful_server: Server) -> None:
    server = forgetful_server
    said = [
        post(
            server,
            input="Why?",
            seed=seed,
            max_output_tokens=60,
            ignore_eos=True,
            logit_bias={str(Q_ID): -100, str(CLOSE_ID): 3.5},
        )
        for seed in range(12)
    ]
    counts = [r["usage"]["output_tokens_details"]["reasoning_tokens"] for r in said]
    assert sum(0 < count < 60 for count in counts) >= 4, counts
    both = [{item["type"] for item in r["output"]} for r in said]
    assert {"reasoning", "message"} in both
    assert [get(server, r["id"]) for r in said] == said
    wait_expired(server, *(r["id"] for r in said))
    assert [get(server, r["id"]) for r in said] == said


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_failed_in_the_middle_is_told_as_its_stream_told_it(
    forgetful_server: Server, background: bool
) -> None:
    server = forgetful_server
    checker = ResponseStream()
    body: Json = {
        "input": "Why?",
        "regex": "[a-m]{12}q[a-m]{9}",
        "stream": True,
        "background": background,
    }
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as response:
        for data in response.iter_bytes():
            checker.feed(data)
    checker.close()
    failed = checker.response
    assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_crash")
    (answer,) = whole_response(failed).choices
    assert re.fullmatch("[a-m]{12}q?", answer.text)
    assert get(server, failed["id"]) == failed
    refused = httpx.post(
        f"{server.url}/v1/responses", json={"input": "x", "previous_response_id": failed["id"]}
    )
    assert refused.json()["error"]["param"] == "previous_response_id"
    wait_expired(server, failed["id"])
    assert get(server, failed["id"]) == failed
