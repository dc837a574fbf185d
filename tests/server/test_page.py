"""The page at /: its files, their headers, who may have them; and that it is built as it should."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from fastapi import FastAPI

from server.api import page as page_routes
from server.page import BUILT, ROOT_FILES, Page
from tests.fixtures.server import Server

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "clients" / "web"
SESSION = "/s/sess_" + "0a" * 16
Ask = Callable[..., httpx.Response]
SCRIPT = b"console.log('river');\n" * 100

built = pytest.mark.skipif(
    not (BUILT / "index.html").is_file(), reason="the page is not built; `make page` does it"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as a build leaves them."""
    web = tmp_path / "web"
    (web / "assets").mkdir(parents=True)
    (web / "index.html").write_text("<!doctype html><title>Headwater</title>")
    (web / "favicon.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (web / "manifest.webmanifest").write_text("{}")
    (web / "assets" / "index-B1a2.js").write_bytes(SCRIPT)
    (web / "assets" / "small-C3d4.css").write_text("p{}")
    (web / "assets" / "mark-E5f6.png").write_bytes(b"\x89PNG" + bytes(1000))
    (tmp_path / "outside.js").write_text("secret")
    return web


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks the routes of the page, over these files."""
    page = Page(folder)
    monkeypatch.setattr(page_routes, "the_page", lambda: page)
    app = FastAPI()
    app.include_router(page_routes.router)

    def send(path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://web") as http:
                return await http.request(
                    method, path, headers={name.replace("_", "-"): v for name, v in headers.items()}
                )

        return anyio.run(once)

    return send


# ------------------------------------------------------------------------------------- files


def test_paths_of_files_and_links_to_sessions(folder: Path) -> None:
    page = Page(folder)
    index = page.find("/")
    assert index is not None and b"<title>Headwater" in index.body
    assert page.find(SESSION) is index
    script = page.find("/assets/index-B1a2.js")
    assert script is not None and script.body == SCRIPT
    for path in ("/", SESSION, "/favicon.svg", "/assets/index-B1a2.js"):
        assert page.opens("GET", path) and page.opens("HEAD", path)
        assert not page.opens("POST", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "//",
        "/..",
        "/../outside.js",
        "/assets/../../outside.js",
        "/assets/..%2f..%2foutside.js",
        "/assets/../index-B1a2.js",
        "/assets",
        "/assets/",
        "/assets/other.js",
        "/assets/index-B1a2.js/",
        "/assets/index-B1a2.js\x00",
        "assets/index-B1a2.js",
        "/ASSETS/index-B1a2.js",
        "/s/",
        "/s/x",
        f"{SESSION}/",
        f"{SESSION}\n",
        f"{SESSION}/../../v1/models",
        SESSION.upper(),
        "/v1/models",
        "/favicon.svg/../v1/models",
    ],
)
def test_nothing_else_is_found_or_open(folder: Path, path: str) -> None:
    page = Page(folder)
    assert page.find(path) is None
    assert not page.opens("GET", path)


def test_a_page_that_was_not_built_has_no_files_and_an_open_root(tmp_path: Path) -> None:
    page = Page(tmp_path / "missing")
    assert page.find("/") is None and page.find(SESSION) is None
    assert page.opens("GET", "/") and not page.opens("GET", SESSION)


@pytest.mark.parametrize(
    ("path", "type", "cached"),
    [
        ("/", "text/html; charset=utf-8", "no-cache"),
        (SESSION, "text/html; charset=utf-8", "no-cache"),
        ("/favicon.svg", "image/svg+xml", "no-cache"),
        ("/manifest.webmanifest", "application/manifest+json", "no-cache"),
        ("/assets/index-B1a2.js", "text/javascript; charset=utf-8", "immutable"),
        ("/assets/small-C3d4.css", "text/css; charset=utf-8", "immutable"),
        ("/assets/mark-E5f6.png", "image/png", "immutable"),
    ],
)
def test_headers(ask: Ask, path: str, type: str, cached: str) -> None:
    answer = ask(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == type
    assert cached in answer.headers["cache-control"]
    if cached == "immutable":
        assert "max-age=31536000" in answer.headers["cache-control"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert ask(path, "HEAD").headers["content-type"] == type
    again = ask(path, if_none_match=f'W/"other", {answer.headers["etag"]}')
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert again.headers["cache-control"] == answer.headers["cache-control"]


@pytest.mark.parametrize("accepted", ["gzip", "br, GZIP;q=0.5", "deflate, gzip ; q=1"])
def test_what_is_worth_it_is_sent_zipped(ask: Ask, accepted: str) -> None:
    answer = ask("/assets/index-B1a2.js", accept_encoding=accepted)
    assert answer.headers["content-encoding"] == "gzip"
    assert int(answer.headers["content-length"]) < len(SCRIPT) / 10
    assert answer.content == SCRIPT  # httpx unpacks it
    assert answer.headers["vary"] == "accept-encoding"


@pytest.mark.parametrize("accepted", ["identity", "br", "gzip;q=0", "x-gzip", ""])
def test_and_plain_to_those_who_do_not_take_that(ask: Ask, accepted: str) -> None:
    answer = ask("/assets/index-B1a2.js", accept_encoding=accepted)
    assert "content-encoding" not in answer.headers
    assert answer.content == SCRIPT
    assert answer.headers["vary"] == "accept-encoding"  # for what stands in between


def test_the_policy_lets_in_nothing_from_elsewhere(ask: Ask) -> None:
    for path in ("/", SESSION, "/favicon.svg", "/assets/index-B1a2.js"):
        policy = dict(
            part.strip().split(" ", 1)
            for part in ask(path).headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["connect-src"] == "'self'" and policy["img-src"] == "'self' data:"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert not re.search(r"unsafe|https?:|\*", " ".join(policy.values()))


# -------------------------------------------------------------------------- the real server


def raw(server: Server, target: str, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    """With the target as it is; httpx would tidy it."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    connection.request(method, target)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, {name.lower(): value for name, value in answer.getheaders()}


def test_the_root_is_the_page_or_says_how_to_build_it(tiny_server: Server) -> None:
    status, body, headers = raw(tiny_server, "/")
    if BUILT.is_dir():
        assert status == 200 and body == (BUILT / "index.html").read_bytes()
    else:
        assert status == 404 and b"make page" in body
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert raw(tiny_server, "/", "HEAD")[:2] == (status, b"")


@pytest.mark.parametrize(
    "target",
    [
        "/index.html/",
        "/assets/../pages/docs.html",
        "/assets/..%2findex.html",
        "/assets/%2e%2e/%2e%2e/docs.html",
        "/assets/x.js",
        "/s/x",
        "/s/../server/page.py",
        "/pages/docs.html",
        "/nothing",
    ],
)
def test_what_is_no_file_of_the_page_is_404_in_json(tiny_server: Server, target: str) -> None:
    status, body, _ = raw(tiny_server, target)
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


def test_the_page_takes_no_other_method(tiny_server: Server) -> None:
    for path in ("/", SESSION):
        answer = httpx.post(f"{tiny_server.url}{path}")
        assert answer.status_code == 405
        assert answer.json()["error"]["code"] == "invalid_value"


@built
def test_every_built_file_is_served_as_it_is(tiny_server: Server) -> None:
    files = [path for path in BUILT.rglob("*") if path.is_file()]
    assert len(files) > 3
    with httpx.Client(base_url=tiny_server.url) as http:
        for file in files:
            name = file.relative_to(BUILT).as_posix()
            if name == "index.html":
                continue
            assert name in ROOT_FILES or name.startswith("assets/"), f"{name} is served nowhere"
            answer = http.get(f"/{name}")
            assert answer.status_code == 200, name
            assert answer.content == file.read_bytes(), name
            assert answer.headers["content-type"] != "application/octet-stream", name
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert http.get(SESSION).content == (BUILT / "index.html").read_bytes()


# ------------------------------------------------------------------------------- what is built


def linked(html: str) -> list[str]:
    return re.findall(r"""(?:src|href)=["']([^"']+)["']""", html)


@built
def test_the_page_names_only_files_of_its_own() -> None:
    html = (BUILT / "index.html").read_text()
    links = linked(html)
    assert any(link.endswith(".js") for link in links)
    for link in links:
        assert re.fullmatch(r"/[\w./-]+", link), f"{link}: from elsewhere?"
        assert (BUILT / link[1:]).is_file(), f"{link} is not built"
    # What the policy would refuse.
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html, re.IGNORECASE)
    assert not re.search(r"<script(?![^>]*\ssrc=)", html, re.IGNORECASE)


@built
def test_the_first_view_weighs_at_most_350_kb() -> None:
    """All that the page names, and what those scripts import at once, zipped."""
    todo = [link[1:] for link in linked((BUILT / "index.html").read_text())]
    first: set[str] = {"index.html"}
    while todo:
        name = todo.pop()
        if name in first:
            continue
        first.add(name)
        if name.endswith(".js"):
            text = (BUILT / name).read_text()
            todo += [
                f"assets/{other}"
                for other in re.findall(r"""(?:\bfrom|\bimport)\s*["']\./([^"']+)["']""", text)
            ]
    weight = sum(len(gzip.compress((BUILT / name).read_bytes())) for name in first)
    assert len(first) >= 3
    assert weight <= 350_000, f"{weight} bytes: {sorted(first)}"


@built
def test_the_microscope_is_loaded_on_demand() -> None:
    html = (BUILT / "index.html").read_text()
    later = [
        path.name
        for path in (BUILT / "assets").glob("*.js")
        if path.name not in html and b"/v1/inspect/" in path.read_bytes()
    ]
    assert later
    for link in linked(html):
        if link.endswith(".js"):
            assert b"/v1/inspect/attention" not in (BUILT / link[1:]).read_bytes()


def test_the_lock_file_pins_all_and_names_no_host() -> None:
    packages = json.loads((WEB / "package-lock.json").read_text())["packages"]
    for path, package in packages.items():
        assert "resolved" not in package, f"{path} names where it is from: see .npmrc"
        if path:
            assert "integrity" in package, f"{path} could be anything"
    wanted = json.loads((WEB / "package.json").read_text())
    for version in {**wanted["dependencies"], **wanted["devDependencies"]}.values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), "one version, so that the lock file is read"


def test_gzip_of_a_file_is_the_same_each_time(folder: Path) -> None:
    one, other = (Page(folder).find("/assets/index-B1a2.js") for _ in range(2))
    assert one is not None and one == other and one.gzipped is not None
    assert zlib.decompress(one.gzipped, 31) == SCRIPT


@built
def test_a_wheel_brings_the_page_along(tmp_path: Path) -> None:
    """In a copy: a build leaves files behind, which the next one would take along."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("model", "server"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    command = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", tmp_path / "wheels", tmp_path], check=True, timeout=100
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        for file in BUILT.rglob("*"):
            if file.is_file():
                name = file.relative_to(ROOT).as_posix()
                assert archive.read(name) == file.read_bytes(), name
