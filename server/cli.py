"""headwater serve | pull | run | bench | chat | resume | explain | key | doctor"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

import server
from model.hub import DEFAULT_MODEL, HubError, ModelFiles, check_memory, resolve
from server.engine_process import EngineProcess
from server.listen import ListenError, bind
from server.logs import set_up_logs
from server.owners import Owners, OwnersError, key_line, make_key
from server.secret import SecretError, load_secret
from server.serve import serve_until_signal
from server.settings import Settings
from server.store.errors import StoreError

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
    """Something that ends the command: one line, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors for people: one line on stderr and an exit code, never a traceback."""
    try:
        yield
    except (Fault, HubError, ListenError, OwnersError, SecretError, StoreError) as error:
        sys.stderr.write(f"headwater: {error}\n")
        raise typer.Exit(error.code if isinstance(error, Fault) else 1) from None


def _settings(**options: Any) -> Settings:
    """Options that were given win over the environment, which wins over `.env`.

    Raises Fault that names the option, or the variable, whose value is wrong."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = f"--{name.replace('_', '-')}" if name in given else f"HEADWATER_{name.upper()}"
        reason = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        got = "" if value in reason else f", got {value:.100}"
        raise Fault(f"{source}: {reason}{got}", code=2) from None


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
    ops: Annotated[str | None, typer.Option(help="auto, native, reference, avx2, portable")] = None,
    quantize: Annotated[str | None, typer.Option(help="none, q4, q8: safetensors at load")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all that are usable]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="context limit in tokens")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="requests per step [32]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="requests that may wait [256]")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="KV cache, for example 512MiB")] = None,
    disk_cache: Annotated[
        str | None, typer.Option(help="KV cache on disk, a size or off [2GiB]")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder of what outlives the server")] = None,
    store: Annotated[
        str | None, typer.Option(help="PostgreSQL URL of the store [SQLite in the data folder]")
    ] = None,
    stream_retention: Annotated[
        float | None, typer.Option(help="seconds that ended streams can be read [3600]")
    ] = None,
    response_retention: Annotated[
        float | None, typer.Option(help="seconds that responses are kept [2592000]")
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="the keys that are let in; headwater key makes them")
    ] = None,
    no_auth: Annotated[
        bool | None, typer.Option("--no-auth", help="allow an address beyond loopback without keys")
    ] = None,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="names of this server beside loopback, separated by commas")
    ] = None,
    cors_origins: Annotated[
        str | None, typer.Option(help="origins whose pages may ask [none], separated by commas")
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
            ops=ops,
            quantize=quantize,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_queue=max_queue,
            kv_memory=kv_memory,
            disk_cache=disk_cache,
            data=data,
            store=store,
            stream_retention=stream_retention,
            response_retention=response_retention,
            api_keys_file=api_keys_file,
            no_auth=no_auth,
            allowed_hosts=allowed_hosts,
            cors_origins=cors_origins,
            log_level=log_level,
        )
        owners = Owners.load(settings.api_keys_file, load_secret(settings.data_folder))
        if owners.warning:
            sys.stderr.write(f"headwater: {owners.warning}\n")
        sock = bind(settings)
        with contextlib.closing(sock):
            files = _resolve(settings)
            with _text_files_explained(files):
                raise typer.Exit(asyncio.run(serve_until_signal(settings, files, owners, sock)))


@app.command()
def pull(model: ModelArgument = None) -> None:
    """Fetch and prepare a model."""
    with _explained():
        files = resolve(_settings(model=model).model, console=Console(stderr=True))
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
    with _explained():
        model, text = _model_and_prompt(model_or_prompt, prompt)
        set_up_logs("critical")  # what goes wrong is said in one line of its own
        settings = _settings(model=model, disk_cache=0)  # a server may be using the folder
        files = _resolve(settings)

        async def answer() -> int:
            async with EngineProcess.spawned() as engine:
                from server.run import RunOptions, run_once

                options = RunOptions(text, system, max_tokens, temperature, seed)
                with _text_files_explained(files):
                    return await run_once(settings, files, options, engine)

        code = asyncio.run(answer())
    raise typer.Exit(code)


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    concurrency: Annotated[str, typer.Option(help="levels, separated by commas")] = "1,4,16",
    num_requests: Annotated[int | None, typer.Option(help="per level [4 x level]")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="length of the prompts, about")] = 100,
    max_tokens: Annotated[int, typer.Option(help="tokens of each answer")] = 128,
    turns: Annotated[int, typer.Option(help="turns of each conversation")] = 1,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWATER_API_KEY", help="where the server asks for one")
    ] = None,
) -> None:
    """Time to first token, inter-token time, tokens/s: a table, then JSON."""
    from server.bench import main as bench_main

    with _explained():
        try:
            levels = [int(level) for level in concurrency.split(",")]
        except ValueError:
            raise Fault(
                f"--concurrency: expected numbers separated by commas, got {concurrency!r}", code=2
            ) from None
        raise typer.Exit(
            bench_main(
                url=url,
                concurrency=levels,
                num_requests=num_requests,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                turns=turns,
                api_key=api_key,
            )
        )


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    session: Annotated[str | None, typer.Option(help="go on with this session")] = None,
    system: Annotated[str | None, typer.Option(help="the system prompt of a new session")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWATER_API_KEY", help="where the server asks for one")
    ] = None,
) -> None:
    """A conversation in the terminal, in a session that the server keeps. Ctrl+C stops the answer,
    not the program; Ctrl+D leaves. Of a pipe, each line is said.

    Exit codes: 0 done, 1 error, 2 usage, 75 the server cannot be reached."""
    from server.chat import chat as talk

    with _explained():
        if session is not None and not re.fullmatch(r"sess_[0-9a-f]{32}", session):
            raise Fault(f"a session is named sess_ and 32 digits, got {session!r}", code=2)
        if session is not None and system is not None:
            raise Fault("--system belongs to a new session; --session has one already", code=2)
        raise typer.Exit(talk(url, session, system, api_key))


@app.command()
def resume(
    generation: Annotated[str, typer.Argument(help="its id, as the answer's header named it")],
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWATER_API_KEY", help="where the server asks for one")
    ] = None,
) -> None:
    """Attach to a running or finished stream: its text to stdout, from the start to the end.

    Exit codes: 0 done, 1 error, 75 the server cannot be reached."""
    from server.resume import follow

    with _explained():
        if not re.fullmatch(r"gen_[0-9a-f]{32}", generation):
            raise Fault(f"a generation is named gen_ and 32 digits, got {generation!r}", code=2)
        raise typer.Exit(follow(url, generation, api_key))


@app.command()
def explain(
    text: Annotated[str, typer.Argument(help="what the model is to go on from")],
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    layer: Annotated[
        int | None, typer.Option(min=0, help="whose attention is shown [a third up]")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, max=256, help="drawn with and without the KV cache; 0: not shown")
    ] = 50,
    as_json: Annotated[
        bool, typer.Option("--json", help="one document with the server's answers")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWATER_API_KEY", help="where the server asks for one")
    ] = None,
) -> None:
    """How a running server's model goes on from a text: tokens, probabilities, attention, layers,
    and what the KV cache is worth.

    Exit codes: 0 done, 1 error, 2 usage, 75 the server is overloaded or cannot be reached."""
    from server.explain import ExplainOptions
    from server.explain import explain as print_explained

    options = ExplainOptions(text, url, api_key, layer, max_tokens, as_json)
    raise typer.Exit(print_explained(options))


@app.command()
def key(
    owner: Annotated[str, typer.Argument(help="whose key it is, as the file names its owner")],
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, max=999_999, help="answers the owner may have at a time")
    ] = None,
) -> None:
    """A fresh API key, to stdout; the line to add to the file of keys, to stderr.

    The file holds only the key's SHA-256, so the key is shown this once."""
    with _explained():
        fresh = make_key()
        line = key_line(owner, fresh, max_concurrent)
        sys.stderr.write(
            "# the key on stdout is shown this once; the file of HEADWATER_API_KEYS_FILE gets this "
            f"line:\n{line}\n"
        )
        sys.stdout.write(f"{fresh}\n")


@app.command()
def doctor() -> None:
    """What this machine has, what is missing, what to do."""
    from server.doctor import examine

    raise typer.Exit(examine())


# ------------------------------------------------------------------------------------- details


def _resolve(settings: Settings) -> ModelFiles:
    files = resolve(settings.model, console=Console(stderr=True))
    check_memory(
        files, settings.kv_memory or 0, "float32" if settings.ops == "reference" else "packed"
    )
    return files


@contextlib.contextmanager
def _text_files_explained(files: ModelFiles) -> Iterator[None]:
    """What is wrong with the model's tokenizer or chat template, as a Fault."""
    try:
        yield
    except Exception as error:
        from server.text.chat_template import TemplateError  # not before there is an engine process
        from server.text.tokenizer import TokenizerError

        if not isinstance(error, TemplateError | TokenizerError):
            raise
        raise Fault(f"{files.name} cannot be served: {error}; see {files.folder}") from None


def _model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str]:
    """`run "prompt"`, `run MODEL "prompt"`, or either with the prompt on stdin."""
    try:
        piped = ""
        if sys.stdin is not None and not sys.stdin.isatty():
            piped = sys.stdin.buffer.read().decode()  # as text it might be escaped, not refused
    except UnicodeDecodeError:
        raise Fault("what is piped to stdin is not UTF-8 text", code=2) from None
    if second is not None:
        return first, second if not piped.strip() else f"{second}\n\n{piped}"
    if first is not None and piped.strip() and (first == DEFAULT_MODEL or Path(first).exists()):
        return first, piped
    if first is not None:
        return None, first if not piped.strip() else f"{first}\n\n{piped}"
    if piped.strip():
        return None, piped
    raise Fault('no prompt; give one: headwater run "Why do rivers bend?"', code=2)


def main() -> NoReturn:
    """Entry point of the `headwater` command."""
    try:
        code = app(standalone_mode=False, prog_name="headwater")
    except typer.TyperException as error:  # wrong use: one line, as for every other fault
        text = error.format_message()
        if text:  # no command at all: the help was shown
            sys.stderr.write(f"headwater: {text} (see headwater --help)\n")
        code = error.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
