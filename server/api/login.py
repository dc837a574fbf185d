"""POST /v1/login and /v1/logout: a key once, then a cookie that a page's scripts cannot read."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from server.api.body import Body
from server.services import Shared
from server.sign_ins import LIFETIME

router = APIRouter()


class Login(Body):
    model_config = ConfigDict(extra="forbid")

    api_key: Annotated[str, Field(min_length=1, max_length=512)]


@router.post("/v1/login", operation_id="login", status_code=204)
async def login(body: Login, request: Request, services: Shared) -> Response:
    """Sign in with a key: sets the cookie that stands for it, for 30 days. Where no keys are set
    there is nothing to sign in to, and no cookie."""
    token = services.sign_ins.begin(body.api_key)
    answer = Response(status_code=204, headers={"cache-control": "no-store"})
    if token is not None:
        _set(answer, request, services.sign_ins.cookie, token, LIFETIME)
    return answer


@router.post("/v1/logout", operation_id="logout", status_code=204)
async def logout(request: Request, services: Shared) -> Response:
    """Sign out: the cookie is removed, and copies of it let nobody in any more."""
    services.sign_ins.end(request.scope["headers"])
    answer = Response(status_code=204, headers={"cache-control": "no-store"})
    _set(answer, request, services.sign_ins.cookie, "", 0)
    return answer


def _set(answer: Response, request: Request, name: str, value: str, max_age: int) -> None:
    # Behind a proxy that ends TLS, only the browser knows what it speaks.
    origin = request.headers.get("origin", "")
    secure = request.scope["scheme"] == "https" or origin.lower().startswith("https://")
    answer.set_cookie(
        name, value, max_age=max_age, path="/", secure=secure, httponly=True, samesite="strict"
    )
