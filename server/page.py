"""The web page's files, as they were built into `server/pages/web`."""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BUILT = Path(__file__).parent / "pages" / "web"
ROOT_FILES = (
    "favicon.svg",
    "favicon.ico",
    "apple-touch-icon.png",
    "icon-192.png",
    "icon-512.png",
    "manifest.webmanifest",
    "robots.txt",
)
"""What browsers ask for by a fixed name; all else of the page is in `assets`, with a hash in its
name."""

# Not mimetypes': its table is the machine's, and a script of a wrong type is not run.
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
_COMPRESSED = (".ico", ".png", ".woff2")
_FOREVER = "public, max-age=31536000, immutable"
_ASK_AGAIN = "no-cache"
_SESSION_LINK = re.compile(r"/s/sess_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class PageFile:
    """`gzipped` is None where that saves nothing. `etag` is weak: it is that of both."""

    body: bytes
    gzipped: bytes | None
    media_type: str
    etag: str
    cache_control: str


class Page:
    """All files of the page by their paths, read once: those of one build belong together, also
    when the next one is installed while the server runs. A path is looked up and never becomes a
    file name."""

    def __init__(self, folder: Path) -> None:
        """`folder` may be missing: then the page was not built, and there are no files."""
        self._files = {
            f"/{path.relative_to(folder).as_posix()}": _read(path, folder)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def find(self, path: str) -> PageFile | None:
        """What is served at `path`. The page itself is at `/` and at the link of each session:
        what it shows there, it asks for."""
        if path == "/" or _SESSION_LINK.fullmatch(path):
            return self._files.get("/index.html")
        return self._files.get(path)

    def opens(self, method: str, path: str) -> bool:
        """Whether it needs no key: the page is the same for everybody, and asks for one."""
        return method in ("GET", "HEAD") and (path == "/" or self.find(path) is not None)


@cache
def the_page() -> Page:
    """The page of this installation."""
    return Page(BUILT)


def _read(path: Path, folder: Path) -> PageFile:
    body = path.read_bytes()
    gzipped = None if path.suffix in _COMPRESSED else gzip.compress(body, mtime=0)
    hashed = path.parent == folder / "assets"
    return PageFile(
        body=body,
        gzipped=gzipped if gzipped and len(gzipped) < len(body) else None,
        media_type=_TYPES.get(path.suffix, "application/octet-stream"),
        etag=f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
        cache_control=_FOREVER if hashed else _ASK_AGAIN,
    )
