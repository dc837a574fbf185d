"""The wire of chat completions: whole answers and chunks, from the logs of generations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from model.engine.messages import TokenLogprob
from server.api.answers import finite, usage, wire_reason
from server.events import Delta, Done, Failed, Paused
from server.generation import Generation
from server.part_reader import PartReader
from server.reader import read
from server.services import Services
from server.sse import DONE, comment_frame, data_frame
from server.text.answer_text import AnswerPart, read_whole
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import call_id


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
            answer = read_whole(generation.markup, generation.text)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": answer.content or (None if answer.calls else ""),
                "refusal": None,
            }
            if answer.reasoning:
                message["reasoning_content"] = answer.reasoning
            if answer.calls:
                message["tool_calls"] = [
                    _call(generation, at, call.name, call.arguments)
                    for at, call in enumerate(answer.calls)
                ]
            choice: dict[str, Any] = {
                "index": i,
                "message": message,
                "logprobs": None,
                "finish_reason": _reason(generation.end, len(answer.calls)),
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
        readers = [PartReader(generation, after) for generation in self._generations]
        async for batch in read(self._generations, after):
            frames = []
            for i, event in batch:
                match event:
                    case Delta():
                        part, logprobs = readers[i].read(event.end)
                        if part or logprobs:
                            frames.append(self._delta_frame(i, part, logprobs, 1 + event.end))
                    case Paused():
                        frames.append(comment_frame("the engine is being restarted"))
                    case Done():
                        frames += self._end_frames(i, event, readers[i])
                    case Failed():
                        self._metrics.errors.labels(event.error.code).inc()
                        yield b"".join([*frames, data_frame(event.error.body()), DONE])
                        return
            if frames:
                yield b"".join(frames)
        last = DONE
        if include_usage:
            count = usage(self._generations, num_choices=len(self._generations))
            at = 2 + len(self._generations[0].output_token_ids)
            last = self._chunk_frame(0, at, {"choices": [], "usage": count}) + DONE
        yield last

    def _delta_frame(
        self,
        index: int,
        part: AnswerPart,
        logprobs: list[TokenLogprob],
        at: int,
        reason: str | None = None,
    ) -> bytes:
        delta: dict[str, Any] = {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.content or not (part.reasoning or part.calls):
            delta["content"] = part.content
        if part.calls:
            delta["tool_calls"] = [
                {"index": call.index, "function": {"arguments": call.arguments}}
                if call.name is None
                else {
                    "index": call.index,
                    **_call(self._generations[index], call.index, call.name, call.arguments),
                }
                for call in part.calls
            ]
        told = None if self._top_logprobs is None else self._logprobs(logprobs)
        return self._frame(index, delta, reason, told, at=at)

    def _end_frames(self, index: int, event: Done, reader: PartReader) -> list[bytes]:
        """What was held back to the end, and the finish reason. The place of the first is that of
        the end token; without one the two are one chunk where places are told, so that no reader
        gets it twice."""
        generation = self._generations[index]
        at = 2 + len(generation.output_token_ids)
        part, logprobs = reader.finish()
        reason = _reason(event, reader.num_calls)
        if not (part or logprobs):
            return [self._frame(index, {}, reason, at=at)]
        if self._resumable and not generation.end_token_ids:
            return [self._delta_frame(index, part, logprobs, at, reason)]
        held = self._delta_frame(index, part, logprobs, at - 1)
        return [held, self._frame(index, {}, reason, at=at)]

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
        return self._chunk_frame(index, at, {"choices": [choice]})

    def _chunk_frame(self, index: int, at: int, fields: dict[str, Any]) -> bytes:
        chunk = {**self._head, **fields}
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


def _reason(event: Done, num_calls: int) -> str:
    return "tool_calls" if num_calls and event.finish_reason == "stop" else wire_reason(event)


def _call(generation: Generation, index: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id(generation.id, index),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.piece(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.bytes_of(token_id)),
    }
