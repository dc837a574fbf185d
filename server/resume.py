"""`headwater resume`: attach to a running or finished stream, and stay with it to its end."""

from __future__ import annotations

import sys
import time

import httpx
import msgspec

from server.remote import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_UNREACHABLE,
    connected,
    message_of,
    printable,
)

RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)


class Reader:
    """The text of a stream to stdout, over any number of connections."""

    def __init__(self, client: httpx.Client, generation: str) -> None:
        self._client = client
        self._path = f"/v1/streams/{generation}"
        self._place = ""  # the id of the last event

    def follow(self) -> int:
        """Read to the end. Returns the exit code."""
        retries = iter(RETRY_SECONDS)
        while True:
            place = self._place
            code = None
            try:
                code = self._read()
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                reason = "the stream broke off"
            if code is not None:
                return code
            if self._place != place:
                retries = iter(RETRY_SECONDS)
            pause = next(retries, None)
            if pause is None:
                sys.stderr.write(f"headwater: {reason}; the stream may go on later\n")
                return EXIT_UNREACHABLE
            time.sleep(pause)

    def _read(self) -> int | None:
        """One connection. None when it ended before the stream did."""
        headers = {"last-event-id": self._place} if self._place else {}
        with self._client.stream("GET", self._path, headers=headers) as response:
            if response.status_code == 204:
                return EXIT_DONE
            if response.status_code != 200:
                response.read()
                return _refused(response)
            event, place = "", ""
            for line in response.iter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    place = value
                elif field == "event":
                    event = value
                elif field == "data":
                    code = self._take(event, value)
                    if code is not None:
                        return code
                    self._place = place or self._place
                    event, place = "", ""
        return None

    def _take(self, event: str, data: str) -> int | None:
        document = msgspec.json.decode(data)
        if event == "delta":
            sys.stdout.write(printable(document["text"]))
            sys.stdout.flush()
        elif event == "done":
            sys.stdout.write("\n")
            reason = document["finish_reason"]
            if reason != "stop":
                sys.stderr.write(f"headwater: the answer ended with {reason!r}\n")
            return EXIT_DONE
        elif event == "error":
            if document["error"]["code"] == "server_draining":
                return None  # it goes on when the server is back
            sys.stderr.write(f"\nheadwater: {document['error']['message']}\n")
            return EXIT_ERROR
        return None


def _refused(response: httpx.Response) -> int | None:
    if response.status_code in (429, 503):
        return None
    sys.stderr.write(f"headwater: {message_of(response)}\n")
    return EXIT_ERROR


def follow(url: str, generation: str, api_key: str | None) -> int:
    """Attach to `generation` of the server at `url`. Returns the exit code."""
    with connected(url, api_key) as client:
        return Reader(client, generation).follow()
