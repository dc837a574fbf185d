"""/v1/inspect on real servers: what is told, what is refused, who may look, and what ends it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.inspect import token_list
from server.api.inspect_bodies import MAX_RECOMPUTED
from server.inspections import MAX_OF_ALL, MAX_OF_OWNER
from server.owners import key_line, make_key
from tests.fixtures.server import Server, serving, wait_until
from tests.server.text.small_tokenizers import from_metadata, sentencepiece_metadata

TEXT = "Sarah fed the cat because it"
LAYERS, HEADS, KV_HEADS, HIDDEN, VOCAB = 2, 4, 2, 64, 512  # of the tiny models
Json = dict[str, Any]


def post(server: Server, name: str, **fields: Any) -> httpx.Response:
    url = f"{server.url}/v1/inspect/{name}"
    return httpx.post(url, json=fields, timeout=110, headers=server.headers)


def found(server: Server, name: str, **fields: Any) -> Json:
    response = post(server, name, **fields)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def ids(count: int) -> list[int]:
    return [3 + i * 7 % 500 for i in range(count)]


# ----------------------------------------------------------------------------------- tokens


def test_tokens_are_the_bytes_of_the_text(tiny_server: Server) -> None:
    text = "naïve café 日本語 😀 漢字 <|im_end|> fed"
    answer = found(tiny_server, "tokens", text=text)
    data = text.encode()
    assert answer["rendered"] == text
    assert b"".join(bytes(token["bytes"]) for token in answer["tokens"]) == data
    for token in answer["tokens"]:
        assert data[token["start"] : token["end"]] == bytes(token["bytes"])
    assert [t["text"] for t in answer["tokens"] if t["special"]] == ["<|im_end|>"]
    assert answer["count"] == len(answer["tokens"])
    assert answer["room"] == answer["max_model_len"] - answer["count"]
    halves = [t for t in answer["tokens"] if t["text"] == "\ufffd"]
    assert halves and all(len(t["bytes"]) < 4 for t in halves)


def test_tokens_of_messages_are_those_of_the_template(tiny_server: Server) -> None:
    messages = [{"role": "user", "content": "Is <|im_end|> the end?"}]
    answer = found(tiny_server, "tokens", messages=messages)
    assert answer["rendered"] == (
        "<|im_start|>user\nIs <|im_end|> the end?<|im_end|>\n<|im_start|>assistant\n"
    )
    # What a person writes is never a control token.
    assert [t["text"] for t in answer["tokens"] if t["special"]] == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]
    listed = httpx.post(f"{tiny_server.url}/tokenize", json={"messages": messages}).json()
    assert [t["id"] for t in answer["tokens"]] == listed["tokens"]
    forward = found(tiny_server, "forward", messages=messages, top_k=1)
    assert forward["tokens"] == answer["tokens"]


def test_the_place_of_a_token_whose_space_is_not_in_the_text() -> None:
    """SentencePiece puts a space in front of a text, and takes it away again."""
    tokenizer = from_metadata(sentencepiece_metadata())
    listed = token_list(tokenizer, tokenizer.encode("hello world"))
    data = tokenizer.decode([one["id"] for one in listed]).encode()
    assert listed[0]["start"] == 0 and listed[-1]["end"] == len(data)
    for one in listed[1:]:
        assert data[one["start"] : one["end"]] == bytes(one["bytes"])


def test_no_tokens_are_an_answer_too(tiny_server: Server) -> None:
    answer = found(tiny_server, "tokens", text="")
    assert answer["tokens"] == [] and answer["rendered"] == ""


# ---------------------------------------------------------------------------------- forward


def test_the_shapes_of_six_tokens(tiny_server: Server) -> None:
    answer = found(tiny_server, "forward", token_ids=ids(6))
    assert answer["shapes"] == {
        "input_ids": [1, 6],
        "hidden": [1, 6, HIDDEN],
        "logits": [1, 6, VOCAB],
    }
    assert [token["id"] for token in answer["tokens"]] == ids(6)
    assert [p["position"] for p in answer["positions"]] == list(range(6))
    assert [p["id"] for p in answer["positions"]] == ids(6)
    assert "layers" not in answer


def test_forward_says_what_the_sampler_says(tiny_server: Server) -> None:
    """Position by position, against the log-probabilities of a completion of the same tokens."""
    given = ids(150)
    scored = httpx.post(
        f"{tiny_server.url}/v1/completions",
        json={"prompt": given, "max_tokens": 1, "echo": True, "logprobs": 8, "temperature": 0},
        timeout=60,
    ).json()["choices"][0]["logprobs"]
    answer = found(tiny_server, "forward", token_ids=given, top_k=8)
    for i, position in enumerate(answer["positions"]):
        top = position["top"]
        # The last one is the drawn token's; pieces that look alike are one entry there.
        expected = list(scored["top_logprobs"][i + 1].items())
        if len({one["text"] for one in top}) == len(top):
            assert [one["text"] for one in top] == [text for text, _ in expected]
            for one, (_, logprob) in zip(top, expected, strict=True):
                assert math.log(one["prob"]) == pytest.approx(logprob, abs=1e-3)
        for one, other in itertools.pairwise(top):
            assert one["logit"] >= other["logit"]
            gap = math.log(one["prob"]) - math.log(other["prob"])
            assert gap == pytest.approx(one["logit"] - other["logit"], abs=1e-3)
        assert 0 <= position["entropy"] <= math.log(VOCAB)
        if i + 1 == len(given):
            assert position["next"] is None
            continue
        following = position["next"]
        assert following["id"] == given[i + 1]
        assert following["logprob"] == pytest.approx(scored["token_logprobs"][i + 1], abs=1e-3)
        assert math.log(following["prob"]) == pytest.approx(following["logprob"])
        ranked = [one["id"] for one in top]
        if following["id"] in ranked:
            assert following["rank"] == ranked.index(following["id"]) + 1
        else:
            assert following["rank"] > len(ranked)


def test_layers(tiny_server: Server) -> None:
    answer = found(tiny_server, "forward", token_ids=ids(100), top_k=1, layers="all")
    assert [layer["layer"] for layer in answer["layers"]] == list(range(LAYERS))
    for layer in answer["layers"]:
        assert len(layer["lens"]) == 100
        assert {len(norms) for norms in layer["norms"].values()} == {100}
    # The last layer is what the model says.
    last = [one["id"] for one in answer["layers"][-1]["lens"]]
    assert last == [position["top"][0]["id"] for position in answer["positions"]]
    one = found(tiny_server, "forward", token_ids=ids(100), top_k=1, layers=[1, 1])
    assert one["layers"] == answer["layers"][1:]


# -------------------------------------------------------------------------------- attention


def test_attention(tiny_server: Server) -> None:
    answer = found(tiny_server, "attention", text=TEXT, layer=1)
    count = len(answer["tokens"])
    assert (answer["layer"], answer["heads"]) == (1, list(range(HEADS)))
    assert answer["queries"] == list(range(count))
    for name in ("scores", "weights", "values_share"):
        assert [[len(row) for row in head] for head in answer[name]] == [
            list(range(1, count + 1))
        ] * HEADS
    for rows in answer["weights"] + answer["values_share"]:
        assert all(abs(sum(row) - 1) < 1e-5 for row in rows)
    for scores, weights in zip(answer["scores"], answer["weights"], strict=True):
        for row, expected in zip(scores, weights, strict=True):
            powers = [math.exp(score - max(row)) for score in row]
            assert [p / sum(powers) for p in powers] == pytest.approx(expected, abs=1e-5)
    one = found(tiny_server, "attention", text=TEXT, layer=1, head=2, queries=[4, 0, 4])
    assert (one["heads"], one["queries"]) == ([2], [0, 4])
    assert one["weights"] == [[answer["weights"][2][0], answer["weights"][2][4]]]


# ------------------------------------------------------------------------- cache, and model


def test_with_and_without_the_cache(tiny_server: Server) -> None:
    answer = found(tiny_server, "kv-cache", text=TEXT, max_tokens=60)
    assert answer["tokens_equal"] is True and answer["tokens"] == 60
    for name in ("with_cache", "without_cache"):
        clock = answer[name]
        assert clock["seconds"] * clock["tokens_per_s"] == pytest.approx(60)
    ratio = answer["without_cache"]["seconds"] / answer["with_cache"]["seconds"]
    assert answer["speedup"] == pytest.approx(ratio)
    # It is what a greedy completion says.
    said = httpx.post(
        f"{tiny_server.url}/v1/completions",
        json={"prompt": TEXT, "max_tokens": 60, "temperature": 0, "ignore_eos": True},
        timeout=60,
    ).json()
    assert answer["prompt_tokens"] == said["usage"]["prompt_tokens"]
    spoken = answer["text"]
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        spoken = spoken.replace(special, "")
    assert spoken == said["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.e2e
def test_what_the_cache_is_worth(default_server: Server) -> None:
    messages = [{"role": "user", "content": "Why do rivers bend? " * 3}]
    speedups = []
    for _ in range(3):  # others may have had the cores for a while
        answer = found(default_server, "kv-cache", messages=messages, max_tokens=100)
        assert answer["tokens_equal"]
        speedups.append(answer["speedup"])
        if speedups[-1] >= 8:
            return
    raise AssertionError(f"{speedups} times as fast; expected 8")


def test_the_model(tiny_server: Server) -> None:
    answer = httpx.get(f"{tiny_server.url}/v1/inspect/model").json()
    assert (answer["blocks"], answer["heads"], answer["kv_heads"]) == (LAYERS, HEADS, KV_HEADS)
    assert (answer["hidden"], answer["vocabulary"]) == (HIDDEN, VOCAB)
    parameters = answer["parameters"]
    total = parameters.pop("total")
    assert sum(parameters.values()) == total
    matrices = {name: rows * cols for name, (rows, cols) in answer["projections"].items()}
    attention = sum(matrices[name] for name in ("q", "k", "v", "output"))
    assert parameters["attention"] == LAYERS * attention
    feed_forward = sum(matrices[name] for name in ("gate", "up", "down"))
    assert parameters["feed_forward"] == LAYERS * feed_forward
    assert parameters["embedding"] == parameters["lm_head"] == HIDDEN * VOCAB
    assert answer["tied_embeddings"] is False
    assert parameters["norms"] == (2 * LAYERS + 1) * HIDDEN
    card = httpx.get(f"{tiny_server.url}/v1/models").json()["data"][0]
    assert answer["fingerprint"] == card["fingerprint"] and answer["kernels"] == card["ops"]
    kv_bytes = 2 if "bfloat16" in answer["kv_layout"] else 4
    dim = answer["head_dim"]
    assert answer["kv_bytes_per_token"] == 2 * LAYERS * KV_HEADS * dim * kv_bytes


# ------------------------------------------------------------------------------------ limits

MESSAGE = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("attention", {"token_ids": ids(512), "layer": 1, "head": 3}),
        ("attention", {"token_ids": ids(386), "layer": 0, "head": "all"}),  # 298,764 values
        ("forward", {"token_ids": ids(4096), "top_k": 1}),
        ("forward", {"token_ids": ids(512), "layers": "all", "top_k": 50}),
        ("kv-cache", {"text": "a", "max_tokens": 256}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_edge_of_a_limit(wide_server: Server, name: str, body: Json) -> None:
    found(wide_server, name, **body)


@pytest.mark.parametrize(
    ("name", "body", "param", "said"),
    [
        ("attention", {"token_ids": ids(513), "layer": 1, "head": 3}, "token_ids", "at most 512"),
        ("attention", {"text": "a b c d " * 200, "layer": 1, "head": 3}, "text", "at most 512"),
        ("attention", {"token_ids": ids(387), "layer": 0}, "queries", "300312 values"),
        ("attention", {"text": TEXT, "layer": LAYERS}, "layer", "from 0 to 1"),
        ("attention", {"text": TEXT, "layer": 0, "head": HEADS}, "head", "from 0 to 3"),
        ("attention", {"text": TEXT, "layer": 0, "head": "some"}, "head", "all"),
        ("attention", {"token_ids": [5], "layer": 0, "queries": [1]}, "queries", "from 0 to 0"),
        ("attention", {"token_ids": [5], "layer": 0, "queries": []}, "queries", "at least 1"),
        ("attention", {"text": TEXT}, "layer", "required"),
        ("forward", {"token_ids": ids(4097)}, "token_ids", "at most 4096"),
        ("forward", {"text": "a b c d " * 2000}, "text", "4096 tokens"),
        ("forward", {"token_ids": ids(513), "layers": [0]}, "token_ids", "at most 512"),
        ("forward", {"text": TEXT, "layers": [LAYERS]}, "layers", "from 0 to 1"),
        ("forward", {"text": TEXT, "layers": [-1]}, "layers.0", "greater"),
        ("forward", {"text": TEXT, "layers": "some"}, "layers", "all"),
        ("forward", {"text": TEXT, "top_k": 0}, "top_k", "greater"),
        ("forward", {"text": TEXT, "top_k": 51}, "top_k", "less"),
        ("forward", {"token_ids": [VOCAB]}, "token_ids", "ids go to 511"),
        ("forward", {"token_ids": [-1]}, "token_ids.0", "greater"),
        ("forward", {"token_ids": []}, "token_ids", "at least 1"),
        ("forward", {"text": ""}, "text", "no tokens"),
        ("forward", {}, "text", "either"),
        ("forward", {"text": TEXT, "messages": MESSAGE}, "text", "either"),
        ("forward", {"text": TEXT, "token_ids": [1]}, "token_ids", "one of"),
        ("forward", {"text": TEXT, "stream": True}, "stream", "not permitted"),
        ("kv-cache", {"text": "a", "max_tokens": 257}, "max_tokens", "256"),
        ("kv-cache", {"text": "a", "max_tokens": 0}, "max_tokens", "greater"),
        ("kv-cache", {"token_ids": [1]}, "token_ids", "not permitted"),
        (
            "kv-cache",
            {"text": "a b c d " * 200, "max_tokens": 256},
            "max_tokens",
            str(MAX_RECOMPUTED),
        ),
        ("tokens", {"text": "a", "token_ids": [1]}, "token_ids", "not permitted"),
        ("tokens", {}, "text", "either"),
        ("tokens", {"messages": []}, "messages", "at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_beyond_a_limit(wide_server: Server, name: str, body: Json, param: str, said: str) -> None:
    response = post(wide_server, name, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"], error


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("forward", {"token_ids": ids(513)}),
        ("attention", {"text": "a b c d " * 200, "layer": 0}),
        ("kv-cache", {"text": "a b c d " * 60, "max_tokens": 256}),
    ],
)
def test_beyond_the_context(tiny_server: Server, name: str, body: Json) -> None:
    response = post(tiny_server, name, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded" and "512 tokens" in error["message"]


# --------------------------------------------------------------------------- beside requests


def test_a_stream_goes_on_beside_it(tiny_server: Server) -> None:
    """With the same words, and both get to their end."""
    body = {"prompt": TEXT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    url = f"{tiny_server.url}/v1/completions"

    def answered() -> str:
        return str(httpx.post(url, json=body, timeout=100).json()["choices"][0]["text"])

    alone = answered()
    with ThreadPoolExecutor(3) as pool:
        looking = pool.submit(found, tiny_server, "kv-cache", text=TEXT, max_tokens=200)
        layers = pool.submit(found, tiny_server, "forward", token_ids=ids(500), layers="all")
        assert pool.submit(answered).result() == alone
        assert looking.result()["tokens_equal"]
        assert len(layers.result()["positions"]) == 500
    tiny_server.wait_idle()


def test_the_prefix_cache_does_not_see_it(tiny_server: Server) -> None:
    body = {"prompt": ids(200), "max_tokens": 1, "seed": 1}
    url = f"{tiny_server.url}/v1/completions"
    httpx.post(url, json=body)
    tiny_server.wait_idle()
    names = ("free", "cached", "referenced")

    def blocks() -> list[float]:
        return [tiny_server.metric("headwater_blocks", state=s, tier="device") for s in names]

    before = blocks()
    fresh = [id_ + 1 for id_ in ids(200)]
    found(tiny_server, "forward", token_ids=fresh, layers=[0])
    found(tiny_server, "attention", token_ids=fresh, layer=0, head=0)
    found(tiny_server, "kv-cache", text=TEXT, max_tokens=20)
    assert blocks() == before
    again = httpx.post(url, json=body).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] == 192  # what was there still is
    first = httpx.post(url, json={**body, "prompt": fresh}).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0  # and nothing was put beside it


# --------------------------------------------------------- one at a time, leaving, and dying

OWNERS = {name: make_key() for name in ("ada", "bob", "cleo", "dan", "eve")}


@pytest.fixture(scope="module")
def guarded(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of five owners, with a context of 4096 tokens."""
    assert len(OWNERS) > MAX_OF_ALL // MAX_OF_OWNER
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(key_line(name, key) for name, key in OWNERS.items()))
    keys.chmod(0o600)
    # With the native kernels the longest inspection that is allowed takes less than a second.
    options = ("--ops", "reference", "--api-keys-file", str(keys))
    with serving(str(wide_model), *options) as server:
        server.headers = {"authorization": f"Bearer {OWNERS['ada']}"}
        yield server


@pytest.fixture(scope="module")
def http(guarded: Server) -> Iterator[httpx.Client]:
    """One for all threads: to make a client takes longer than to ask."""
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        yield client


def look(http: httpx.Client, owner: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {OWNERS[owner]}"}
    return http.post("/v1/inspect/forward", json={"text": TEXT}, headers=headers)


def codes(responses: list[httpx.Response]) -> Counter[str]:
    return Counter(
        "ok" if one.status_code == 200 else one.json()["error"]["code"] for one in responses
    )


LONG: Json = {"text": "a b c d " * 170, "max_tokens": 256}  # some seconds, alone


@contextlib.contextmanager
def running(server: Server, owner: str) -> Iterator[socket.socket]:
    """A long inspection that is in the server's hands; its client leaves at the end."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG).encode()
    head = (
        "POST /v1/inspect/kv-cache HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        f"\r\nAuthorization: Bearer {OWNERS[owner]}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=100) as sock:
        sock.sendall(head.encode() + body)
        yield sock


def whole_answer(sock: socket.socket) -> str:
    """Status, headers and body of the answer that comes, in however many pieces."""
    answer = HTTPResponse(sock)
    answer.begin()
    return f"HTTP/1.1 {answer.status}\n{answer.headers}{answer.read().decode()}"


def behind(
    pool: ThreadPoolExecutor, http: httpx.Client, owner: str, seconds: float
) -> Future[httpx.Response]:
    """An inspection that waits for the one that runs: it has no answer after that time."""
    asked = pool.submit(look, http, owner)
    while wait([asked], timeout=seconds).done:  # the long one is not in yet
        assert codes([asked.result()]) == {"ok": 1}
        asked = pool.submit(look, http, owner)
    return asked


def crowd(pool: ThreadPoolExecutor, http: httpx.Client) -> list[Future[httpx.Response]]:
    """While ada's long one runs: as many as there is room for, and they are in when this
    returns."""
    owners = list(OWNERS)[: MAX_OF_ALL // MAX_OF_OWNER]
    each = [owner for owner in owners for _ in range(MAX_OF_OWNER + 1)]
    each.remove("ada")  # the long one is hers
    first = behind(pool, http, each.pop(), 1)
    asked = [first, *(pool.submit(look, http, owner) for owner in each)]
    wait_until(lambda: sum(one.done() for one in asked) == len(owners), 60, "no refusals")
    refused = [one.result() for one in asked if one.done()]
    assert codes(refused) == {"rate_limited": len(refused)}
    for one in refused:
        assert one.status_code == 429 and int(one.headers["retry-after"]) >= 1
        assert "one runs at a time" in one.json()["error"]["message"]
    return [one for one in asked if not one.done()]


def test_too_many_are_refused_and_the_others_have_their_turn(
    guarded: Server, http: httpx.Client
) -> None:
    with ThreadPoolExecutor(32) as pool:
        with running(guarded, "ada"):
            waiting = crowd(pool, http)
            full = look(http, "eve")
            assert not any(one.done() for one in waiting)
        assert full.status_code == 503 and full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        assert codes([one.result() for one in waiting]) == {"ok": MAX_OF_ALL - 1}
    assert look(http, "eve").status_code == 200


@pytest.mark.alone
def test_a_client_that_leaves_ends_it(guarded: Server, http: httpx.Client) -> None:
    size = found(guarded, "tokens", text=LONG["text"])["count"]
    assert MAX_RECOMPUTED * 0.9 < size * 256 + 256 * 255 / 2 <= MAX_RECOMPUTED
    begun = time.monotonic()
    found(guarded, "kv-cache", **{**LONG, "max_tokens": 32})
    an_eighth = time.monotonic() - begun
    with ThreadPoolExecutor(1) as pool:
        with running(guarded, "bob"):
            waiting = behind(pool, http, "cleo", an_eighth)
        left = time.monotonic()
        assert waiting.result().status_code == 200
        assert time.monotonic() - left < 4 * an_eighth  # of the seven eighths that were left


def test_it_ends_with_the_engine(guarded: Server, http: httpx.Client) -> None:
    with ThreadPoolExecutor(32) as pool, running(guarded, "ada") as sock:
        waiting = crowd(pool, http)
        guarded.engine.kill()
        answers = [one.result() for one in waiting]
        told = whole_answer(sock)
    assert told.startswith("HTTP/1.1 503") and "retry-after: 2" in told
    assert "the engine died while it computed this; try again" in told
    assert codes(answers) == {"engine_restarting": MAX_OF_ALL - 1}
    for one in answers:
        assert one.status_code == 503 and int(one.headers["retry-after"]) >= 1
    wait_until(lambda: look(http, "eve").status_code == 200, 60, "no engine is back")


def test_a_key_is_needed(guarded: Server) -> None:
    for name in ("tokens", "forward", "attention", "kv-cache"):
        response = httpx.post(f"{guarded.url}/v1/inspect/{name}", json={"text": TEXT, "layer": 0})
        assert response.status_code == 401
    assert httpx.get(f"{guarded.url}/v1/inspect/model").status_code == 401


def test_it_ends_with_the_server(guarded: Server, http: httpx.Client) -> None:
    """The last one here: nothing is left of the server."""
    with ThreadPoolExecutor(1) as pool, running(guarded, "ada") as sock:
        waiting = behind(pool, http, "bob", 1)
        guarded.process.terminate()
        told = whole_answer(sock)
        assert codes([waiting.result()]) == {"server_draining": 1}
    assert told.startswith("HTTP/1.1 503") and "server_draining" in told
    assert guarded.process.wait(15) == 0
