"""Hosts and origins: DNS rebinding, requests of foreign pages, CORS."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from server.engine_client import EngineClient
from server.gates import AllowedHosts, CorsGate
from server.metrics import Metrics
from server.middleware import MAX_BODY_BYTES, BodyGate
from server.owners import key_line, make_key
from server.settings import Settings
from tests.fixtures.server import Server, serving

PAGE = "https://page.example"
KEY = make_key()
TOKENIZE = {"text": "river"}


@pytest.fixture(scope="module")
def open_to_page(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, further names, and one origin that may ask."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(key_line("alice", KEY))
    keys.chmod(0o600)
    options = ["--allowed-hosts", "Chat.Example, *.lan", "--api-keys-file", str(keys)]
    with serving(str(tiny_model), *options, env={"HEADWATER_CORS_ORIGINS": PAGE}) as server:
        yield server


def get(server: Server, path: str = "/health", **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers=headers)


def assert_code(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert error["code"] == code
    return str(error["message"])


# ------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.9.9.9:8000",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_loopback_names_are_served(tiny_server: Server, host: str) -> None:
    assert get(tiny_server, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "localhost@evil.example",
        "127.0.0.1, evil.example",
        "[::2]:8000",
        "192.0.2.1:8000",
        "0.0.0.0",
        "2130706433",
        "page.lan",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_a_foreign_host_gets_nothing(tiny_server: Server, host: str, path: str) -> None:
    message = assert_code(get(tiny_server, path, host=host), 400, "invalid_value")
    assert "HEADWATER_ALLOWED_HOSTS" in message


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
def test_there_must_be_one_host(tiny_server: Server, hosts: list[str]) -> None:
    connection = http.client.HTTPConnection(urlsplit(tiny_server.url).netloc, timeout=10)
    connection.putrequest("GET", "/health", skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("chat.example", 200),
        ("CHAT.example:8443", 200),
        ("a.lan", 200),
        ("a.b.lan", 200),
        ("localhost", 200),
        ("lan", 400),
        ("evil-lan", 400),
        ("other.chat.example", 400),
    ],
)
def test_names_that_were_given(open_to_page: Server, host: str, status: int) -> None:
    assert get(open_to_page, host=host).status_code == status


def test_the_host_comes_before_the_key(open_to_page: Server) -> None:
    headers = {"host": "evil.example", "authorization": f"Bearer {KEY}"}
    assert get(open_to_page, "/v1/models", **headers).status_code == 400


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_in_a_container_addresses_are_served_and_foreign_names_are_not(bound: str) -> None:
    # Compose publishes on 127.0.0.1, at any port; a probe asks by the container's own address.
    hosts = AllowedHosts(bound, ())
    for host in ("localhost:8000", "127.0.0.1:8001", "172.17.0.2:8000", "[fd00::2]:8000"):
        assert host in hosts
    for host in ("evil.example", "172.17.0.2.nip.io", "headwater:8000", ""):
        assert host not in hosts
    assert "headwater:8000" in AllowedHosts(bound, ("headwater",))


def test_the_bound_name_and_any_name() -> None:
    assert "box.lan:8000" in AllowedHosts("Box.lan", ())
    assert "192.0.2.7" in AllowedHosts("192.0.2.7", ())
    assert "192.0.2.8" not in AllowedHosts("192.0.2.7", ())
    assert "evil.example" in AllowedHosts("127.0.0.1", ("*",))


# ----------------------------------------------------------------------------------- origins


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "", "https://localhost"]
)
def test_a_foreign_page_changes_nothing(tiny_server: Server, origin: str) -> None:
    # No body: a browser sends this without asking first.
    response = httpx.post(f"{tiny_server.url}/v1/completions", headers={"origin": origin})
    message = assert_code(response, 403, "forbidden")
    assert "HEADWATER_CORS_ORIGINS" in message
    assert "access-control-allow-origin" not in response.headers


def test_our_own_page_and_programs_may(tiny_server: Server) -> None:
    own = tiny_server.url
    for headers in ({}, {"origin": own}, {"origin": own.replace("http:", "https:")}):
        response = httpx.post(f"{tiny_server.url}/tokenize", json=TOKENIZE, headers=headers)
        assert response.status_code == 200


def test_without_origins_there_is_no_cors(tiny_server: Server) -> None:
    response = get(tiny_server, "/v1/models", origin=PAGE)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    asked = httpx.options(
        f"{tiny_server.url}/tokenize",
        headers={"origin": PAGE, "access-control-request-method": "POST"},
    )
    assert asked.status_code == 405


def test_the_page_that_was_named_may_ask(open_to_page: Server) -> None:
    url = f"{open_to_page.url}/tokenize"
    asking = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    asked = httpx.options(url, headers=asking)  # a browser sends no key with this
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    refused = httpx.options(url, headers={**asking, "origin": "https://evil.example"})
    assert "HEADWATER_CORS_ORIGINS" in assert_code(refused, 403, "forbidden")
    assert "access-control-allow-origin" not in refused.headers

    refused = httpx.post(url, json=TOKENIZE, headers={"origin": PAGE})
    assert_code(refused, 401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == PAGE  # so that the page can say why
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    answered = httpx.post(url, json=TOKENIZE, headers=headers)
    assert answered.status_code == 200
    assert answered.headers["access-control-allow-origin"] == PAGE
    exposed = answered.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "request-id", "x-should-retry", "retry-after"} <= set(exposed)
    assert "access-control-allow-credentials" not in answered.headers
    other = httpx.post(url, json=TOKENIZE, headers={**headers, "origin": "https://evil.example"})
    assert_code(other, 403, "forbidden")


@pytest.mark.parametrize(
    ("change", "content", "status"),
    [
        ({"content-type": "text/plain"}, b"x", 415),
        ({}, b" " * (MAX_BODY_BYTES + 1), 413),
        ({"host": "evil.example"}, b"{}", 400),
    ],
)
def test_the_page_that_was_named_may_read_every_refusal(
    open_to_page: Server, change: dict[str, str], content: bytes, status: int
) -> None:
    headers = {"origin": PAGE, "content-type": "application/json", **change}
    response = httpx.post(f"{open_to_page.url}/tokenize", content=content, headers=headers)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["x-request-id"].startswith("req_")


def test_the_page_that_was_named_may_read_what_nobody_thought_of() -> None:
    """A fault in the layers below, which no request to a good server brings about."""
    sent: list[Message] = []

    async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError

    async def send(message: Message) -> None:
        sent.append(message)

    metrics = Metrics(EngineClient())
    app = CorsGate(BodyGate(faulty, metrics), [PAGE], metrics)
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "headers": [(b"origin", PAGE.encode())],
        "state": {"request_id": "req_1"},
    }
    asyncio.run(app(scope, lambda: asyncio.sleep(0, {}), send))
    assert sent[0]["status"] == 500
    assert (b"access-control-allow-origin", PAGE.encode()) in sent[0]["headers"]


# ---------------------------------------------------------------------------------- settings


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_ALLOWED_HOSTS", " A.example ,b.example,")
    monkeypatch.setenv("HEADWATER_CORS_ORIGINS", "https://A.example:8443,http://localhost:5173")
    settings = Settings()
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert settings.cors_origins == ("https://a.example:8443", "http://localhost:5173")


@pytest.mark.parametrize("value", ["http://a.example", "a.example:8000", "a*", "a/b", "*.*.lan"])
def test_a_host_that_cannot_be(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HEADWATER_ALLOWED_HOSTS", value)
    with pytest.raises(ValidationError, match="is not a host"):
        Settings()


@pytest.mark.parametrize("value", ["a.example", "https://", "https://a.example/", "https://u@a"])
def test_an_origin_that_cannot_be(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HEADWATER_CORS_ORIGINS", value)
    with pytest.raises(ValidationError, match="is not an origin"):
        Settings()
