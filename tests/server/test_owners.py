"""API keys and owners: who is let in, what they share, what they may have at a time."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.routing import Route

from model.hub import resolve
from server.app import create_app
from server.errors import AuthenticationError
from server.gates import OPEN_PATHS
from server.owners import Owners, OwnersError, key_line, make_key
from server.page import the_page
from server.settings import Settings
from server.store.store import Store
from tests.fixtures.server import Server, headwater, serving

COMPLETIONS = "/v1/completions"
SECRET = b"s" * 32
KEYS = {name: make_key() for name in ("alice-laptop", "alice-phone", "bob", "carol", "carol-ci")}


def write_keys(path: Path) -> Path:
    lines = [
        "# who may use this server",
        key_line("alice", KEYS["alice-laptop"]) + "  # her laptop",
        key_line("alice", KEYS["alice-phone"]),
        "",
        key_line("bob", KEYS["bob"]),
        key_line("carol", KEYS["carol"], max_concurrent=2),
        key_line("carol", KEYS["carol-ci"]),
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys: it may bind an address that others can reach."""
    keys = write_keys(tmp_path_factory.mktemp("keys") / "keys")
    with serving(str(tiny_model), "--host", "0.0.0.0", "--api-keys-file", str(keys)) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        server.headers = bearer("bob")
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[key]}"}


def complete(server: Server, key: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "Why do rivers bend?", "max_tokens": 2, "seed": 1, **fields}
    return httpx.post(f"{server.url}{COMPLETIONS}", json=body, headers=bearer(key), timeout=60)


def assert_refused(response: httpx.Response) -> str:
    assert response.status_code == 401, response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert error["type"] == "authentication_error"
    if not response.request.url.path.startswith("/v1/messages"):  # Anthropic's shape has no codes
        assert error["code"] == "invalid_api_key"
    return str(error["message"])


# ----------------------------------------------------------------------------- who is let in


def every_route(tiny_model: Path, folder: Path) -> list[tuple[str, str]]:
    """(method, path) of all routes of the app, those that are in no schema as well."""
    with contextlib.closing(Store.open(None, folder)) as store:
        app = create_app(Settings(), resolve(str(tiny_model)), Owners(SECRET), store)
    found = []
    todo: list[Any] = list(app.routes)
    while todo:
        route = todo.pop()
        if isinstance(route, Route) or hasattr(route, "methods"):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            found += [(method, path) for method in route.methods]
        else:
            inner = getattr(route, "routes", None) or route.original_router.routes
            todo += inner
    return found


def test_every_route_but_the_open_ones_needs_a_key(
    tiny_model: Path, tmp_path: Path, guarded: Server
) -> None:
    routes = every_route(tiny_model, tmp_path)
    paths = {path for _, path in routes}
    assert paths > OPEN_PATHS and {"/openapi.json", "/metrics", COMPLETIONS, "/tokenize"} < paths
    answered = {"/v1/login": 400, "/v1/logout": 204, "/": 200 if the_page().find("/") else 404}
    for method, path in routes:
        without = httpx.request(method, f"{guarded.url}{path}")
        if path in OPEN_PATHS or the_page().opens(method, path):
            assert without.status_code == answered.get(path, 200)
        elif method == "HEAD":
            assert without.status_code == 401
        else:
            assert_refused(without)
            within = httpx.request(method, f"{guarded.url}{path}", headers=bearer("alice-phone"))
            assert within.status_code != 401


@pytest.mark.parametrize(
    "target",
    [
        "/%2e%2e/v1/models",
        "/index.html/../v1/models",
        "/assets/../v1/models",
        "/s/../v1/models",
        "/nothing",
        "//v1/models",
        "/health/",
        "/Health",
        "/health;x",
        "/health%2f..%2fv1/models",
        "/health/../v1/models",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/v1/models/../../health/x",
        "http://127.0.0.1/v1/models",
    ],
)
def test_no_spelling_of_a_path_gets_past(guarded: Server, target: str) -> None:
    # http.client sends the target as it is; httpx would tidy it.
    connection = http.client.HTTPConnection(urlsplit(guarded.url).netloc, timeout=10)
    connection.request("GET", target)
    response = connection.getresponse()
    assert response.status == 401
    assert json.loads(response.read())["error"]["code"] == "invalid_api_key"
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        bearer("alice-laptop"),
        {"authorization": f"bearer   {KEYS['alice-laptop']}"},
        {"x-api-key": KEYS["bob"]},
        {"x-api-key": KEYS["bob"], "authorization": "Basic eDp5"},
    ],
)
def test_a_key_is_taken_from_either_header(guarded: Server, headers: dict[str, str]) -> None:
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "needs an API key"),
        ({"authorization": "Bearer"}, "needs an API key"),
        ({"authorization": KEYS["bob"]}, "needs an API key"),
        ({"authorization": f"Basic {KEYS['bob']}"}, "needs an API key"),
        ({"cookie": f"key={KEYS['bob']}"}, "needs an API key"),
        ({"authorization": "Bearer x"}, "not one of this server's"),
        ({"authorization": f"Bearer {KEYS['bob'][:-1]}"}, "not one of this server's"),
        ({"authorization": f"Bearer {KEYS['bob']} {KEYS['bob']}"}, "not one of this server's"),
        ({"authorization": "Bearer x", "x-api-key": KEYS["bob"]}, "not one of this server's"),
        ({"x-api-key": hashlib.sha256(KEYS["bob"].encode()).hexdigest()}, "not one of this"),
        ({"x-api-key": b"\xff\xfe"}, "not one of this server's"),
    ],
)
def test_a_missing_and_a_wrong_key_are_told(
    guarded: Server, headers: dict[str, Any], said: str
) -> None:
    message = assert_refused(httpx.get(f"{guarded.url}/v1/models", headers=headers))
    assert said in message
    assert KEYS["bob"][:-1] not in message


def test_neither_keys_nor_digests_are_in_the_log_but_owners_are(guarded: Server) -> None:
    complete(guarded, "alice-phone")
    httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": "hw-wrong-key"})
    log = guarded.log
    assert '"owner": "alice"' in log
    for key in [*KEYS.values(), "hw-wrong-key"]:
        assert key not in log
        assert hashlib.sha256(key.encode()).hexdigest() not in log


def test_without_keys_a_credential_is_not_looked_at(tiny_server: Server) -> None:
    for headers in ({}, bearer("bob"), {"x-api-key": "anything"}):
        assert httpx.get(f"{tiny_server.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_with_curl_send_a_key(guarded: Server) -> None:
    script = Path(__file__).resolve().parents[2] / "clients" / "curl" / "model.sh"
    env = {**os.environ, "HEADWATER_URL": guarded.url, "no_proxy": "*"}
    for key, code in ((KEYS["alice-phone"], 0), ("wrong", 22)):
        done = subprocess.run(
            [str(script)],
            env={**env, "HEADWATER_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code
        assert ('"object":"model"' in done.stdout) == (code == 0)


def test_bench_sends_a_key(guarded: Server) -> None:
    options = ["--concurrency", "1", "--num-requests", "1", "--max-tokens", "2"]
    for key, code in ((KEYS["bob"], 0), ("wrong", 1)):
        done = subprocess.run(
            [*headwater(), "bench", "--url", guarded.url, *options],
            env={**os.environ, "HEADWATER_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert key not in done.stdout


def test_all_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real, compared = hmac.compare_digest, 0

    def counted(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return real(one, other)

    monkeypatch.setattr("server.owners.hmac.compare_digest", counted)
    names = {f"owner-{i}": f"key-{i}" for i in range(7)}
    owners = Owners(SECRET, [(hashlib.sha256(k.encode()).digest(), n) for n, k in names.items()])
    for name, key in names.items():
        compared = 0
        assert owners.identify([(b"x-api-key", key.encode())]).name == name
        assert compared == 7
    compared = 0
    with pytest.raises(AuthenticationError):
        owners.identify([(b"x-api-key", b"wrong")])
    assert compared == 7


# ------------------------------------------------------------------------ what owners share


def test_owners_share_no_block_and_their_keys_all(guarded: Server) -> None:
    prompt = "The river bends where the bank gives way. " * 8

    def cached_blocks() -> float:
        guarded.wait_idle()
        return guarded.metric("headwater_blocks", state="cached", tier="device")

    def cached_tokens(key: str) -> int:
        usage = complete(guarded, key, prompt=prompt).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    before = cached_blocks()
    assert cached_tokens("alice-laptop") == 0
    of_alice = cached_blocks() - before
    assert of_alice > 2
    assert cached_tokens("bob") == 0
    assert cached_blocks() - before == 2 * of_alice  # the same prompt: none of hers serves him
    assert cached_tokens("alice-phone") > 0
    assert cached_tokens("bob") > 0
    assert cached_blocks() - before == 2 * of_alice


def test_a_body_cannot_name_an_owner(guarded: Server) -> None:
    prompt = "The bank gives way where the river bends. " * 8
    complete(guarded, "alice-laptop", prompt=prompt)
    answer = complete(
        guarded, "carol", prompt=prompt, user="alice", owner="alice", salt="alice", cache_salt=""
    )
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_salt_is_a_function_of_secret_and_owner() -> None:
    def salt(secret: bytes, name: str) -> bytes:
        owners = Owners(secret, [(hashlib.sha256(b"k").digest(), name)])
        return owners.identify([(b"x-api-key", b"k")]).salt

    assert salt(SECRET, "alice") == hmac.new(SECRET, b"alice", hashlib.sha256).digest()
    assert len({salt(SECRET, "alice"), salt(SECRET, "bob"), salt(b"t" * 32, "alice")}) == 3
    assert Owners(SECRET).local.salt == hmac.new(SECRET, b"", hashlib.sha256).digest()
    assert SECRET.decode() not in repr(Owners(SECRET).local)


# ----------------------------------------------------------------------------------- limits


def test_an_owner_has_only_so_many_answers_at_a_time(guarded: Server) -> None:
    complete(guarded, "carol")
    engine = guarded.engine
    body = {"prompt": ["one", "two"], "max_tokens": 3, "stream": True}
    url = f"{guarded.url}{COMPLETIONS}"
    engine.suspend()  # nothing ends until it goes on
    try:
        with httpx.stream("POST", url, json=body, headers=bearer("carol"), timeout=60) as stream:
            assert stream.status_code == 200
            refused = complete(guarded, "carol-ci")  # the limit is the owner's, whatever the key
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
            assert "carol" in error["message"] and "2" in error["message"]
            with httpx.stream(
                "POST", url, json=body, headers=bearer("bob"), timeout=60
            ) as of_another:
                assert of_another.status_code == 200
                engine.resume()
                assert of_another.read().endswith(b"data: [DONE]\n\n")
            assert stream.read().endswith(b"data: [DONE]\n\n")
    finally:
        engine.resume()
    assert complete(guarded, "carol-ci").status_code == 200


def test_more_answers_than_the_limit_are_a_fault_of_the_request(guarded: Server) -> None:
    answer = complete(guarded, "carol", n=3)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert complete(guarded, "carol", n=2).status_code == 200
    assert complete(guarded, "bob", n=3).status_code == 200


# --------------------------------------------------------------------------- the file of keys

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["holds no keys"]),
        ("# nothing\n\n", ["holds no keys"]),
        ("alice", ["line 1", "SHA-256"]),
        (f"alice {DIGEST[:-1]}", ["line 1", "64 hexadecimal"]),
        (f"\n-alice {DIGEST}", ["line 2", "begins with no sign"]),
        (f"{'a' * 65} {DIGEST}", ["line 1", "64 letters"]),
        (f"al:ice {DIGEST}", ["line 1", "letters"]),
        (f"älice {DIGEST}", ["line 1", "letters"]),
        (f"alice {DIGEST} limit=3", ["line 1", "max_concurrent=N"]),
        (f"alice {DIGEST} max_concurrent=0", ["line 1", "N from 1"]),
        (f"alice {DIGEST} max_concurrent=-1", ["line 1", "N from 1"]),
        (f"alice {DIGEST} max_concurrent=2 x", ["line 1", "only max_concurrent"]),
        (f"alice {DIGEST}\nbob {DIGEST.upper()}", ["line 2", "twice"]),
        (
            f"alice {DIGEST} max_concurrent=2\nalice {'cd' * 32} max_concurrent=3",
            ["line 2", "another max_concurrent"],
        ),
        (f"alice\nbob\ncarol {DIGEST}", ["line 1", "line 2"]),
    ],
)
def test_a_fault_in_the_file_is_told_with_its_line(
    tmp_path: Path, text: str, faults: list[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(OwnersError) as caught:
        Owners.load(path, SECRET)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert all(fault in str(caught.value) for fault in faults)
    assert len(lines) == max(1, sum(fault.startswith("line") for fault in faults))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * ((1 << 20) + 1)])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(OwnersError, match="is this the file of API keys"):
        Owners.load(path, SECRET)


def test_what_may_be_a_key_is_not_repeated(tmp_path: Path) -> None:
    key = make_key()
    for text in (key, f"alice {key}", f"{key} alice", f"alice {DIGEST} {key}", f"/{key} {DIGEST}"):
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(OwnersError) as caught:
            Owners.load(path, SECRET)
        assert key not in str(caught.value)


def test_a_file_that_everybody_can_read_is_told(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys")
    assert Owners.load(path, SECRET).warning is None
    path.chmod(0o644)
    warning = Owners.load(path, SECRET).warning
    assert warning is not None and str(path) in warning and "chmod 600" in warning


def test_the_command_makes_a_key_that_is_let_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    seen = set()
    for name in ("alice", "bob"):
        done = subprocess.run(
            [*headwater(), "key", name, "--max-concurrent", "3"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
        key = done.stdout.removesuffix("\n")
        assert re.fullmatch(r"hw-[\w-]{43}", key)
        assert key not in done.stderr
        with path.open("a") as file:  # as `2>> keys` would
            file.write(done.stderr)
        owner = Owners.load(path, SECRET).identify([(b"x-api-key", key.encode())])
        assert (owner.name, owner.max_concurrent) == (name, 3)
        seen.add(key)
    assert len(seen) == 2


def test_the_command_refuses_a_name_that_the_file_cannot_hold() -> None:
    done = subprocess.run([*headwater(), "key", "a b"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("headwater: ") and "'a b'" in done.stderr


@pytest.mark.parametrize("name", ["missing", "."])
def test_the_server_does_not_start_without_the_keys_it_was_told_of(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    options = ["--data", str(tmp_path / "data"), "--api-keys-file", str(tmp_path / name)]
    done = subprocess.run(
        [*headwater(), "serve", str(tiny_model), "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "--api-keys-file" in done.stderr
