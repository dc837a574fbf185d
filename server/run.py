"""`headwater run`: one answer on stdout, without HTTP."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.hub import ModelFiles
from server.api.chat import ChatMessage, ChatRequest, prompt_token_ids
from server.engine_process import EngineProcess
from server.errors import HeadwaterError, Overloaded
from server.events import Delta, Failed
from server.owners import Owners
from server.prompt import room_for_answer
from server.reader import read
from server.secret import load_secret
from server.services import Services
from server.settings import Settings
from server.store.store import Store
from server.text.tokenizer import TokenizerError

EXIT_ERROR, EXIT_OVERLOADED = 1, 75


@dataclass(frozen=True)
class RunOptions:
    prompt: str
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


async def run_once(
    settings: Settings, files: ModelFiles, options: RunOptions, engine: EngineProcess
) -> int:
    """Stream one answer of an engine, and stop it. Returns the exit code."""
    owners = Owners(load_secret(settings.data_folder))  # whoever runs a command needs no key
    # A server may have the store of the data folder; and nothing here is to be kept.
    folder = tempfile.TemporaryDirectory(prefix="headwater-")
    store = Store.open(None, Path(folder.name))
    services = Services.create(settings, files, owners, store, engine)
    await services.start()
    try:
        _status(f"loading {files.name}")
        await _ready(services)
        return await _answer(services, options)
    except HeadwaterError as error:
        _status(f"headwater: {error.message}\n")
        return EXIT_OVERLOADED if isinstance(error, Overloaded) else EXIT_ERROR
    except TokenizerError as error:  # of the prompt; the model's files were read above
        _status(f"headwater: {error}\n")
        return EXIT_ERROR
    finally:
        await services.stop()
        folder.cleanup()


async def _ready(services: Services) -> None:
    waits = [
        asyncio.ensure_future(services.client.ready.wait()),
        asyncio.ensure_future(services.supervisor.failed.wait()),
    ]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if services.supervisor.failed.is_set():
        raise HeadwaterError(services.client.failure or "the engine did not start")


async def _answer(services: Services, options: RunOptions) -> int:
    messages = [ChatMessage(role="user", content=options.prompt)]
    if options.system is not None:
        messages.insert(0, ChatMessage(role="system", content=options.system))
    body = ChatRequest(messages=messages, temperature=options.temperature, seed=options.seed)
    prompt = await prompt_token_ids(services, messages)
    max_tokens = room_for_answer(
        services.client.check_ready(), len(prompt), options.max_tokens, param="max_tokens"
    )
    params = body.sampling_params(services, max_tokens=max_tokens, top_logprobs=None)
    generations = services.generations.start([prompt], params, owner=services.owners.local)
    _status("")
    async for batch in read(generations):
        for _, event in batch:
            if isinstance(event, Delta):
                sys.stdout.write(event.text)
                sys.stdout.flush()
            elif isinstance(event, Failed):
                raise event.error
    if not generations[0].text.endswith("\n"):
        sys.stdout.write("\n")
    if generations[0].end.finish_reason == "length":
        _status(f"stopped after {generations[0].num_output_tokens} tokens\n")
    return 0


def _status(text: str) -> None:
    """A line on stderr that the next one replaces, where a person looks at it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text}")
    elif text.endswith("\n"):
        sys.stderr.write(text)
    sys.stderr.flush()
