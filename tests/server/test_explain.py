"""`headwater explain` against a real server: what it prints, plain and as JSON, how it exits."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from server.explain import visible
from tests.fixtures.server import Server, headwater

TEXT = "Sarah fed the cat because it"


def explain(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*headwater(), "explain", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "100", **env},
    )


def test_it_prints_what_the_server_says(tiny_server: Server) -> None:
    done = explain(TEXT, "--url", tiny_server.url, "--max-tokens", "5", "--layer", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout  # it is no terminal
    for title in (
        *("The tokens", "What may come next", "What the last token looks at, in layer 1 (0 to 1)"),
        *("Through the layers", "With and without the KV cache"),
    ):
        assert f"\n{title}\n" in done.stdout
    assert "hidden [1, 6, 64] -> logits [1, 6, 512]" in done.stdout
    assert "5 tokens after 6, the same tokens both ways" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["5", "␣it"] in [[row[0], *row[2:3]] for row in rows if row]


def test_json(tiny_server: Server) -> None:
    done = explain(TEXT, "--url", tiny_server.url, "--max-tokens", "0", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document.keys() == {"model", "forward", "next", "attention", "layers"}
    assert document["next"] == document["forward"]["positions"][-1]
    assert document["attention"]["queries"] == [5]


def test_a_text_of_one_token_and_one_that_moves_the_cursor(tiny_server: Server) -> None:
    for text in ("a", "a\x1b[2J\n"):
        done = explain(text, "--url", tiny_server.url, "--max-tokens", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
    assert visible(" a\n\x1b\u202e") == "␣a\\n\\x1b\\u202e"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((TEXT, "--url", "http://127.0.0.1:9"), 75, "no server answers at http://127.0.0.1:9"),
        ((TEXT, "--url", "nonsense"), 2, "'nonsense' is no URL"),
        ((TEXT, "--max-tokens", "257"), 2, "--max-tokens"),
        (("",), 1, "no tokens"),
        (("a b c d " * 200,), 1, "512 tokens"),
        ((TEXT, "--layer", "2", "--json"), 1, "from 0 to 1"),
    ],
)
def test_what_goes_wrong_is_one_line(
    tiny_server: Server, args: tuple[str, ...], code: int, said: str
) -> None:
    url = () if "--url" in args else ("--url", tiny_server.url)
    done = explain(*args, *url)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("headwater: ") and said in line
