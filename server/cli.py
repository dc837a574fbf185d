"""headwater serve | pull | run | bench | doctor"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import structlog
import typer
from pydantic import ValidationError
from rich.console import Console

import server
from model.hub import DEFAULT_MODEL, HubError, ModelFiles, check_memory, resolve
from server.settings import Settings

app = typer.Typer(
    name="headwater",
    help="A streaming text-generation server that keeps: sessions, streams, results.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="alias, local folder, .gguf file, or hub repository", show_default=False),
]


class Fault(Exception):
    """Something that ends the command: one line, exit code 1."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors for people: one line on stderr and exit code 1, never a traceback."""
    try:
        yield
    except (Fault, HubError) as error:
        sys.stderr.write(f"headwater: {error}\n")
        raise typer.Exit(1) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        reason = first["msg"].removeprefix("Value error, ")
        sys.stderr.write(f"headwater: {name}: {reason}\n")
        raise typer.Exit(2) from None


def _settings(**options: Any) -> Settings:
    """Options that were given win over the environment, which wins over `.env`."""
    return Settings(**{name: value for name, value in options.items() if value is not None})


def _version(show: bool) -> None:
    if show:
        typer.echo(f"headwater {server.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: ModelArgument = None,
    host: Annotated[str | None, typer.Option(help="address to bind [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port to bind, 0 for a free one [8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all that are usable]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="context limit in tokens")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="requests per step [32]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="requests that may wait [256]")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="KV cache, for example 512MiB")] = None,
    no_auth: Annotated[
        bool | None, typer.Option("--no-auth", help="allow an address beyond loopback without keys")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error")] = None,
) -> None:
    """Serve a model over HTTP."""
    with _explained():
        settings = _settings(
            model=model,
            host=host,
            port=port,
            device=device,
            dtype=dtype,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_queue=max_queue,
            kv_memory=kv_memory,
            no_auth=no_auth,
            log_level=log_level,
        )
        _check_address(settings)
        sock = _bind(settings)
        with contextlib.closing(sock):
            files = _resolve(settings)
            _set_up_logs(settings.log_level)
            raise typer.Exit(asyncio.run(_serve(settings, files, sock)))


async def _serve(settings: Settings, files: ModelFiles, sock: socket.socket) -> int:
    """Run until a signal, or until the engine is beyond help. Returns the exit code."""
    import uvicorn

    from server.app import begin_drain, create_app

    application = create_app(settings, files)
    services = application.state.services
    config = uvicorn.Config(
        application,
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

    def on_signal() -> None:
        if services.client.draining:  # the second one: now
            http.force_exit = True
            stop()
        else:
            begin_drain(application, settings.shutdown_grace, stop)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    watchers = [
        loop.create_task(_announce(services, sock)),
        loop.create_task(_stop_when_failed(services, stop)),
    ]
    # Not `serve`: it would take the signals for itself and end the process by raising them again.
    await http._serve(sockets=[sock])
    for task in watchers:
        task.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    if services.supervisor.failed.is_set():
        sys.stderr.write(f"headwater: {services.client.failure}\n")
        return 1
    return 0 if http.started else 1


async def _announce(services: Any, sock: socket.socket) -> None:
    """Say where the server is, and how to use it, once it takes requests."""
    await services.client.ready.wait()
    host, port = sock.getsockname()[:2]
    url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    model = services.client.model
    sys.stdout.write(
        f"Headwater serves {services.files.name} ({model.quantization}, {model.device}, context "
        f"{model.max_model_len} tokens) at {url}\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"stream": true, "messages": [{"role": "user", "content": "Why do rivers '
        "bend?\"}]}'\n\n"
        "Ctrl+C stops it.\n"
    )
    sys.stdout.flush()


async def _stop_when_failed(services: Any, stop: Any) -> None:
    await services.supervisor.failed.wait()
    stop()


@app.command()
def pull(model: ModelArgument = None) -> None:
    """Fetch and prepare a model."""
    with _explained():
        files = resolve(model or DEFAULT_MODEL, console=Console(stderr=True))
        typer.echo(f"{files.name} is ready in {files.folder}")


@app.command()
def run(
    model_or_prompt: Annotated[str | None, typer.Argument(help="a model, or the prompt")] = None,
    prompt: Annotated[str | None, typer.Argument(help="the prompt; or pipe it to stdin")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="tokens of the answer")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    system: Annotated[str | None, typer.Option(help="the system prompt")] = None,
) -> None:
    """One answer, streamed to stdout. Status goes to stderr.

    Exit codes: 0 done, 1 error, 2 usage, 75 overloaded, 130 interrupted."""
    from server.run import RunOptions, run_once

    with _explained():
        model, text = _model_and_prompt(model_or_prompt, prompt)
        _set_up_logs("error")
        settings = _settings(model=model)
        files = _resolve(settings)
        options = RunOptions(text, system, max_tokens, temperature, seed)
        try:
            code = asyncio.run(run_once(settings, files, options))
        except KeyboardInterrupt:
            code = 130
    raise typer.Exit(code)


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    concurrency: Annotated[str, typer.Option(help="levels, separated by commas")] = "1,4,16",
    num_requests: Annotated[int | None, typer.Option(help="per level [4 x level]")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="length of the prompts, about")] = 100,
    max_tokens: Annotated[int, typer.Option(help="tokens of each answer")] = 128,
    turns: Annotated[int, typer.Option(help="turns of each conversation")] = 1,
) -> None:
    """Time to first token, inter-token time, tokens/s: a table, then JSON."""
    from server.bench import main as bench_main

    with _explained():
        raise typer.Exit(
            bench_main(
                url=url,
                concurrency=[int(level) for level in concurrency.split(",")],
                num_requests=num_requests,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                turns=turns,
            )
        )


@app.command()
def doctor() -> None:
    """What this machine has, what is missing, what to do."""
    from server.doctor import examine

    raise typer.Exit(examine())


# ------------------------------------------------------------------------------------- details


def _resolve(settings: Settings) -> ModelFiles:
    files = resolve(settings.model, console=Console(stderr=True))
    check_memory(files, settings.kv_memory or 0, "float32")
    return files


def _model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str]:
    """`run "prompt"`, `run MODEL "prompt"`, or either with the prompt on stdin."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    if second is not None:
        return first, second if not piped.strip() else f"{second}\n\n{piped}"
    if first is not None and piped.strip() and (first == DEFAULT_MODEL or Path(first).exists()):
        return first, piped
    if first is not None:
        return None, first if not piped.strip() else f"{first}\n\n{piped}"
    if piped.strip():
        return None, piped
    sys.stderr.write('headwater: no prompt; give one: headwater run "Why do rivers bend?"\n')
    raise typer.Exit(2)


def _check_address(settings: Settings) -> None:
    """Without keys only a loopback address may be bound, unless it is asked for by name."""
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = settings.host == "localhost"
    if not loopback and not settings.no_auth:
        raise Fault(
            f"--host {settings.host} is reachable from other machines and no API keys are set; "
            "bind 127.0.0.1, or say --no-auth if that is what you want"
        )


def _bind(settings: Settings) -> socket.socket:
    """The listening socket: bound first, so that a taken port is known before anything loads."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise Fault(
            f"cannot listen on {settings.host}:{settings.port}: {os.strerror(error.errno or 0)}; "
            "choose another with --port (make run PORT=8001)"
        ) from None
    return sock


def _set_up_logs(level: str) -> None:
    """One line an event on stderr; values are escaped, so that no log line can be forged."""
    tty = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if tty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")


def main() -> NoReturn:
    """Entry point of the `headwater` command."""
    app()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
