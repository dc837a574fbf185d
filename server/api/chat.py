"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from server.api.answers import find_generation, respond
from server.api.body import Part
from server.api.chat_answer import ChatAnswer
from server.api.sampling import MAX_TOP_LOGPROBS, FormattedFields
from server.api.template_fields import TemplateFields
from server.api.tool_fields import MAX_TOOLS, ToolCall, ToolFields
from server.errors import InvalidRequest, UnsupportedParameter
from server.generation import Generation
from server.off_loop import CHARACTERS_PER_MESSAGE, off_loop
from server.prompt import check_can_fit, room_for_answer
from server.services import Caller, Services, Shared
from server.text.chat_template import TemplateError, encode_chat
from server.text.tool_prompt import with_tools

router = APIRouter()

MAX_MESSAGES = 4096

_REFUSED = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "audio": "this server makes text only",
    "moderation": "nothing is moderated here",
    "web_search_options": "this server has no web search",
    "echo": "completions have it",
    "suffix": "this model continues at the end only",
}


class ContentPart(Part):
    type: str
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = None

    @classmethod
    def of(cls, param: str, **fields: Any) -> ChatMessage:
        """What another wire says in other words. Raises InvalidRequest, naming `param`."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise InvalidRequest(f"`{param}`: {message}", param=param) from None

    def rendered(self, index: int, param: str = "messages") -> dict[str, Any]:
        """The message as a chat template gets it: plain text, `developer` as `system`."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(f"{param}.{index}.content"),
        }
        for key in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, key) is not None:
                message[key] = getattr(self, key)
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message

    def _text(self, param: str) -> str:
        if self.content is None:
            if self.role != "assistant":
                raise InvalidRequest(
                    f"`{param}` is missing; a {self.role} message needs text", param=param
                )
            return ""
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content:
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise UnsupportedParameter(
                    f"`{param}` has a part of type {part.type!r}; this model reads text only",
                    param=param,
                )
            texts.append(part.text or part.refusal or "")
        return "".join(texts)


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class ChatRequest(FormattedFields, ToolFields, TemplateFields):
    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    resumable: bool | None = None

    def check(self) -> None:
        """Raises UnsupportedParameter and InvalidRequest for what the types cannot say."""
        self.refuse(_REFUSED)
        self.check_template_fields()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidRequest(
                "`max_tokens` and `max_completion_tokens` differ; give one of them",
                param="max_tokens",
            )
        if self.resumable and (self.n or 1) > 1:
            raise InvalidRequest("`resumable` needs `n` = 1", param="n")
        check_end(self.messages, bool(self.continue_final_message))


def check_end(messages: list[ChatMessage], continue_final_message: bool) -> None:
    """Raises InvalidRequest where there is no answer to go on with."""
    if continue_final_message and messages[-1].role != "assistant":
        raise InvalidRequest(
            "`continue_final_message` needs an assistant message at the end",
            param="continue_final_message",
        )


async def prompt_token_ids(
    services: Services,
    messages: list[ChatMessage],
    *,
    continue_final_message: bool = False,
    tools: Sequence[dict[str, Any]] = (),
    keywords: Mapping[str, Any] | None = None,
    must_fit: bool = True,
) -> list[int]:
    """The token ids of a conversation, by the model's chat template, which gets `keywords` too.
    Unless it `must_fit`, it may be longer than the context."""
    keywords = keywords or {}
    said = [message.rendered(i) for i, message in enumerate(messages)]
    rendered, template_tools = with_tools(services.template, said, tools)
    told = sum(len(message["content"]) for message in rendered)
    if must_fit:
        check_can_fit(services.tokenizer, services.client.model, told, param="messages")
    size = told + len(str(template_tools)) + len(str(keywords))
    size += CHARACTERS_PER_MESSAGE * len(rendered)
    size += sum(len(str(message.get("tool_calls", ""))) for message in rendered)
    try:
        return await off_loop(
            size,
            lambda: encode_chat(
                services.tokenizer,
                services.template,
                rendered,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                tools=template_tools,
                **keywords,
            ),
        )
    except TemplateError as error:
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from None


@router.post("/v1/chat/completions", operation_id="create_chat_completion")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: Shared, owner: Caller
) -> Response:
    """An answer to a conversation, whole or as a stream of server-sent events."""
    body.check()
    tools = body.tool_use()
    model = services.client.check_ready()
    prompt = await prompt_token_ids(
        services,
        body.messages,
        continue_final_message=bool(body.continue_final_message),
        tools=tools.tools,
        keywords=body.keywords(),
    )
    max_tokens = room_for_answer(
        model, len(prompt), body.max_completion_tokens or body.max_tokens, param="messages"
    )
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(services, max_tokens=max_tokens, top_logprobs=top_logprobs)
    params, markup = tools.applied(services.template, services.tokenizer, prompt, params)
    await services.grammars.check(params.grammar, param=tools.asking(body.grammars()))
    n = body.n or 1
    async with services.idempotency.once(request, owner) as once:
        generations: list[Generation]
        if isinstance(once.made, str):
            generations = [await find_generation(services, owner, once.made)]
        elif once.made is not None:
            generations = once.made
        elif body.resumable:
            generations = [
                await services.journal.start_resumable(
                    prompt, params, owner, body.stop or [], once.record, markup
                )
            ]
            once.made = generations[0].id
        else:
            generations = services.generations.start(
                [prompt], params, owner=owner, n=n, stop=body.stop or [], markup=markup
            )
            once.made = generations
    answer = ChatAnswer(services, generations, top_logprobs, resumable=bool(body.resumable))
    return await respond(request, services, generations, answer, body)
