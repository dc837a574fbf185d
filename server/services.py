"""Services: what the routes share, made once per app."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from model.hub import ModelFiles
from server.engine_client import EngineClient
from server.generation import Generations
from server.metrics import Metrics
from server.owners import Owner, Owners
from server.settings import Settings
from server.supervisor import Supervisor
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer


@dataclass
class Services:
    settings: Settings
    files: ModelFiles
    owners: Owners
    tokenizer: Tokenizer
    template: ChatTemplate
    client: EngineClient
    supervisor: Supervisor
    generations: Generations
    metrics: Metrics
    sampling_defaults: dict[str, float]
    draining: asyncio.Task[None] | None = None

    @classmethod
    def create(cls, settings: Settings, files: ModelFiles, owners: Owners) -> Services:
        tokenizer = Tokenizer.load(files.folder)
        client = EngineClient()
        metrics = Metrics(client)
        return cls(
            settings=settings,
            files=files,
            owners=owners,
            tokenizer=tokenizer,
            template=ChatTemplate.for_tokenizer(files.chat_template, tokenizer),
            client=client,
            supervisor=Supervisor(settings, files, client, metrics),
            generations=Generations(
                client,
                tokenizer,
                metrics,
                max_num_seqs=settings.max_num_seqs,
                max_queue=settings.max_queue,
            ),
            metrics=metrics,
            sampling_defaults=read_sampling_defaults(files.folder),
        )


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
