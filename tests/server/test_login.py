"""Signing in: a key once, then a cookie; what it is, what it opens, how it ends."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import AuthenticationError
from server.owners import Owners, key_line, make_key
from server.page import BUILT
from server.sign_ins import LIFETIME, SignIns
from tests.fixtures.server import Server, serving

KEYS = {name: make_key() for name in ("alice-laptop", "alice-phone", "bob")}
SECRET = b"s" * 32
FOREIGN = "https://evil.example"
LISTED = "https://page.example"


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, and an origin whose pages may ask with one."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("\n".join(key_line(name.split("-")[0], key) for name, key in KEYS.items()))
    path.chmod(0o600)
    env = {"HEADWATER_CORS_ORIGINS": LISTED}
    with serving(str(tiny_model), "--api-keys-file", str(path), env=env) as server:
        server.headers = {"x-api-key": KEYS["bob"]}
        yield server


def login(server: Server, key: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/login", json={"api_key": key}, headers=headers)


def cookie_of(answer: httpx.Response) -> tuple[str, str]:
    """Name and value of the one cookie that is set."""
    (text,) = answer.headers.get_list("set-cookie")
    ((name, morsel),) = SimpleCookie(text).items()
    return name, morsel.value


def signed_in(server: Server, key: str) -> dict[str, str]:
    name, value = cookie_of(login(server, KEYS[key]))
    return {"cookie": f"{name}={value}"}


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{server.url}{path}", json=body, headers=sent, timeout=30)


def make_session(server: Server, **headers: str) -> httpx.Response:
    return ask(server, "POST", "/v1/sessions", {"title": "rivers"}, **headers)


# ------------------------------------------------------------------------------- signing in


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(guarded: Server) -> None:
    answer = login(guarded, KEYS["alice-laptop"], origin=guarded.url)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["cache-control"] == "no-store"
    (text,) = answer.headers.get_list("set-cookie")
    parts = {part.strip().lower() for part in text.split(";")[1:]}
    assert parts == {"httponly", "samesite=strict", "path=/", f"max-age={LIFETIME}"}


def test_it_is_secure_where_the_browser_speaks_tls(guarded: Server) -> None:
    """A proxy in front of the server ends TLS: the server is spoken to in the clear."""
    origin = guarded.url.replace("http://", "https://")
    for headers in ({"origin": origin}, {"x-forwarded-proto": "https"}):
        answer = login(guarded, KEYS["bob"], **headers)
        assert "; secure" in answer.headers["set-cookie"].lower()


def test_neither_the_key_nor_its_digest_is_in_the_cookie_or_the_log(guarded: Server) -> None:
    key = KEYS["alice-laptop"]
    _, one = cookie_of(login(guarded, key))
    _, other = cookie_of(login(guarded, key))
    assert one != other
    login(guarded, "hw-a-wrong-key")
    digest = hashlib.sha256(key.encode()).hexdigest()
    for secret in (key, digest[:32], digest[32:]):
        assert secret not in one and secret not in guarded.log
    assert one not in guarded.log and "hw-a-wrong-key" not in guarded.log


@pytest.mark.parametrize(
    "wrong",
    ["x", KEYS["bob"][:-1], f"{KEYS['bob']}x", "ключ"],
    ids=["short", "cut", "longer", "not ASCII"],
)
def test_a_wrong_key_is_told_and_not_repeated(guarded: Server, wrong: str) -> None:
    answer = login(guarded, wrong)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert wrong == "x" or wrong not in answer.text


@pytest.mark.parametrize(
    "body", [{}, {"api_key": ""}, {"api_key": None}, {"api_key": "x" * 513}, {"key": "x"}, [], "x"]
)
def test_a_body_of_another_form_is_refused(guarded: Server, body: Any) -> None:
    answer = ask(guarded, "POST", "/v1/login", body)
    assert answer.status_code == 400
    assert "set-cookie" not in answer.headers
    further = {"api_key": KEYS["bob"], "remember": True}
    answer = ask(guarded, "POST", "/v1/login", further)
    assert answer.status_code == 400 and KEYS["bob"] not in answer.text


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
def test_signing_in_and_out_is_posted(guarded: Server, method: str) -> None:
    for path in ("/v1/login", "/v1/logout"):
        assert ask(guarded, method, path).status_code == 405


def test_without_keys_there_is_nothing_to_sign_in_to(tiny_server: Server) -> None:
    answer = login(tiny_server, "anything")
    assert answer.status_code == 204
    assert "set-cookie" not in answer.headers
    assert ask(tiny_server, "POST", "/v1/logout").status_code == 204


def test_the_page_and_the_way_in_need_no_key(guarded: Server) -> None:
    """The way out neither: the sign-in may be over."""
    assert ask(guarded, "GET", "/").status_code == (200 if BUILT.is_dir() else 404)
    assert ask(guarded, "POST", "/v1/logout").status_code == 204
    for path in ("/docs", "/openapi.json", "/assets/x.js", "/s/x", "/v1/models"):
        assert ask(guarded, "GET", path).status_code == 401


# ------------------------------------------------------------------------------ what it opens


def test_the_owner_is_that_of_the_key(guarded: Server) -> None:
    made = make_session(guarded, x_api_key=KEYS["alice-phone"]).json()["id"]
    alice, bob = signed_in(guarded, "alice-laptop"), signed_in(guarded, "bob")
    assert ask(guarded, "GET", f"/v1/sessions/{made}", **alice).status_code == 200
    assert ask(guarded, "GET", f"/v1/sessions/{made}", **bob).status_code == 404
    of_bob = ask(guarded, "GET", "/v1/sessions", **bob).json()["data"]
    assert made not in {session["id"] for session in of_bob}


def test_it_is_found_among_other_cookies(guarded: Server) -> None:
    cookie = signed_in(guarded, "bob")["cookie"]
    name = cookie.partition("=")[0]
    for sent in (f"a=b; {cookie}", f"{cookie};c", f"{name}=planted; {cookie}"):
        assert ask(guarded, "GET", "/v1/models", cookie=sent).status_code == 200


def test_a_key_that_is_sent_counts_and_not_the_cookie(guarded: Server) -> None:
    cookie = signed_in(guarded, "alice-laptop")
    made = make_session(guarded, x_api_key=KEYS["bob"], **cookie)
    assert made.status_code == 200  # a program's request: no origin is needed
    path = f"/v1/sessions/{made.json()['id']}"
    assert ask(guarded, "GET", path, **signed_in(guarded, "bob")).status_code == 200
    assert ask(guarded, "GET", path, **cookie).status_code == 404
    assert ask(guarded, "GET", path, authorization="Bearer x", **cookie).status_code == 401


def test_what_changes_something_needs_the_pages_own_origin(guarded: Server) -> None:
    cookie = signed_in(guarded, "alice-laptop")
    own = guarded.url
    port = int(own.rpartition(":")[2])
    assert make_session(guarded, origin=own, **cookie).status_code == 200
    assert make_session(guarded, origin=own, sec_fetch_site="same-origin", **cookie).is_success
    behind_tls = own.replace("http://", "https://")
    assert make_session(guarded, origin=behind_tls, **cookie).status_code == 200
    refused: list[dict[str, str]] = [
        {},
        {"origin": ""},
        {"origin": "null"},
        {"origin": FOREIGN},
        {"origin": f"http://127.0.0.1:{port + 1}"},  # the same site, and gets the same cookies
        {"origin": "http://127.0.0.1"},
        {"origin": f"{own}.evil.example"},
        {"origin": LISTED},  # it may ask with a key, not with somebody's cookie
        {"origin": own, "sec_fetch_site": "cross-site"},
        {"origin": own, "sec_fetch_site": "same-site"},
    ]
    for headers in refused:
        answer = make_session(guarded, **headers, **cookie)
        assert answer.status_code == 403, headers
        assert answer.json()["error"]["code"] == "forbidden"
    for method, path in (("DELETE", "/v1/sessions/sess_x"), ("PATCH", "/v1/sessions/sess_x")):
        assert ask(guarded, method, path, {}, **cookie).status_code == 403
        assert ask(guarded, method, path, {}, origin=own, **cookie).status_code == 404


def test_pages_of_other_origins_cannot_read_with_it(guarded: Server) -> None:
    cookie = signed_in(guarded, "alice-laptop")
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403)):
        answer = ask(guarded, "GET", "/v1/sessions", sec_fetch_site=site, **cookie)
        assert answer.status_code == status, site
    # An old browser says nothing, sends it, and then shows nothing to the page.
    answer = ask(guarded, "GET", "/v1/sessions", origin=LISTED, **cookie)
    assert "access-control-allow-credentials" not in answer.headers


def test_a_foreign_page_can_neither_sign_in_nor_out(guarded: Server) -> None:
    assert login(guarded, KEYS["bob"], origin=FOREIGN).status_code == 403
    cookie = signed_in(guarded, "bob")
    assert ask(guarded, "POST", "/v1/logout", origin=FOREIGN, **cookie).status_code == 403
    assert ask(guarded, "GET", "/v1/models", **cookie).status_code == 200


def test_a_turn_is_streamed_to_the_page(guarded: Server) -> None:
    cookie = signed_in(guarded, "bob")
    made = make_session(guarded, origin=guarded.url, **cookie).json()["id"]
    body = {"input": "Why do rivers bend?", "stream": True, "max_tokens": 3, "seed": 1}
    path = f"/v1/sessions/{made}/turns"
    answer = ask(guarded, "POST", path, body, origin=guarded.url, **cookie)
    assert answer.status_code == 200 and "event: done" in answer.text
    stream = answer.headers["x-headwater-generation"]
    again = ask(guarded, "GET", f"/v1/streams/{stream}", last_event_id="1", **cookie)
    assert "event: done" in again.text


# --------------------------------------------------------------------------------- its end


def test_signing_out_ends_it_for_copies_too_and_only_it(guarded: Server) -> None:
    one, other = signed_in(guarded, "bob"), signed_in(guarded, "bob")
    answer = ask(guarded, "POST", "/v1/logout", origin=guarded.url, **one)
    assert answer.status_code == 204
    name, value = cookie_of(answer)
    assert (name, value) == (one["cookie"].partition("=")[0], "")
    assert "max-age=0" in answer.headers["set-cookie"].lower()
    refused = ask(guarded, "GET", "/v1/models", **one)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert ask(guarded, "GET", "/v1/models", **other).status_code == 200


def test_no_browser_keeps_what_is_somebodys(guarded: Server) -> None:
    cookie = signed_in(guarded, "bob")
    for path in ("/v1/sessions", "/v1/sessions/sess_x", "/v1/models", "/docs", "/openapi.json"):
        assert ask(guarded, "GET", path, **cookie).headers["cache-control"] == "no-store"
    assert ask(guarded, "GET", "/v1/sessions").headers["cache-control"] == "no-store"  # the 401


def test_no_changed_cookie_is_taken(guarded: Server) -> None:
    name, value = cookie_of(login(guarded, KEYS["bob"]))
    tag, expires, nonce, mac = value.split(".")
    longer = str(int(expires) + 1)
    flipped = mac[:-1] + ("0" if mac[-1] != "0" else "1")
    for forged in (
        f"{tag}.{longer}.{nonce}.{mac}",
        f"{'0' * 32}.{expires}.{nonce}.{mac}",
        f"{tag}.{expires}.{'0' * 32}.{mac}",
        f"{tag}.{expires}.{nonce}.{flipped}",
        f"{tag}.{expires}.{nonce}.",
        f"{tag}.{expires}.{nonce}",
        value.upper(),
        f"{value}x",
        "",
    ):
        answer = ask(guarded, "GET", "/v1/models", cookie=f"{name}={forged}")
        assert answer.status_code == 401, forged
    assert ask(guarded, "GET", "/v1/models", cookie=f"x{name}={value}").status_code == 401


def owners(*names: str, secret: bytes = SECRET) -> Owners:
    return Owners(
        secret, [(hashlib.sha256(f"key of {name}".encode()).digest(), name) for name in names]
    )


def cookies(sign_ins: SignIns, token: str | None) -> list[tuple[bytes, bytes]]:
    assert token is not None
    return [(b"cookie", f"{sign_ins.cookie}={token}".encode())]


def test_it_outlives_a_restart_and_so_does_its_end(tmp_path: Path) -> None:
    path = tmp_path / "signed_out"
    first = SignIns(owners("alice"), path)
    one = cookies(first, first.begin("key of alice"))
    other = cookies(first, first.begin(" key of alice\n"))
    first.end(one)
    first.end(one)
    again = SignIns(owners("alice"), path)
    for sign_ins in (first, again):
        assert sign_ins.find(one) is None
        owner = sign_ins.find(other)
        assert owner is not None and owner.name == "alice"
    assert len(path.read_text().split()) == 2


def test_it_ends_with_its_time(tmp_path: Path) -> None:
    now = 1000.0
    sign_ins = SignIns(owners("alice"), tmp_path / "signed_out", clock=lambda: now)
    headers = cookies(sign_ins, sign_ins.begin("key of alice"))
    now += LIFETIME - 1
    assert sign_ins.find(headers) is not None
    now += 1
    assert sign_ins.find(headers) is None
    sign_ins.end(headers)
    assert not (tmp_path / "signed_out").exists()  # nothing is kept of what is over


def test_it_ends_with_its_key_and_not_with_another(tmp_path: Path) -> None:
    path = tmp_path / "signed_out"
    before = SignIns(owners("alice", "bob"), path)
    alice = cookies(before, before.begin("key of alice"))
    bob = cookies(before, before.begin("key of bob"))
    after = SignIns(owners("bob", "carol"), path)
    assert after.find(alice) is None
    owner = after.find(bob)
    assert owner is not None and owner.name == "bob"
    assert SignIns(Owners(SECRET), path).find(bob) is None


def test_servers_take_only_their_own_and_keep_apart(tmp_path: Path) -> None:
    """The ports of a host share their cookies: each server gives its own a name of its own."""
    one = SignIns(owners("alice"), tmp_path / "one")
    other = SignIns(owners("alice", secret=b"t" * 32), tmp_path / "other")
    assert one.cookie != other.cookie
    token = one.begin("key of alice")
    assert one.find(cookies(one, token)) is not None
    assert other.find(cookies(other, token)) is None
    assert re.fullmatch(r"headwater-[0-9a-f]{8}", one.cookie)


def test_a_sign_out_that_cannot_be_stored_holds_all_the_same(tmp_path: Path) -> None:
    sign_ins = SignIns(owners("alice"), tmp_path / "missing" / "signed_out")
    headers = cookies(sign_ins, sign_ins.begin("key of alice"))
    sign_ins.end(headers)
    assert sign_ins.find(headers) is None


def test_lines_of_the_file_that_are_broken_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "signed_out"
    sign_ins = SignIns(owners("alice"), path)
    headers = cookies(sign_ins, sign_ins.begin("key of alice"))
    sign_ins.end(headers)
    path.write_bytes(b"\xff\nabc 12\n" + path.read_bytes() + b"0123")  # killed in mid-line
    again = SignIns(owners("alice"), path)
    assert again.find(headers) is None
    later = cookies(again, again.begin("key of alice"))
    again.end(later)
    assert SignIns(owners("alice"), path).find(later) is None


def test_nobody_signs_in_with_a_key_that_is_not_there(tmp_path: Path) -> None:
    sign_ins = SignIns(owners("alice"), tmp_path / "signed_out")
    with pytest.raises(AuthenticationError):
        sign_ins.begin("key of bob")
    assert SignIns(Owners(SECRET), tmp_path / "signed_out").begin("anything") is None
