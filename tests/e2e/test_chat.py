"""`headwater chat` as people meet it: at a terminal, and of a pipe."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fixtures.server import Server, headwater, wait_until

pytestmark = pytest.mark.e2e

SECONDS = 60.0


class Terminal:
    """The command at a terminal of its own; what it showed so far is `shown`."""

    def __init__(self, server: Server, *options: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvp(headwater()[0], [*headwater(), "chat", "--url", server.url, *options])
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait(self, pattern: str, after: int = 0) -> int:
        """Until it shows that, beyond so many characters. Returns where it ends."""
        deadline = time.monotonic() + SECONDS
        while not (match := re.compile(pattern, re.DOTALL).search(self.shown, after)):
            left = deadline - time.monotonic()
            assert select.select([self._terminal], [], [], max(left, 0))[0], (pattern, self.shown)
            self.shown += os.read(self._terminal, 4096).decode(errors="replace")
        return match.end()

    def leave(self) -> int:
        """Ctrl+D. Returns the exit code."""
        self.type("\x04")
        with contextlib.suppress(OSError):
            while data := os.read(self._terminal, 4096):
                self.shown += data.decode(errors="replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def http(default_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=default_server.url, timeout=SECONDS) as client:
        yield client


def turns(http: httpx.Client, session: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get(f"/v1/sessions/{session}").json()["turns"]
    return found


def test_a_conversation_at_a_terminal(default_server: Server, http: httpx.Client) -> None:
    terminal = Terminal(default_server, "--system", "Answer in one short sentence.")
    at = terminal.wait(r"smollm2-135m at .*Ctrl\+D leaves\..*> ")
    terminal.type("\x03\r")  # nothing runs: the program stays
    at = terminal.wait("> ", at)
    terminal.type("Name a river.\r")
    at = terminal.wait("\n> ", at)
    terminal.type("Write a story of a thousand words about it, with all that happens.\r")
    wait_until(
        lambda: default_server.metric("headwater_requests_running") == 1, SECONDS, "no answer"
    )
    terminal.wait("words about it, with all that happens.\r\n.{40}", at)
    terminal.type("\x03")
    at = terminal.wait("ended with 'abort'.*> ", at)
    assert terminal.leave() == 0
    session = re.search(r"chat --session (sess_[0-9a-f]{32})", terminal.shown)
    assert session, terminal.shown

    said = turns(http, session[1])
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert [turn["status"] for turn in said[1::2]] == ["complete", "interrupted"]
    told = terminal.shown.replace("\r\n", "\n").replace("^C", "")  # the echo of the key
    for turn in said[1::2]:
        assert turn["content"][0]["text"] in told

    again = Terminal(default_server, "--session", session[1])
    again.wait(r"> Write a story.*leaves\..*> ")
    assert said[3]["content"][0]["text"] in again.shown.replace("\r\n", "\n")
    again.type("Thanks.\r")
    again.wait(r"Thanks\..*\n> ")
    assert again.leave() == 0
    assert len(turns(http, session[1])) == 6


def piped(url: str, words: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*headwater(), "chat", "--url", url, *options],
        input=words, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def test_each_line_of_a_pipe_is_said(default_server: Server, http: httpx.Client) -> None:
    result = piped(default_server.url, "Name a river.\n\nAnd a lake.\n")
    assert (result.returncode, result.stderr) == (0, "")
    newest = http.get("/v1/sessions?limit=1").json()["data"][0]
    assert newest["title"] == "Name a river."
    said = turns(http, newest["id"])
    assert result.stdout == "".join(turn["content"][0]["text"] + "\n" for turn in said[1::2])


def test_what_is_wrong_is_one_line(default_server: Server) -> None:
    none = f"sess_{'0' * 32}"
    for url, options, code, cause in (
        (default_server.url, ["--session", none], 1, none),
        (default_server.url, ["--session", "x"], 2, "sess_"),
        (default_server.url, ["--session", none, "--system", "x"], 2, "--system"),
        ("http://127.0.0.1:9", [], 75, "no server answers at http://127.0.0.1:9"),
        ("nowhere", [], 2, "expected one like"),
        ("http://x:y", [], 2, "expected one like"),
    ):
        result = piped(url, "Hello\n", *options)
        assert (result.returncode, result.stdout) == (code, "")
        assert cause in result.stderr and result.stderr.count("\n") == 1, result.stderr
