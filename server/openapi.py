"""The OpenAPI document: FastAPI's, with what it cannot see in the code.

`python -m server.openapi > docs/openapi.json` writes the snapshot that a test compares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import server
from server.answer_schemas import SCHEMAS, ref
from server.responses import speaks_anthropic

DESCRIPTION = (
    "A streaming text-generation server whose sessions and streams are durable. Events of streams "
    "and every field are described in docs/api.md and docs/sessions.md."
)
# What FastAPI answers with by itself, and this server never does.
_NOT_OURS = ("HTTPValidationError", "ValidationError")


@dataclass(frozen=True)
class Answer:
    """What a route answers with 200: an object of that schema, or one of the other media types."""

    schema: str | None = None
    media: tuple[str, ...] = ()


SSE = "text/event-stream"
_ANSWERS = {
    "create_chat_completion": Answer("ChatCompletion", (SSE,)),
    "create_completion": Answer("Completion", (SSE,)),
    "create_response": Answer("Response", (SSE,)),
    "count_response_tokens": Answer("InputTokens"),
    "read_response": Answer("Response", (SSE,)),
    "cancel_response": Answer("Response"),
    "delete_response": Answer("Deleted"),
    "list_input_items": Answer("ItemList"),
    "create_conversation": Answer("Conversation"),
    "read_conversation": Answer("Conversation"),
    "change_conversation": Answer("Conversation"),
    "delete_conversation": Answer("Deleted"),
    "list_conversation_items": Answer("ItemList"),
    "create_conversation_items": Answer("ItemList"),
    "read_conversation_item": Answer("Item"),
    "delete_conversation_item": Answer("Conversation"),
    "create_message": Answer("Message", (SSE,)),
    "count_message_tokens": Answer("TokenCount"),
    "create_session": Answer("Session"),
    "list_sessions": Answer("SessionList"),
    "import_session": Answer("Session"),
    "read_session": Answer("Session"),
    "change_session": Answer("Session"),
    "read_tree": Answer("SessionTree"),
    "read_cache": Answer("SessionCache"),
    "export_session": Answer("SessionExport", ("text/markdown",)),
    "append_turn": Answer("Turn", (SSE,)),
    "regenerate_turn": Answer("Turn", (SSE,)),
    "continue_turn": Answer("Turn", (SSE,)),
    "cancel_turn": Answer("Generation"),
    "fork_session": Answer("Session"),
    "read_stream": Answer(None, (SSE,)),
    "cancel_stream": Answer("Generation"),
    "list_models": Answer("ModelList"),
    "get_model": Answer("Model"),
    "tokenize": Answer("Tokens"),
    "detokenize": Answer("DetokenizedText"),
    "health": Answer("Health"),
    "ready": Answer("Ready"),
    "metrics": Answer(None, ("text/plain",)),
    "version": Answer("Version"),
}

_ASKED = {"messages": [{"role": "user", "content": "Why do rivers bend?"}], "max_tokens": 20}
_EXAMPLES: dict[str, Any] = {
    "create_chat_completion": _ASKED,
    "create_completion": {"prompt": "The river bends because", "max_tokens": 12},
    "create_response": {"input": "Why do rivers bend?", "max_output_tokens": 20},
    "count_response_tokens": {"input": "Why do rivers bend?"},
    "create_conversation": {"metadata": {"topic": "rivers"}},
    "change_conversation": {"metadata": {"topic": "lakes"}},
    "create_conversation_items": {"items": [{"role": "user", "content": "I like rivers."}]},
    "create_message": _ASKED,
    "count_message_tokens": {"messages": _ASKED["messages"]},
    "create_session": {"title": "Rivers", "defaults": {"max_tokens": 20}},
    "change_session": {"title": "Lakes"},
    "append_turn": {"input": "Why do rivers bend?"},
    "regenerate_turn": {"seed": 1},
    "continue_turn": {"max_tokens": 20},
    "fork_session": {},
    "login": {"api_key": "hw-..."},
    "tokenize": {"text": "Why do rivers bend?"},
    "detokenize": {"tokens": [1, 2, 3]},
    "inspect_tokens": {"text": "Sarah fed the cat because it"},
    "inspect_forward": {"text": "Sarah fed the cat because it", "top_k": 5, "layers": [0, 1]},
    "inspect_attention": {"text": "Sarah fed the cat because it", "layer": 1, "head": 0},
    "inspect_kv_cache": {"messages": _ASKED["messages"], "max_tokens": 20},
}


class DescribedApp(FastAPI):
    """An application whose document says what its routes answer."""

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = _described(self)
        return self.openapi_schema


def _described(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="Headwater",
        version=server.__version__,
        description=DESCRIPTION,
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in _NOT_OURS:
        schemas.pop(name, None)
    clashes = schemas.keys() & SCHEMAS.keys()
    schemas.update({f"{name}Body": schemas.pop(name) for name in clashes})
    text = json.dumps(document)
    for name in clashes:
        text = text.replace(f'"#/components/schemas/{name}"', f'"#/components/schemas/{name}Body"')
    document = dict(json.loads(text))
    document["components"]["schemas"].update(SCHEMAS)
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe(path, operation)
    return document


def _describe(path: str, operation: dict[str, Any]) -> None:
    name = operation["operationId"]
    responses = operation["responses"]
    responses.pop("422", None)
    answer = _ANSWERS.get(name)
    if answer is not None:
        content: dict[str, Any] = {}
        if answer.schema is not None:
            content["application/json"] = {"schema": ref(answer.schema)}
        for media in answer.media:
            # What a schema says of events, tools do not agree on: those of ours are described.
            content[media] = {"schema": {} if media == SSE else {"type": "string"}}
        responses["200"] = {"description": "The answer", "content": content}
    if name == "read_stream":
        responses["204"] = {"description": "Nothing comes after that event"}
    if name == "ready":
        body = {"application/json": {"schema": ref("Ready")}}
        responses["503"] = {"description": "Not ready", "content": body}
    error = ref("AnthropicError" if speaks_anthropic(path) else "Error")
    responses["default"] = {
        "description": "An error",
        "content": {"application/json": {"schema": error}},
    }
    example = _EXAMPLES.get(name)
    if example is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = example


def write() -> None:
    """The document to stdout, as the snapshot has it."""
    from server.app import with_routes

    document = with_routes(DescribedApp()).openapi()
    sys.stdout.write(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
