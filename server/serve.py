"""The process of `headwater serve`: the engine, the application, signals, the first words."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from typing import Any

from model.hub import ModelFiles
from server.engine_process import EngineProcess
from server.logs import set_up_logs
from server.owners import Owners
from server.settings import Settings

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def serve_until_signal(
    settings: Settings, files: ModelFiles, owners: Owners, sock: socket.socket
) -> int:
    """Run until a signal, or until the engine is beyond help. Returns the exit code.

    Raises StoreError, TokenizerError and TemplateError."""
    signals: asyncio.Queue[None] = asyncio.Queue()  # one may come before there is what it stops
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    async with EngineProcess.spawned() as engine:  # what it imports, it imports meanwhile
        from server.app import create_app
        from server.store.store import Store

        host, port = sock.getsockname()[:2]
        store = Store.open(settings.store, settings.data_folder, f"{host}:{port}")
        with contextlib.closing(store):
            application = create_app(settings, files, owners, store, engine)
            return await _listen(application, settings, sock, signals)


async def _listen(
    application: Any, settings: Settings, sock: socket.socket, signals: asyncio.Queue[None]
) -> int:
    import uvicorn

    from server.app import begin_drain
    from server.connection import Connection

    services = application.state.services
    client = services.client
    # Why an engine could not start is the command's last line: the log need not say it as well.
    set_up_logs(
        settings.log_level, quiet=lambda: client.failure is not None and client.model is None
    )
    config = uvicorn.Config(
        application,
        http=Connection,
        ws="none",  # no route takes one, and they would be without the bounds of a Connection
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
    )
    http = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        http.should_exit = True

    async def obey() -> None:
        while True:
            await signals.get()
            if client.draining:  # the second one: now
                http.force_exit = True
                stop()
            else:
                begin_drain(application, settings.shutdown_grace, stop)

    watchers = [
        loop.create_task(obey()),
        loop.create_task(_announce(services, sock)),
        loop.create_task(_stop_when_failed(services, stop)),
    ]
    # What is here now stays: no collection of garbage looks at it, and none holds streams up.
    gc.collect()
    gc.freeze()
    # Not `serve`: it would take the signals for itself and end the process by raising them again.
    await http._serve(sockets=[sock])
    for task in watchers:
        task.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    if services.supervisor.failed.is_set():
        sys.stderr.write(f"headwater: {client.failure}\n")
        return 1
    return 0 if http.started else 1


async def _announce(services: Any, sock: socket.socket) -> None:
    """Say where the server is, and how to use it, once it takes requests."""
    from server.page import the_page

    await services.client.ready.wait()
    host, port = sock.getsockname()[:2]
    url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    model = services.client.model
    opened = "Open it in a browser, or ask from here:\n\n" if the_page().find("/") else ""
    key = ' -H "Authorization: Bearer $HEADWATER_API_KEY"' if services.owners.guarded else ""
    sys.stdout.write(
        f"Headwater serves {services.files.name} ({model.quantization}, {model.device}, context "
        f"{model.max_model_len} tokens) at {url}\n\n{opened}"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        '    -d \'{"stream": true, "messages": [{"role": "user", "content": "Why do rivers '
        "bend?\"}]}'\n\n"
        "Ctrl+C stops it.\n"
    )
    sys.stdout.flush()


async def _stop_when_failed(services: Any, stop: Any) -> None:
    await services.supervisor.failed.wait()
    stop()
