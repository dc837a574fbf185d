"""GET / and the files of the web page. It loads nothing from anywhere else, and may not."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from server.errors import NotFound
from server.page import ROOT_FILES, PageFile, the_page

router = APIRouter()

NOT_BUILT = """The web page is not there: it was not built with this installation.

In a checkout of Headwater, `make page` builds it (`make run` does so too). Then start the server
again. The API works without it; /docs shows what there is.
"""
# Model output is text of nobody's: no script, style or picture but ours, no frame, no string that
# becomes HTML (the last line makes the browser refuse it).
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


async def page_file(request: Request) -> Response:
    """One file of the page; 304 to whoever has it already."""
    path = request.scope["path"]
    file = the_page().find(path)
    if file is not None:
        return _answer(file, request)
    if path == "/":
        return PlainTextResponse(NOT_BUILT, 404, _HEADERS | {"cache-control": "no-store"})
    raise NotFound(f"there is nothing at {path}")


for _path in ("/", "/s/{id}", "/assets/{name}", *(f"/{name}" for name in ROOT_FILES)):
    router.add_api_route(_path, page_file, methods=["GET", "HEAD"], include_in_schema=False)


def _answer(file: PageFile, request: Request) -> Response:
    headers = _HEADERS | {"etag": file.etag, "cache-control": file.cache_control}
    if file.gzipped is not None:
        headers["vary"] = "accept-encoding"
    known = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip() for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    body = file.body
    if file.gzipped is not None and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        body = file.gzipped
    return Response(body, headers=headers, media_type=file.media_type)


def _takes_gzip(accepted: str) -> bool:
    for part in accepted.lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
