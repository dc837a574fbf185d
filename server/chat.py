"""`headwater chat`: a conversation in the terminal, in a session that the server keeps."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import httpx

from server.remote import EXIT_DONE, FAULTS, Refused, connected, printable, told
from server.resume import Reader

EXIT_INTERRUPTED = 130
TITLE_CHARACTERS = 60


class Chat:
    """One session of one server. It is made when there is something to say in it."""

    def __init__(
        self, url: str, client: httpx.Client, session: str | None, system: str | None
    ) -> None:
        self._url = url
        self._client = client
        self._session = session
        self._system = system

    def talk(self) -> int:
        """Until the input ends. Returns the exit code: that of the last answer, where nobody
        looks at them one by one."""
        code = EXIT_DONE
        try:
            model = self._ask("GET", "/v1/models").json()["data"][0]["id"]
            if self._session is not None:
                self._recall()
            for words in _lines(f"{model} at {self._url}"):
                code = self._said(words)
        except FAULTS as error:
            return told(self._url, error)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        if sys.stdin.isatty():
            code = EXIT_DONE
            if self._session is not None:
                sys.stderr.write(f"\nheadwater chat --session {self._session} goes on with it.\n")
        return code

    def _recall(self) -> None:
        """What was said last, and the answer that is being written."""
        session = self._ask("GET", f"/v1/sessions/{self._session}").json()
        for turn in session["turns"][-2:]:
            text = "".join(item["text"] for item in turn["content"] if item["type"] == "text")
            if turn["status"] != "running":
                mark = "> " if turn["role"] == "user" else ""
                sys.stdout.write(f"{mark}{printable(text)}\n")
        if session["generating"] is not None:
            self._follow(session["generating"])

    def _said(self, words: str) -> int:
        """The answer to it, to its end; after a fault one may go on. Returns the exit code."""
        try:
            return self._say(words)
        except FAULTS as error:
            return told(self._url, error)

    def _say(self, words: str) -> int:
        if self._session is None:
            title = words.strip().splitlines()[0][:TITLE_CHARACTERS]
            new = {"title": title, "instructions": self._system}
            self._session = self._ask("POST", "/v1/sessions", new).json()["id"]
        return self._follow(self._answer(words))

    def _answer(self, words: str) -> str:
        """The generation that answers. It goes on without this connection."""
        path = f"/v1/sessions/{self._session}/turns"
        body = {"input": words, "stream": True}
        headers = {"idempotency-key": secrets.token_hex(16)}
        with self._client.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise Refused(response)
            return response.headers["x-headwater-generation"]

    def _follow(self, generation: str) -> int:
        with self._stopped_by_ctrl_c():
            return Reader(self._client, generation).follow()

    @contextlib.contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """Ctrl+C ends the answer; its stream then says so. Where the server cannot be told, it
        ends this program."""

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            try:
                httpx.post(
                    self._client.base_url.join(f"/v1/sessions/{self._session}/cancel"),
                    headers=self._client.headers,
                    json={},
                )
            except httpx.TransportError:
                raise KeyboardInterrupt from None

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        response = self._client.request(method, path, json=body)
        if response.status_code != 200:
            raise Refused(response)
        return response


def _lines(where: str) -> Iterator[str]:
    """What is said, without empty lines: at a terminal with a prompt and the keys of readline."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    sys.stderr.write(f"{where}. Enter sends, Ctrl+C stops an answer, Ctrl+D leaves.\n")
    while True:
        try:
            words = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        if words.strip():
            yield words


def chat(url: str, session: str | None, system: str | None, api_key: str | None) -> int:
    """Talk with the server at `url`. Returns the exit code."""
    try:
        client = connected(url, api_key)
    except httpx.InvalidURL as error:
        return told(url, error)
    with client:
        return Chat(url, client, session, system).talk()
