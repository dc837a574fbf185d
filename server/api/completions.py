"""POST /v1/completions"""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from model.engine.messages import ModelInfo, TokenLogprob
from server.api.answers import finite, respond, usage, wire_reason
from server.api.sampling import MAX_TOP_LOGPROBS, SamplingFields
from server.errors import InvalidRequest, UnsupportedParameter
from server.events import Delta, Done, Event, Failed, Paused
from server.generation import Generation
from server.off_loop import off_loop
from server.prompt import check_can_fit, room_for_answer
from server.reader import read
from server.services import Caller, Services, Shared
from server.sse import DONE, comment_frame, data_frame

router = APIRouter()

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
_SOME = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Prompts = Annotated[list[str], _SOME] | Annotated[list[TokenIds], _SOME]


class CompletionRequest(SamplingFields):
    prompt: str | TokenIds | Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None

    def check(self) -> None:
        """Raises UnsupportedParameter and InvalidRequest for what the types cannot say."""
        self.refuse(
            {
                "suffix": "this model completes at the end only",
                "response_format": "it belongs to chat; use `regex` or `grammar` here",
                "resumable": "chat completions and sessions have durable streams",
                "tools": "they belong to chat",
            }
        )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UnsupportedParameter(
                "`best_of` other than `n` is not supported: ask for `n` answers and choose",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "`max_tokens` 0 is possible with `echo: true` only; ask for at least 1",
                param="max_tokens",
            )

    async def prompts(self, services: Services) -> list[list[int]]:
        """The token ids of each prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            texts: list[str] | None = [prompt]
        elif prompt and isinstance(prompt[0], str):
            texts = [text for text in prompt if isinstance(text, str)]
        else:
            texts = None
        if texts is not None:
            longest = max(map(len, texts))
            check_can_fit(services.tokenizer, services.client.model, longest, param="prompt")
            encode = services.tokenizer.encode_prompt
            ids = await off_loop(sum(map(len, texts)), lambda: [encode(text) for text in texts])
        elif isinstance(prompt[0], int):
            ids = [[i for i in prompt if isinstance(i, int)]]
        else:
            ids = [list(one) for one in prompt if isinstance(one, list)]
        last = services.files.config.vocab_size - 1
        for one in ids:
            if not one:
                raise InvalidRequest("`prompt` is empty; give at least one token", param="prompt")
            if max(one) > last:
                raise InvalidRequest(
                    f"`prompt` has token {max(one)}; this model's ids go to {last}", param="prompt"
                )
        return ids


@router.post("/v1/completions", operation_id="create_completion")
async def create_completion(
    body: CompletionRequest, request: Request, services: Shared, owner: Caller
) -> Response:
    """The continuation of a text or of token ids, whole or as a stream."""
    body.check()
    model = services.client.check_ready()
    prompts = await body.prompts(services)
    max_tokens = _max_tokens(model, prompts, body.max_tokens)
    params = msgspec.structs.replace(
        body.sampling_params(services, max_tokens=max(max_tokens, 1), top_logprobs=body.logprobs),
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    await services.grammars.check(params.grammar, param=next(iter(body.grammars()), "grammar"))
    n = body.n or 1
    async with services.idempotency.once(request, owner) as once:
        if isinstance(once.made, list):
            generations = once.made
        else:
            generations = services.generations.start(
                prompts, params, owner=owner, n=n, stop=body.stop or []
            )
            once.made = generations
    answer = _Answer(services, body, generations, drop_output=max_tokens == 0)
    return await respond(request, services, generations, answer, body)


def _max_tokens(model: ModelInfo, prompts: list[list[int]], asked: int | None) -> int:
    longest = max(map(len, prompts))
    if asked is None:
        return min(DEFAULT_MAX_TOKENS, room_for_answer(model, longest, None, param="prompt"))
    room_for_answer(model, longest, max(asked, 1), param="prompt")
    return asked


class _Answer:
    """The completions wire of one request's generations. With `echo` the prompt comes first."""

    def __init__(
        self,
        services: Services,
        body: CompletionRequest,
        generations: list[Generation],
        *,
        drop_output: bool,
    ) -> None:
        self._tokenizer = services.tokenizer
        self._metrics = services.metrics
        self._generations = generations
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._top_logprobs = body.logprobs
        self._drop_output = drop_output
        self._offsets = [0] * len(generations)  # characters of each choice so far
        first = generations[0]
        self._head: dict[str, Any] = {  # the same whoever reads it, and whenever
            "id": "cmpl-" + first.id.removeprefix("gen_"),
            "object": "text_completion",
            "created": int(first.created_at),
            "model": services.files.name,
        }

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, generation in enumerate(self._generations):
            finish_reason = "length" if self._drop_output else wire_reason(generation.end)
            pieces: list[str] = []
            logprobs: list[TokenLogprob] = []
            if self._echo:
                pieces, logprobs = self._prompt_part(generation)
            if not self._drop_output:
                pieces += generation.pieces
                logprobs += generation.logprobs
            choices.append(self._choice(i, pieces, logprobs, finish_reason))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def frames(self, include_usage: bool) -> AsyncIterator[bytes]:
        """Text, one finish reason a choice, usage if asked for, `[DONE]`; or an error frame, then
        `[DONE]`."""
        echoed = set[int]()
        async for batch in read(self._generations):
            frames: list[bytes] = []
            for i, event in batch:
                if isinstance(event, Failed):
                    self._metrics.errors.labels(event.error.code).inc()
                    yield b"".join([*frames, data_frame(event.error.body()), DONE])
                    return
                if self._echo and i not in echoed and isinstance(event, Delta | Done):
                    echoed.add(i)  # not before: the prompt's log-probabilities come until then
                    frames.append(self._frame(i, *self._prompt_part(self._generations[i])))
                frames += self._event_frames(i, event)
            if frames:
                yield b"".join(frames)
        last = DONE
        if include_usage:
            last = data_frame({**self._head, "choices": [], "usage": self._usage()}) + DONE
        yield last

    def _event_frames(self, index: int, event: Event) -> list[bytes]:
        match event:
            case Delta() if not self._drop_output and (event.text or event.logprobs):
                start = event.end - len(event.token_ids)
                pieces = self._generations[index].pieces[start : event.end]
                return [self._frame(index, pieces, event.logprobs)]
            case Paused():
                return [comment_frame("the engine is being restarted")]
            case Done():
                reason = "length" if self._drop_output else wire_reason(event)
                return [self._frame(index, [], [], reason)]
        return []

    def _frame(
        self,
        index: int,
        pieces: list[str],
        logprobs: list[TokenLogprob],
        finish_reason: str | None = None,
    ) -> bytes:
        return data_frame(
            {**self._head, "choices": [self._choice(index, pieces, logprobs, finish_reason)]}
        )

    def _choice(
        self,
        index: int,
        pieces: list[str],
        logprobs: list[TokenLogprob],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        """`pieces` are the text that each token completes, of more tokens than `logprobs` where a
        stop string cut one."""
        listed = None
        if self._top_logprobs is not None and (logprobs or finish_reason is None):
            listed = self._logprobs(index, pieces, logprobs)
        text = "".join(pieces)
        self._offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": listed, "finish_reason": finish_reason}

    def _prompt_part(self, generation: Generation) -> tuple[list[str], list[TokenLogprob]]:
        ids = generation.prompt_token_ids
        text = self._tokenizer.decode(ids, skip_special=False)
        if self._top_logprobs is None:
            return [text], []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(self._tokenizer.bytes_of(id)) for id in ids]
        pieces[-1] += decoder.decode(b"", final=True)
        if len(text) < sum(map(len, pieces)):  # the space that the tokenizer puts in front is gone
            at = next(i for i, piece in enumerate(pieces) if piece)
            pieces[at] = pieces[at][1:]
        first = TokenLogprob(ids[0], float("nan"))  # nothing comes before it
        return pieces, [first, *generation.prompt_logprobs]

    def _logprobs(
        self, index: int, pieces: list[str], logprobs: list[TokenLogprob]
    ) -> dict[str, Any]:
        piece = self._tokenizer.piece
        offsets, offset = [], self._offsets[index]
        for _, shown in zip(logprobs, pieces, strict=False):
            offsets.append(offset)
            offset += len(shown)
        known = [entry.logprob == entry.logprob for entry in logprobs]
        return {
            "tokens": [piece(entry.token_id) for entry in logprobs],
            "token_logprobs": [
                finite(entry.logprob) if there else None
                for entry, there in zip(logprobs, known, strict=True)
            ],
            "top_logprobs": [
                {piece(token_id): finite(logprob) for token_id, logprob in entry.top}
                if there
                else None
                for entry, there in zip(logprobs, known, strict=True)
            ],
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        count = usage(self._generations, num_choices=self._n)
        if self._drop_output:
            count["total_tokens"] -= count["completion_tokens"]
            count["completion_tokens"] = 0
        return count
