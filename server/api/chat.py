"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from model.engine.messages import TokenLogprob
from server.api.answers import find_generation, finite, respond, usage, wire_reason
from server.api.sampling import MAX_TOP_LOGPROBS, SamplingFields
from server.errors import InvalidRequest, UnsupportedParameter
from server.generation import Delta, Done, Failed, Generation, Paused, read
from server.prompt import off_loop, room_for_answer
from server.services import Caller, Services, Shared
from server.sse import DONE, comment_frame, data_frame
from server.text.chat_template import TemplateError, encode_chat
from server.text.tokenizer import Tokenizer

router = APIRouter()

MAX_MESSAGES = 4096

_LATER = "it comes in a later release of this server"
_REFUSED = {
    "tools": _LATER,
    "functions": "use a server that has tools; " + _LATER,
    "function_call": _LATER,
    "regex": _LATER,
    "grammar": _LATER,
    "guided_json": _LATER,
    "guided_regex": _LATER,
    "guided_grammar": _LATER,
    "guided_choice": _LATER,
    "audio": "this server makes text only",
    "web_search_options": "this server has no web search",
}


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def rendered(self, index: int, param: str = "messages") -> dict[str, Any]:
        """The message as a chat template gets it: plain text, `developer` as `system`."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(f"{param}.{index}.content"),
        }
        for key in ("name", "tool_calls", "tool_call_id"):
            if getattr(self, key) is not None:
                message[key] = getattr(self, key)
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


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tool_choice: str | dict[str, Any] | None = None
    continue_final_message: bool | None = None
    resumable: bool | None = None

    def check(self) -> None:
        """Raises UnsupportedParameter and InvalidRequest for what the types cannot say."""
        self.refuse(_REFUSED)
        if self.response_format is not None and self.response_format.type != "text":
            raise UnsupportedParameter(
                f"`response_format` of type {self.response_format.type!r} is not supported: "
                + _LATER,
                param="response_format",
            )
        if self.tool_choice not in (None, "none", "auto"):
            raise UnsupportedParameter(
                f"`tool_choice` is not supported: {_LATER}", param="tool_choice"
            )
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
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "`continue_final_message` needs an assistant message at the end",
                param="continue_final_message",
            )


async def prompt_token_ids(
    services: Services, messages: list[ChatMessage], *, continue_final_message: bool = False
) -> list[int]:
    """The token ids of a conversation, by the model's chat template."""
    rendered = [message.rendered(i) for i, message in enumerate(messages)]
    size = sum(len(message["content"]) for message in rendered)
    try:
        return await off_loop(
            size,
            lambda: encode_chat(
                services.tokenizer,
                services.template,
                rendered,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
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
    model = services.client.check_ready()
    prompt = await prompt_token_ids(
        services, body.messages, continue_final_message=bool(body.continue_final_message)
    )
    max_tokens = room_for_answer(
        model, len(prompt), body.max_completion_tokens or body.max_tokens, param="messages"
    )
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(services, max_tokens=max_tokens, top_logprobs=top_logprobs)
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
                    prompt, params, owner, body.stop or [], once.record
                )
            ]
            once.made = generations[0].id
        else:
            generations = services.generations.start(
                [prompt], params, owner=owner, n=n, stop=body.stop or []
            )
            once.made = generations
    answer = ChatAnswer(services, generations, top_logprobs, resumable=bool(body.resumable))
    return await respond(request, services, generations, answer, body)


class ChatAnswer:
    """The chat wire of one request's generations. With `resumable`, chunks say where they are."""

    def __init__(
        self,
        services: Services,
        generations: Sequence[Generation],
        top_logprobs: int | None,
        *,
        resumable: bool = False,
    ) -> None:
        self._tokenizer = services.tokenizer
        self._metrics = services.metrics
        self._generations = generations
        self._top_logprobs = top_logprobs
        self._resumable = resumable
        first = generations[0]
        self._head: dict[str, Any] = {  # the same whoever reads it, and whenever
            "id": "chatcmpl-" + first.id.removeprefix("gen_"),
            "object": "chat.completion.chunk",
            "created": int(first.created_at),
            "model": services.files.name,
        }

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, generation in enumerate(self._generations):
            choice: dict[str, Any] = {
                "index": i,
                "message": {"role": "assistant", "content": generation.text, "refusal": None},
                "logprobs": None,
                "finish_reason": wire_reason(generation.end),
            }
            if self._top_logprobs is not None:
                choice["logprobs"] = self._logprobs(generation.logprobs)
            choices.append(choice)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self._generations, num_choices=len(self._generations)),
        }

    async def frames(self, include_usage: bool, after: int | None = None) -> AsyncIterator[bytes]:
        """Role, text deltas, one finish reason a choice, usage if asked for, `[DONE]`; or an error
        frame, then `[DONE]`. `after`: go on after that many tokens, with no role."""
        if after is None:
            role = {"role": "assistant", "content": ""}
            yield b"".join(self._frame(i, role, at=1) for i in range(len(self._generations)))
        async for batch in read(self._generations, after):
            frames = []
            for i, event in batch:
                match event:
                    case Delta():
                        if event.text or event.logprobs:
                            frames.append(self._delta_frame(i, event))
                    case Paused():
                        frames.append(comment_frame("the engine is being restarted"))
                    case Done():
                        at = 2 + len(self._generations[i].output_token_ids)
                        frames.append(self._frame(i, {}, wire_reason(event), at=at))
                    case Failed():
                        self._metrics.errors.labels(event.error.code).inc()
                        yield b"".join([*frames, data_frame(event.error.body()), DONE])
                        return
            if frames:
                yield b"".join(frames)
        last = DONE
        if include_usage:
            count = usage(self._generations, num_choices=len(self._generations))
            last = data_frame({**self._head, "choices": [], "usage": count}) + DONE
        yield last

    def _delta_frame(self, index: int, event: Delta) -> bytes:
        logprobs = None if self._top_logprobs is None else self._logprobs(event.logprobs)
        return self._frame(index, {"content": event.text}, logprobs=logprobs, at=1 + event.end)

    def _frame(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        *,
        at: int,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "choices": [choice]}
        if self._resumable:
            chunk["headwater"] = {"generation": self._generations[index].id, "event": at}
        return data_frame(chunk)

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        top = self._top_logprobs or 0
        return {
            "content": [
                {
                    **_token(self._tokenizer, entry.token_id, entry.logprob),
                    "top_logprobs": [
                        _token(self._tokenizer, token_id, logprob)
                        for token_id, logprob in entry.top[:top]
                    ],
                }
                for entry in logprobs
            ],
            "refusal": None,
        }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.piece(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.bytes_of(token_id)),
    }
