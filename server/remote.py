"""What the commands share that ask a running server: reaching it, and telling why that failed."""

from __future__ import annotations

import re
import sys

import httpx
import msgspec

EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_UNREACHABLE = 0, 1, 2, 75
READ_SECONDS = 60.0  # of a stream: a comment comes every few seconds
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Refused(Exception):
    """What the server said no with, and the exit code."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(message_of(response))
        self.code = EXIT_UNREACHABLE if response.status_code in (429, 503) else EXIT_ERROR


FAULTS = (httpx.TransportError, httpx.InvalidURL, Refused)


def connected(url: str, api_key: str | None, *, read_seconds: float = READ_SECONDS) -> httpx.Client:
    """A client of the server at `url`. Raises httpx.InvalidURL."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(10.0, read=read_seconds)
    return httpx.Client(base_url=url, headers=headers, timeout=timeout)


def message_of(response: httpx.Response) -> str:
    """What a refusal says."""
    try:
        return str(msgspec.json.decode(response.content)["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return f"the server answered {response.status_code}; is it a Headwater server?"


def told(url: str, error: Exception) -> int:
    """Say in one line on stderr which of the FAULTS it was. Returns the exit code."""
    match error:
        case Refused():
            message, code = str(error), error.code
        case httpx.InvalidURL() | httpx.UnsupportedProtocol():
            message = f"{url!r} is no URL; expected one like http://127.0.0.1:8000"
            code = EXIT_USAGE
        case _:
            reason = str(error) or type(error).__name__
            message = (
                f"no server answers at {url} ({reason}); start one with `headwater serve`, or "
                "name another with --url"
            )
            code = EXIT_UNREACHABLE
    sys.stderr.write(f"headwater: {message}\n")
    return code


def printable(text: str) -> str:
    """The text; for a terminal without what would steer it (escape sequences)."""
    return _CONTROLS.sub("", text) if sys.stdout.isatty() else text
