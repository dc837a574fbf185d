"""Responses across kill -9: what is kept, what goes on, what is found in the cache."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from server.owners import key_line, make_key
from tests.e2e.streams import stream_events
from tests.fixtures.server import Server, serving, wait_until
from tests.server.test_disk_cache import kill_all, wait_written

Json = dict[str, Any]
LONG = "The river runs to the sea, and nobody knows why it bends. " * 2
TOOLS: list[Json] = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
SAID: Json = {"instructions": "Answer in verse.", "max_output_tokens": 40, "ignore_eos": True}


def post(server: Server, **body: Any) -> Json:
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def get(server: Server, id: str) -> Json:
    document: Json = httpx.get(f"{server.url}/v1/responses/{id}", timeout=60).json()
    return document


def events(server: Server, id: str, after: int | None = None, count: int = 1 << 30) -> list[Json]:
    """The first `count` events of a stream after the number `after`."""
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    found: list[Json] = []
    url = f"{server.url}/v1/responses/{id}"
    with httpx.stream("GET", url, params=query, timeout=60) as response:
        assert response.status_code == 200
        for event in stream_events(response):
            found.append(event.data)
            if len(found) == count:
                break
    return found


def cached(response: Json) -> int:
    return int(response["usage"]["input_tokens_details"]["cached_tokens"])


def num_tokens(response: Json) -> int:
    return int(response["usage"]["total_tokens"])


def test_three_branches_find_all_of_their_parent(wide_model: Path, tmp_path: Path) -> None:
    """With its instructions and tools; in memory, and on the disk after kill -9 of everything."""
    env = {"HEADWATER_DATA": str(tmp_path)}
    said = {**SAID, "tools": TOOLS}

    def branches(server: Server, first: Json) -> list[Json]:
        full_blocks = (num_tokens(first) - 1) // 16 * 16
        found = []
        for seed, text in enumerate(("Why?", "Where?", "Who?")):
            branch = post(server, input=text, previous_response_id=first["id"], seed=seed, **said)
            assert full_blocks <= cached(branch) < branch["usage"]["input_tokens"]
            found.append(branch)
        return found

    with serving(str(wide_model), env=env) as server:
        first = post(server, input=LONG, seed=1, **said)
        plain = post(server, input=LONG, seed=1, **SAID)
        assert num_tokens(first) > num_tokens(plain) + 64  # the tools are in the prompt
        before = branches(server, first)
        assert len({branch["output"][0]["content"][0]["text"] for branch in before}) == 3
        wait_written(server, num_tokens(first) - 1)
        kill_all(server)
    with serving(str(wide_model), env=env) as server:
        assert get(server, first["id"]) == first
        for branch, again in zip(before, branches(server, first), strict=True):
            assert again["output"][0]["content"] == branch["output"][0]["content"]
        assert server.metric("headwater_prefix_hit_tokens_total", tier="disk") > 0
        kill_all(server)


def test_what_runs_in_the_background_goes_on_and_what_does_not_ends(
    tiny_model: Path, tmp_path: Path
) -> None:
    env = {"HEADWATER_DATA": str(tmp_path)}
    body: Json = {"input": "Tell me all", "seed": 5, "ignore_eos": True, "max_output_tokens": 400}
    with serving(str(tiny_model), env=env) as server:
        undisturbed = post(server, **body, background=True)["id"]
        expected = events(server, undisturbed)
        conversation = httpx.post(f"{server.url}/v1/conversations", json={}).json()["id"]
        post(server, input="Hello", conversation=conversation, max_output_tokens=4)

        background = post(server, **body, background=True)["id"]
        heard = events(server, background, count=20)
        waited_for = ""
        with httpx.stream(
            "POST",
            f"{server.url}/v1/responses",
            json={**body, "stream": True, "conversation": conversation},
            timeout=60,
        ) as response:
            for i, event in enumerate(stream_events(response)):
                waited_for = waited_for or event.data["response"]["id"]
                if i == 10:
                    kill_all(server)
                    break
    with serving(str(tiny_model), env=env) as server:
        wait_until(server.ready, 30, "the server is not ready")
        rest = events(server, background, after=heard[-1]["sequence_number"])

        def said(all_events: list[Json]) -> list[Json]:
            """What must be the same for the same seed: all but ids and times."""
            return [
                {key: event.get(key) for key in ("type", "sequence_number", "delta", "text")}
                for event in all_events
            ]

        assert said([*heard, *rest]) == said(expected)
        assert [*heard, *rest] == events(server, background)
        assert get(server, waited_for)["status"] == "cancelled"
        items = f"{server.url}/v1/conversations/{conversation}/items"
        assert len(httpx.get(items).json()["data"]) == 2
        kill_all(server)


def test_whoever_leaves_ends_it_but_in_the_background(tiny_server: Server) -> None:
    server = tiny_server
    body: Json = {"input": "Tell me all", "stream": True, "ignore_eos": True}
    found: list[str] = []
    for background in (False, True):
        with httpx.stream(
            "POST", f"{server.url}/v1/responses", json={**body, "background": background}
        ) as response:
            found += [next(stream_events(response)).data["response"]["id"]]
    plain, background_one = found
    wait_until(lambda: get(server, plain)["status"] == "cancelled", 10, "it was not cancelled")
    wait_until(
        lambda: get(server, background_one)["status"] == "incomplete", 30, "it did not go on"
    )
    server.wait_idle()


@pytest.mark.parametrize("waits", [False, True])
def test_a_key_of_one_whose_client_left_makes_it_anew(tiny_server: Server, waits: bool) -> None:
    """What a client sends again since it heard nothing of the end."""
    body: Json = {"input": "Tell me all", "max_output_tokens": 300, "ignore_eos": True, "seed": 1}

    def ask(count: int = 1 << 30) -> Json:
        """The response in the last of so many events."""
        with httpx.stream(
            "POST",
            f"{tiny_server.url}/v1/responses",
            json=body | {"stream": True},
            headers={"idempotency-key": f"left-{waits}"},
            timeout=60,
        ) as answer:
            assert answer.status_code == 200, answer.read()
            *_, last = itertools.islice(stream_events(answer), count)
        response: Json = last.data["response"]
        return response

    first = ask(1)
    if waits:  # else it may still be on its way to its end
        wait_until(lambda: get(tiny_server, first["id"])["status"] == "cancelled", 10, "it goes on")
    second = ask()
    assert second["id"] != first["id"]
    assert (second["status"], second["usage"]["output_tokens"]) == ("incomplete", 300)
    assert ask() == second


def test_responses_are_kept_for_a_while(tiny_model: Path) -> None:
    options = ("--response-retention", "2", "--stream-retention", "1")
    with serving(str(tiny_model), *options) as server:
        first = post(server, input="Hello", max_output_tokens=4)
        conversation = httpx.post(f"{server.url}/v1/conversations", json={}).json()["id"]
        post(server, input="Hello", conversation=conversation, max_output_tokens=4)

        def expired() -> bool:
            url = f"{server.url}/v1/responses/{first['id']}"
            stream = httpx.get(url, params={"stream": "true"})
            return stream.status_code == 404

        wait_until(expired, 20, "its events are still there")
        wait_until(lambda: "error" in get(server, first["id"]), 20, "it is still there")
        items = httpx.get(f"{server.url}/v1/conversations/{conversation}/items").json()["data"]
        assert len(items) == 2


def test_a_response_stays_as_it_is_when_its_answer_goes_on(tiny_model: Path) -> None:
    with serving(str(tiny_model), "--stream-retention", "1") as server:
        conversation = httpx.post(f"{server.url}/v1/conversations", json={}).json()["id"]
        session = conversation.replace("conv_", "sess_")
        body: Json = {"input": "Hello", "max_output_tokens": 5, "ignore_eos": True, "seed": 1}
        id = post(server, conversation=conversation, **body)["id"]
        first = get(server, id)
        assert first["usage"]["output_tokens"] == 5
        turn: Json = {}
        for _ in range(2):
            url = f"{server.url}/v1/sessions/{session}/continue"
            turn = httpx.post(url, json={"max_tokens": 6}, timeout=60).json()
            assert get(server, id) == first
        assert turn["num_tokens"] == 17

        def expired() -> bool:
            stream = httpx.get(f"{server.url}/v1/responses/{id}", params={"stream": "true"})
            return stream.status_code == 404

        wait_until(expired, 20, "its events are still there")
        assert get(server, id) == first
        assert "error" in get(server, turn["generation"].replace("gen_", "resp_"))


def test_what_is_said_when_the_server_stops_is_true(tiny_model: Path, tmp_path: Path) -> None:
    env = {"HEADWATER_DATA": str(tmp_path), "HEADWATER_SHUTDOWN_GRACE": "0"}
    body: Json = {"input": "Tell me all", "ignore_eos": True, "max_output_tokens": 400}

    def last(server: Server, background: bool) -> Json:
        sent = {**body, "stream": True, "background": background}
        url = f"{server.url}/v1/responses"
        with httpx.stream("POST", url, json=sent, timeout=60) as response:
            found = []
            for i, event in enumerate(stream_events(response)):
                found.append(event.data)
                if i == 10:
                    server.process.send_signal(signal.SIGTERM)
        ended: Json = found[-1]
        assert ended["type"] == "response.failed", ended
        assert ended["response"]["error"]["code"] == "server_draining"
        response: Json = ended["response"]
        return response

    for background, said, then in (
        (False, "it is cancelled", "cancelled"),
        (True, "goes on", "incomplete"),
    ):
        with serving(str(tiny_model), env=env) as server:
            response = last(server, background)
            assert said in response["error"]["message"]
        with serving(str(tiny_model), env=env) as server:
            wait_until(server.ready, 30, "the server is not ready")
            wait_until(
                lambda id=response["id"], then=then: get(server, id)["status"] == then,
                30,
                f"it is not {then}",
            )


@pytest.mark.e2e
def test_the_default_model_answers_the_sdk(default_server: Server) -> None:
    with OpenAI(base_url=f"{default_server.url}/v1", api_key="any", max_retries=0) as client:
        first = client.responses.create(
            model="any", input="Name a river.", temperature=0, max_output_tokens=24
        )
        second = client.responses.create(
            model="any",
            input="Where does it end?",
            previous_response_id=first.id,
            temperature=0,
            max_output_tokens=24,
        )
        assert first.output_text and second.output_text
        assert second.usage is not None and first.usage is not None
        cached = second.usage.input_tokens_details.cached_tokens
        assert cached >= (first.usage.total_tokens - 1) // 16 * 16


def test_nobody_finds_what_is_somebody_elses(tiny_model: Path, tmp_path: Path) -> None:
    keys = {"alice": make_key(), "bob": make_key()}
    path = tmp_path / "keys"
    path.write_text("\n".join(key_line(name, key) for name, key in keys.items()))
    path.chmod(0o600)
    with serving(str(tiny_model), "--api-keys-file", str(path)) as server:
        alice, bob = (
            httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=60)
            for key in keys.values()
        )
        with alice, bob:
            conversation = alice.post("/v1/conversations", json={}).json()["id"]
            body: Json = {"input": "Hello", "max_output_tokens": 4, "conversation": conversation}
            response = alice.post("/v1/responses", json=body).json()["id"]
            item = alice.get(f"/v1/conversations/{conversation}/items").json()["data"][0]["id"]
            names = {"/v1/responses/": response, "/v1/conversations/": conversation}
            tried = 0
            for template, methods in bob.get("/openapi.json").json()["paths"].items():
                prefix = next((p for p in names if template.startswith(p)), None)
                if prefix is None or "{" not in template:
                    continue
                target = template.replace("{id}", names[prefix]).replace("{item_id}", item)
                for method in methods:
                    sent: Json = {"items": [{"role": "user", "content": "x"}]}
                    answer = bob.request(method, target, json=sent if method == "post" else None)
                    assert answer.status_code == 404, f"{method} {target}: {answer.text}"
                    tried += 1
            assert tried == 11
            for body in (
                {"input": "x", "conversation": conversation},
                {"input": "x", "previous_response_id": response},
            ):
                assert bob.post("/v1/responses", json=body).status_code == 404
            assert alice.get(f"/v1/responses/{response}").status_code == 200
            assert len(alice.get(f"/v1/conversations/{conversation}/items").json()["data"]) == 2
