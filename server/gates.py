"""Who is let in: pure ASGI middleware in front of the routes. Nothing buffers.

They judge `scope["path"]` and the raw headers, never a URL that was put together from them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import AuthenticationError, HeadwaterError, InvalidRequest, PermissionDenied
from server.metrics import Metrics
from server.owners import Owner, Owners, presented_key
from server.page import Page
from server.responses import error_response, json_response
from server.settings import Settings
from server.sign_ins import SignIns

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/v1/login", "/v1/logout"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class OwnerGate:
    """Finds the owner of each request and leaves it in `scope["state"]["owner"]`; 401 without one.

    Every path needs a key, or the cookie of a sign-in with one, but the open ones, spelled exactly
    so, and the files of the page; a route that is added later is guarded without its author doing
    anything."""

    def __init__(
        self, app: ASGIApp, owners: Owners, sign_ins: SignIns, page: Page, metrics: Metrics
    ) -> None:
        self._app = app
        self._owners = owners
        self._sign_ins = sign_ins
        self._page = page
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope):
            try:
                owner = self._whose(scope)
            except (AuthenticationError, PermissionDenied) as error:
                await _refuse(error, self._metrics, scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await _no_websocket(self._app, scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in OPEN_PATHS or self._page.opens(scope["method"], path)

    def _whose(self, scope: Scope) -> Owner:
        """By the key; where none is sent, by the cookie, which a browser also sends where the page
        of another port of this host asks it to. Raises AuthenticationError, PermissionDenied."""
        headers = scope["headers"]
        owner = None if presented_key(headers) else self._sign_ins.find(headers)
        if owner is None:
            return self._owners.identify(headers)
        if not _is_of_our_page(scope):
            raise PermissionDenied(
                "a sign-in counts for this server's own page only, and a browser says of this "
                "request that it is of another, or not of which; send the API key instead"
            )
        return owner


class HostGate:
    """Refuses a `Host` that is not this server's (400), so that a page whose name is made to point
    here (DNS rebinding) gets nothing; and what would change something and comes from a page of
    another origin (403), which a browser sends without asking where there is no body."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._hosts = AllowedHosts(settings.host, settings.allowed_hosts or ())
        self._origins = frozenset(settings.cors_origins or ())
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._fault(scope)
            if error is not None:
                await _refuse(error, self._metrics, scope, receive, send)
                return
        await _no_websocket(self._app, scope, receive, send)

    def _fault(self, scope: Scope) -> HeadwaterError | None:
        host = _only(scope, b"host")
        if host is None or host not in self._hosts:
            said = "no single Host" if host is None else f"the Host {host[:200]!r}"
            return InvalidRequest(
                f"the request has {said}, which is not a name of this server; use its address, or "
                "let the operator add the name to HEADWATER_ALLOWED_HOSTS"
            )
        if scope["method"] in SAFE_METHODS or not self._foreign(scope, host):
            return None
        return PermissionDenied(
            "the request comes from a page of another origin; let the operator add that origin to "
            "HEADWATER_CORS_ORIGINS"
        )

    def _foreign(self, scope: Scope, host: str) -> bool:
        """Whether a browser says that a page of another origin asks."""
        if not any(name == b"origin" for name, _ in scope["headers"]):
            return False
        origin = _only(scope, b"origin")
        if origin is None:
            return True
        if "*" in self._origins or origin.lower() in self._origins:
            return False
        return not _is_at(origin, host)


class CorsGate(CORSMiddleware):
    """Lets the pages of `origins` ask, and read what they are answered. Without keys: a browser's
    preflight request has none. Refuses that of any other page (403)."""

    def __init__(self, app: ASGIApp, origins: Collection[str], metrics: Metrics) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "request-id",
                "x-headwater-generation",
                "x-should-retry",
                "retry-after",
            ],
        )
        self._metrics = metrics

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = PermissionDenied(
            f"a page may not ask so ({bytes(response.body).decode()}); let the operator add its "
            "origin to HEADWATER_CORS_ORIGINS"
        )
        self._metrics.errors.labels(error.code).inc()
        kept = {n: v for n, v in response.headers.items() if not n.startswith("content-")}
        return json_response(error.body(), error.status, kept)


class AllowedHosts:
    """The names that a `Host` header may have; its port does not matter.

    Always those of loopback. Beside them the bound host, and the given names (`*.example.com` for
    all below, `*` for any). Bound to all addresses (as in a container) any numeric address will
    do: rebinding needs a name."""

    def __init__(self, bound: str, names: Collection[str]) -> None:
        self._names = {"localhost", bound.lower(), *names}
        self._any = "*" in names
        self._below = tuple(name[1:] for name in names if name.startswith("*."))
        self._numeric = _address_is(bound, "is_unspecified")

    def __contains__(self, host: str) -> bool:
        name = _without_port(host).lower().removesuffix(".")
        if self._any or name in self._names or (self._below and name.endswith(self._below)):
            return True
        return _address_is(name, "is_loopback") or (self._numeric and _address_is(name))


# ------------------------------------------------------------------------------------- details


async def _refuse(
    error: HeadwaterError, metrics: Metrics, scope: Scope, receive: Receive, send: Send
) -> None:
    metrics.errors.labels(error.code).inc()
    await error_response(error, scope)(scope, receive, send)


async def _no_websocket(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """There are no routes for websockets, so none is let past a gate that does not judge them."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await app(scope, receive, send)


def _only(scope: Scope, name: bytes) -> str | None:
    """The header's value; None unless it is there once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1").strip() if len(values) == 1 else None


def _is_at(origin: str, host: str) -> bool:
    """The scheme may differ: a proxy that ends TLS speaks plain HTTP to us."""
    return origin.partition("://")[2].lower() == host.lower()


def _is_of_our_page(scope: Scope) -> bool:
    """Whether the browser says so. Of what only reads, an old one says nothing."""
    if _only(scope, b"sec-fetch-site") not in (None, "same-origin", "none"):
        return False
    if scope["method"] in SAFE_METHODS:
        return True
    origin, host = _only(scope, b"origin"), _only(scope, b"host")
    return origin is not None and host is not None and _is_at(origin, host)


def _address_is(host: str, trait: str | None = None) -> bool:
    """Whether it is a numeric address, and of that kind."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return trait is None or bool(getattr(address, trait))


def _without_port(host: str) -> str:
    if host.startswith("["):  # [::1]:8000
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
