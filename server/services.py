"""Services: what the routes share, made once per app."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from model.hub import ModelFiles
from server.engine_client import EngineClient
from server.engine_process import EngineProcess
from server.errors import ServerDraining
from server.generations import Generations
from server.grammar_check import GrammarCheck
from server.idempotency import Idempotency
from server.inspections import Inspections
from server.journal import Journal
from server.metrics import Metrics
from server.owners import Owner, Owners
from server.sessions import Sessions
from server.settings import Settings
from server.sign_ins import SignIns
from server.store.errors import StoreError
from server.store.store import Store
from server.stored_responses import Responses
from server.supervisor import Supervisor
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tool_template import ToolTemplate


@dataclass
class Services:
    settings: Settings
    files: ModelFiles
    owners: Owners
    sign_ins: SignIns
    tokenizer: Tokenizer
    template: ChatTemplate
    client: EngineClient
    supervisor: Supervisor
    generations: Generations
    grammars: GrammarCheck
    store: Store
    journal: Journal
    sessions: Sessions
    responses: Responses
    idempotency: Idempotency
    inspections: Inspections
    metrics: Metrics
    sampling_defaults: dict[str, float]
    draining: asyncio.Task[None] | None = None

    @classmethod
    def create(
        cls,
        settings: Settings,
        files: ModelFiles,
        owners: Owners,
        store: Store,
        engine: EngineProcess | None = None,
    ) -> Services:
        tokenizer = Tokenizer.load(files.folder)
        client = EngineClient()
        metrics = Metrics(client)
        generations = Generations(
            client,
            tokenizer,
            metrics,
            max_num_seqs=settings.max_num_seqs,
            max_queue=settings.max_queue,
        )
        journal = Journal(
            store,
            generations,
            client,
            owners,
            fingerprint=tokenizer.fingerprint,
            model=f"{files.fingerprint}-{settings.quantize}",
            retention=settings.stream_retention,
            response_retention=settings.response_retention,
        )
        template = ChatTemplate.for_tokenizer(files.chat_template, tokenizer)
        sessions = Sessions(store, journal, generations, client, tokenizer, ToolTemplate(template))
        return cls(
            settings=settings,
            files=files,
            owners=owners,
            sign_ins=SignIns(owners, settings.data_folder / "signed_out"),
            tokenizer=tokenizer,
            template=template,
            client=client,
            supervisor=Supervisor(settings, files, client, metrics, engine),
            generations=generations,
            grammars=GrammarCheck(tokenizer.special_tokens),
            store=store,
            journal=journal,
            sessions=sessions,
            responses=Responses(store, journal, generations, client, sessions),
            idempotency=Idempotency(store, generations, settings.stream_retention),
            inspections=Inspections(client),
            metrics=metrics,
            sampling_defaults=read_sampling_defaults(files.folder),
        )

    async def start(self) -> None:
        """Spawn the engine, and take up what the store says is running."""
        await self.journal.start()
        self.supervisor.start()
        await asyncio.to_thread(self.tokenizer.prepare)  # the engine takes longer to get ready

    def refuse_when_draining(self) -> None:
        """Before something new is made that needs no engine. Raises ServerDraining."""
        if self.client.draining:
            raise ServerDraining(
                "the server is shutting down; send the request again in a moment", retry_after=5
            )

    async def checkpoint(self) -> None:
        """End what runs: the durable ones go on with the next start."""
        with contextlib.suppress(StoreError):
            await self.journal.flush()
        error = ServerDraining("the server is shutting down; send the request again", retry_after=5)
        self.client.end_inspections(error)
        self.generations.end_all(error)
        await self.generations.settled()

    async def stop(self) -> None:
        """The end of it all: what runs, the engine, the store."""
        self.client.draining = True
        await self.checkpoint()
        await self.journal.stop()
        await self.supervisor.stop()
        await asyncio.to_thread(self.store.close)


def read_sampling_defaults(folder: Path) -> dict[str, float]:
    """The model's own sampling parameters (`generation_config.json`): they hold where a request
    does not say otherwise."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    if document.get("do_sample") is False:
        return {}
    return {
        name: document[name]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if isinstance(document.get(name), int | float)
    }


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _owner(request: Request) -> Owner:
    """Whom the gate let in. Fails (500) where no gate was passed."""
    owner: Owner = request.scope["state"]["owner"]
    return owner


Shared = Annotated[Services, Depends(_services)]
Caller = Annotated[Owner, Depends(_owner)]
