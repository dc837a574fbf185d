"""GET /docs: the API to read, from `/openapi.json`. The page is whole: it loads nothing from
anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The page."""
    page, policy = _page()
    return HTMLResponse(page, headers={"content-security-policy": policy})


@cache
def _page() -> tuple[str, str]:
    """The page, and a policy that lets run and load what is in it and nothing else."""
    page = resources.files("server").joinpath("pages/docs.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    )
    return page, policy
