"""create_app(settings): the factory, the lifespan, the routers, the error handlers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from model.hub import ModelFiles
from server.api import (
    chat,
    completions,
    conversations,
    docs,
    health,
    inspect,
    login,
    messages,
    models,
    page,
    responses,
    sessions,
    streams,
    tokens,
    turns,
)
from server.engine_process import EngineProcess
from server.errors import (
    HeadwaterError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
    ServerError,
)
from server.gates import CorsGate, HostGate, OwnerGate
from server.middleware import MAX_BODY_BYTES, BodyGate, RequestGate
from server.openapi import DescribedApp
from server.owners import Owners
from server.page import the_page
from server.responses import error_response, unreadable_body, validation_error
from server.services import Services
from server.settings import Settings
from server.store.errors import StoreError
from server.store.store import Store
from server.text.tokenizer import TokenizerError


def create_app(
    settings: Settings,
    files: ModelFiles,
    owners: Owners,
    store: Store,
    engine: EngineProcess | None = None,
) -> FastAPI:
    """The application that serves `files` to `owners` and keeps what is theirs in `store`, which it
    closes. Its engine is spawned when it starts up, or is the one given."""
    services = Services.create(settings, files, owners, store, engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        try:
            yield
        finally:
            await services.stop()

    app = DescribedApp(lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.services = services
    with_routes(app)
    _handle_errors(app, services)
    _add_gates(app, services)
    return app


def with_routes(app: DescribedApp) -> DescribedApp:
    """`app`, with all routes."""
    for router in (
        chat,
        completions,
        responses,
        conversations,
        messages,
        sessions,
        turns,
        streams,
        models,
        tokens,
        health,
        inspect,
        login,
        docs,
        page,
    ):
        app.include_router(router.router)
    return app


def _add_gates(app: FastAPI, services: Services) -> None:
    """The layers in front of the routes; the last one is the outermost."""
    settings, metrics = services.settings, services.metrics
    app.add_middleware(
        OwnerGate,
        owners=services.owners,
        sign_ins=services.sign_ins,
        page=the_page(),
        metrics=metrics,
    )
    app.add_middleware(HostGate, settings=settings, metrics=metrics)
    app.add_middleware(BodyGate, metrics=metrics)
    if settings.cors_origins:  # around all refusals: a page is to read why
        app.add_middleware(CorsGate, origins=settings.cors_origins, metrics=metrics)
    app.add_middleware(RequestGate, metrics=metrics)


def begin_drain(app: FastAPI, grace: float, then: Callable[[], None]) -> None:
    """Refuse new work; give running generations `grace` seconds, end the rest, and call `then`."""
    services: Services = app.state.services
    if services.client.draining:
        return
    services.client.draining = True

    async def drain() -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while len(services.generations) and loop.time() < deadline:
            await asyncio.sleep(0.05)
        try:
            await services.checkpoint()
            await asyncio.sleep(0.05)  # one turn of the loop for the last frames to leave
        finally:
            then()

    services.draining = asyncio.get_running_loop().create_task(drain(), name="drain")


def _handle_errors(app: FastAPI, services: Services) -> None:
    def answer(request: Request, error: HeadwaterError) -> Response:
        services.metrics.errors.labels(error.code).inc()
        return error_response(error, request.scope)

    @app.exception_handler(HeadwaterError)
    async def known(request: Request, error: HeadwaterError) -> Response:
        return answer(request, error)

    @app.exception_handler(StoreError)
    async def not_stored(request: Request, error: StoreError) -> Response:
        return answer(request, ServerError(f"nothing was changed: {error}"))

    @app.exception_handler(TokenizerError)
    async def not_unicode(request: Request, error: TokenizerError) -> Response:
        return answer(request, InvalidRequest(str(error)))

    @app.exception_handler(UnicodeEncodeError)
    async def half_a_pair(request: Request, _: Exception) -> Response:
        said = "the body has half of a surrogate pair, which no answer can hold"
        return answer(request, InvalidRequest(said))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, validation_error(error))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path, method = request.scope["path"], request.scope["method"]
        if error.status_code == 404:
            return answer(request, NotFound(f"there is nothing at {path}"))
        if error.status_code == 405:
            response = answer(request, MethodNotAllowed(f"{method} is not possible on {path}"))
            response.headers.update(error.headers or {})
            return response
        if error.status_code == 413:
            return answer(request, RequestTooLarge(f"the body is over {MAX_BODY_BYTES} bytes"))
        if error.status_code < 500:
            unread = unreadable_body(error.__cause__)
            return answer(request, unread or InvalidRequest(str(error.detail)))
        return answer(request, ServerError("something went wrong in the server; it is in its log"))
