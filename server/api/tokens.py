"""POST /tokenize and POST /detokenize"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.body import Part
from server.api.chat import Messages, check_end, prompt_token_ids
from server.api.template_fields import TemplateFields
from server.api.tool_fields import ToolFields
from server.errors import InvalidRequest
from server.off_loop import off_loop
from server.responses import json_response
from server.services import Shared

router = APIRouter()

MAX_TEXT_CHARACTERS, MAX_TOKENS = 1 << 20, 1_000_000


class TokenizeRequest(ToolFields, TemplateFields, Part):
    """A prompt as chat completions make it: with these `tools`, too."""

    text: str | None = Field(default=None, max_length=MAX_TEXT_CHARACTERS)
    messages: Messages | None = None

    def check(self) -> None:
        """Raises InvalidRequest and UnsupportedParameter for what the types cannot say."""
        if (self.text is None) == (self.messages is None):
            raise InvalidRequest("give either `text` or `messages`", param="text")
        self.check_template_fields()
        if self.messages is not None:
            check_end(self.messages, bool(self.continue_final_message))


class DetokenizeRequest(Part):
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=MAX_TOKENS, fail_fast=True)


@router.post("/tokenize", operation_id="tokenize")
async def tokenize(body: TokenizeRequest, services: Shared) -> Response:
    """Text, or messages by the chat template, as token ids and their pieces."""
    body.check()
    if body.messages is not None:
        ids = await prompt_token_ids(
            services,
            body.messages,
            continue_final_message=bool(body.continue_final_message),
            tools=body.tool_use().tools,
            keywords=body.keywords(),
            must_fit=False,
        )
    else:
        text = body.text or ""
        ids = await off_loop(len(text), lambda: services.tokenizer.encode(text))
    model = services.client.model
    return json_response(
        {
            "tokens": ids,
            "pieces": await off_loop(len(ids), lambda: [services.tokenizer.piece(i) for i in ids]),
            "count": len(ids),
            "max_model_len": None if model is None else model.max_model_len,
        }
    )


@router.post("/detokenize", operation_id="detokenize")
async def detokenize(body: DetokenizeRequest, services: Shared) -> Response:
    """Token ids as text, special tokens spelled out."""
    last = services.files.config.vocab_size - 1
    if body.tokens and max(body.tokens) > last:
        raise InvalidRequest(
            f"`tokens` has {max(body.tokens)}; this model's ids go to {last}", param="tokens"
        )
    text = await off_loop(
        4 * len(body.tokens), lambda: services.tokenizer.decode(body.tokens, skip_special=False)
    )
    return json_response({"text": text, "count": len(body.tokens)})
