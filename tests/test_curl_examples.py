"""The scripts in clients/curl: each is run against a real server, and each route has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.server import Server

FOLDER = Path(__file__).resolve().parents[1] / "clients" / "curl"
SCRIPTS = sorted(FOLDER.glob("*.sh"))

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def document(output: str) -> dict[str, Any]:
    """The one JSON object of an output."""
    assert output.endswith("}\n"), "a person's prompt would stand behind the answer"
    value = json.loads(output)
    assert isinstance(value, dict)
    return value


def chunks(output: str) -> list[dict[str, Any]]:
    """The JSON of each frame of a stream that ends as it should."""
    *frames, last, rest = output.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    lines = [f for f in frames if not f.startswith(":")]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def answer(output: str, *, kind: str = "chat.completion", choices: int = 1) -> dict[str, Any]:
    """A whole answer of the given object type, with that many finished choices."""
    body = document(output)
    assert body["object"] == kind
    assert [choice["index"] for choice in body["choices"]] == list(range(choices))
    assert all(choice["finish_reason"] in ("stop", "length") for choice in body["choices"])
    counts = body["usage"]
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
    assert counts["prompt_tokens"] > 0
    return body


# --------------------------------------------------------------- what each script must print


def check_chat(output: str) -> None:
    body = answer(output)
    assert 0 < body["usage"]["completion_tokens"] <= 64
    assert body["choices"][0]["message"]["role"] == "assistant"


def check_chat_stream(output: str) -> None:
    parts = chunks(output)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [c["finish_reason"] for part in parts for c in part["choices"]]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] > 0


def check_chat_choices(output: str) -> None:
    body = answer(output, choices=3)
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3


def check_chat_continue(output: str) -> None:
    body = answer(output)
    assert not body["choices"][0]["message"]["content"].startswith("Rivers bend")


def check_chat_logprobs(output: str) -> None:
    body = answer(output)
    entries = body["choices"][0]["logprobs"]["content"]
    assert 0 < len(entries) <= 4
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0  # it is greedy


def check_chat_seed(output: str) -> None:
    first, second = (json.loads(line)["choices"][0] for line in output.splitlines())
    assert first == second and first["message"]["content"]


def check_chat_stop(output: str) -> None:
    assert "e" not in answer(output)["choices"][0]["message"]["content"]


def check_completions(output: str) -> None:
    choice = answer(output, kind="text_completion")["choices"][0]
    assert choice["text"] or choice["finish_reason"] == "stop"  # it may end at once


def check_completions_stream(output: str) -> None:
    parts = chunks(output)
    assert {part["object"] for part in parts} == {"text_completion"}
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) <= {None}
    assert "".join(part["choices"][0]["text"] for part in parts) or reasons[-1] == "stop"


def check_completions_score(output: str) -> None:
    body = answer(output, kind="text_completion")
    choice, scores = body["choices"][0], body["choices"][0]["logprobs"]
    assert choice["text"] == "Sarah fed the cat because it was hungry"
    assert body["usage"]["completion_tokens"] == 0
    first, *others = scores["token_logprobs"]
    assert first is None and len(others) == body["usage"]["prompt_tokens"] - 1
    assert all(value <= 0 for value in others)


def check_completions_batch(output: str) -> None:
    assert answer(output, kind="text_completion", choices=2)["usage"]["prompt_tokens"] == 8


def events(output: str) -> list[tuple[int, str, dict[str, Any]]]:
    """(id, name, data) of the events of a stream that have an id."""
    found = re.findall(r"^id: (\d+)\nevent: (\w+)\ndata: (.+)$", output, re.MULTILINE)
    return [(int(number), name, json.loads(data)) for number, name, data in found]


def check_session(output: str) -> None:
    body = document(output)
    assert body["object"] == "session" and body["generating"] is None
    assert [turn["role"] for turn in body["turns"]] == ["user", "assistant"] * 2
    assert body["head"] == body["turns"][-1]["id"]


def check_session_stream(output: str) -> None:
    found = events(output)
    assert [name for _, name, _ in found][:1] == ["start"]
    assert found[-1][1] == "done" and found[-1][2]["finish_reason"] in ("stop", "length")


def check_session_branches(output: str) -> None:
    body = document(output)
    question, first, second = body["turns"]
    assert first["parent"] == second["parent"] == question["id"]
    assert body["head"] == first["id"]


def check_session_fork(output: str) -> None:
    body = document(output)
    assert body["status"] == "complete" and body["num_tokens"] >= 6


def check_session_cancel(output: str) -> None:
    body = document(output)
    assert body["object"] == "generation" and body["finish_reason"] == "abort"


def check_session_cache(output: str) -> None:
    body = document(output)
    assert sum(body["tiers"].values()) == body["tokens"] > 0


def check_session_export(output: str) -> None:
    assert document(output)["object"] == "session"


def check_session_delete(output: str) -> None:
    assert document(output)["object"] == "list"


def check_stream_resume(output: str) -> None:
    found = events(output)
    assert found[0][0] > 3 and found[-1][1] == "done"


def check_stream_cancel(output: str) -> None:
    assert document(output)["object"] == "generation"


def objects(output: str) -> list[dict[str, Any]]:
    """JSON objects, one a line."""
    assert output.endswith("}\n")
    return [json.loads(line) for line in output.splitlines()]


def named_events(output: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream without ids."""
    text = re.sub(r"^: .*\n", "", output, flags=re.MULTILINE)
    return [
        (name, json.loads(data))
        for name, data in re.findall(r"^event: (\S+)\ndata: (\{.*\})\n$", text, re.MULTILINE)
    ]


def check_response(output: str) -> None:
    second, items, *deleted = objects(output)
    assert second["object"] == "response" and second["previous_response_id"]
    assert [item["content"][0]["text"] for item in items["data"]] == ["And why do they flood?"]
    assert [one["deleted"] for one in deleted] == [True, True]


def check_response_stream(output: str) -> None:
    found = named_events(output)
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    assert found[0][0] == "response.created"
    assert found[-1][0] in ("response.completed", "response.incomplete")


def check_response_background(output: str) -> None:
    stream, _, last = output.rstrip("\n").rpartition("\n")
    found = named_events(stream + "\n\n")
    assert [event["sequence_number"] for _, event in found] == list(range(3, len(found) + 3))
    assert json.loads(last)["id"] == found[-1][1]["response"]["id"]


def check_conversation(output: str) -> None:
    item, left, items, conversation, deleted = objects(output)
    assert item["content"][0]["text"] == "I like rivers."
    assert left["id"] == conversation["id"] == deleted["id"] and deleted["deleted"]
    assert [one["role"] for one in items["data"]] == ["assistant", "user", "user"]
    assert conversation["metadata"] == {"topic": "rivers"}


def check_message(output: str) -> None:
    body = document(output)
    assert body["type"] == "message" and body["usage"]["output_tokens"] > 0


def check_message_stream(output: str) -> None:
    names = [name for name, _ in named_events(output)]
    assert names[0] == "message_start" and names[-1] == "message_stop"


def check_message_count(output: str) -> None:
    assert document(output)["input_tokens"] > 0


def check_response_count(output: str) -> None:
    body = document(output)
    assert body["object"] == "response.input_tokens" and body["input_tokens"] > 0


def check_models(output: str) -> None:
    body = document(output)
    assert body["object"] == "list" and len(body["data"]) == 1
    assert body["data"][0]["max_model_len"] > 0


def check_model(output: str) -> None:
    assert document(output)["object"] == "model"


def check_tokenize(output: str) -> None:
    body = document(output)
    assert len(body["tokens"]) == len(body["pieces"]) == body["count"] > 0
    assert "".join(body["pieces"]) == "Why do rivers bend?"


def check_tokenize_messages(output: str) -> None:
    text = "".join(document(output)["pieces"])
    assert "Why do rivers bend?" in text and text != "Why do rivers bend?"


def check_detokenize(output: str) -> None:
    body = document(output)
    assert body["count"] == 8 and body["text"]


def check_inspect_tokens(output: str) -> None:
    body = document(output)
    assert "".join(token["text"] for token in body["tokens"]) == body["rendered"]


def check_inspect_forward(output: str) -> None:
    body = document(output)
    assert len(body["positions"]) == len(body["tokens"]) and len(body["layers"]) == 2


def check_inspect_attention(output: str) -> None:
    weights = document(output)["weights"]
    assert all(abs(sum(row) - 1) < 1e-5 for head in weights for row in head)


def check_inspect_kv_cache(output: str) -> None:
    body = document(output)
    assert body["tokens_equal"] and body["tokens"] == 20


def check_inspect_model(output: str) -> None:
    assert document(output)["blocks"] > 0


def check_health(output: str) -> None:
    assert document(output) == {"status": "ok"}


def check_ready(output: str) -> None:
    assert document(output)["status"] == "ready"


def check_metrics(output: str) -> None:
    assert re.search(r"^headwater_engine_up 1\.0$", output, re.MULTILINE)


def check_version(output: str) -> None:
    assert set(document(output)) == {"version", "model"}


def check_sign_in(output: str) -> None:
    signed_in, models, signed_out = output.splitlines()
    assert (signed_in, signed_out) == ("204", "204")
    assert json.loads(models)["object"] == "list"


def checker(script: Path) -> Callable[[str], None] | None:
    """chat-stream.sh -> check_chat_stream."""
    found: Callable[[str], None] | None = globals().get(f"check_{script.stem.replace('-', '_')}")
    return found


# ------------------------------------------------------------------------------------ tests


def test_every_check_has_its_script() -> None:
    scripts = {f"check_{script.stem.replace('-', '_')}" for script in SCRIPTS}
    assert scripts == {name for name in globals() if name.startswith("check_")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example(script: Path, tiny_server: Server) -> None:
    done = subprocess.run(
        [str(script)],
        env={**os.environ, "HEADWATER_URL": tiny_server.url, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    check = checker(script)
    assert check is not None, f"{script.name} has no check in this file"
    check(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_form(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ") and len(lines[1]) <= 100
    assert lines[2] == "set -euo pipefail"
    assert lines[3] == "url=${HEADWATER_URL:-http://127.0.0.1:8000}"
    assert lines[4] == ('key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})')
    calls = [line for line in lines if re.search(r"\bcurl -", line)]
    assert calls and all("-sS --fail-with-body" in line for line in calls)
    assert all('"${key[@]}" "$url/' in line for line in calls)
    assert ('"stream": true' in script.read_text()) == any(" -N " in line for line in calls)
    assert f"({script.name})" in (FOLDER / "README.md").read_text(), "it is not in the README"


def test_an_error_shows_and_fails(tiny_server: Server) -> None:
    script = (FOLDER / "chat.sh").read_text().replace('"max_tokens": 64', '"max_tokens": -1')
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "HEADWATER_URL": tiny_server.url, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 22
    assert json.loads(done.stdout)["error"]["param"] == "max_tokens"


def test_every_route_has_an_example(tiny_server: Server) -> None:
    shown = set()
    for script in SCRIPTS:
        for call in script.read_text().split("curl -sS")[1:]:
            method = re.search(r" -X ([A-Z]+)", call)
            otherwise = "post" if " -d " in call else "get"
            path = re.search(r'"\$url(/[^"?]*)', call)
            assert path, f"{script.name} has a call without a path"
            shown.add((method[1].lower() if method else otherwise, path[1]))
    assert shown
    for path, operations in httpx.get(f"{tiny_server.url}/openapi.json").json()["paths"].items():
        pattern = re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path))
        for method in operations:
            assert any(method == m and pattern.fullmatch(p) for m, p in shown), (
                f"no script in clients/curl shows {method.upper()} {path}"
            )
