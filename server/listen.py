"""The listening socket."""

from __future__ import annotations

import errno
import ipaddress
import socket

from server.settings import Settings


class ListenError(Exception):
    """The address cannot be served on; one line says why and what to do."""


def bind(settings: Settings) -> socket.socket:
    """The listening socket: bound first, so that a taken port is known before anything loads.

    Raises ListenError."""
    family, address = _address(settings)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. Neither event loop sets it on a socket that it did not make, and then
    # each small write of a stream waits up to 40 ms for the client to acknowledge the last one.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.bind((address, settings.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        advice = "choose another with --port (make run PORT=8001)"
        if error.errno == errno.EADDRNOTAVAIL:
            advice = "it is not an address of this machine; choose another with --host"
        elif error.errno in (errno.EACCES, errno.EPERM):
            advice = "ports below 1024 are for root; choose another with --port"
        raise ListenError(
            f"cannot listen on port {settings.port} of {settings.host}: {error.strerror}; {advice}"
        ) from None
    return sock


def _address(settings: Settings) -> tuple[socket.AddressFamily, str]:
    """The numeric address to bind, and its family.

    Without keys only a loopback address may be bound, unless it is asked for by name."""
    host = settings.host
    try:
        found = socket.getaddrinfo(host or " ", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ListenError(f"--host {host!r} is neither an address nor a known name") from None
    family, address = found[0][0], str(found[0][4][0])
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not loopback and settings.api_keys_file is None and not settings.no_auth:
        raise ListenError(
            f"--host {host} is reachable from other machines and no API keys are set; "
            "bind 127.0.0.1, set keys (--api-keys-file), or say --no-auth if that is what you want"
        )
    return family, address
