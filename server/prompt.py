"""Prompts: tokenising them beside the streams, and the room that they leave for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from model.engine.messages import ModelInfo
from server.errors import ContextLengthExceeded

T = TypeVar("T")

TOKENIZE_INLINE_CHARACTERS = 16_384
CHARACTERS_PER_LOGGED_TOKEN = 16  # to read a token of a log takes as long as to encode so many


async def off_loop(num_characters: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in a thread, so that no stream waits for it."""
    if num_characters <= TOKENIZE_INLINE_CHARACTERS:
        return work()
    return await asyncio.to_thread(work)


def room_for_answer(
    model: ModelInfo, num_prompt_tokens: int, max_tokens: int | None, *, param: str
) -> int:
    """How many tokens the answer may have. Raises ContextLengthExceeded, with the numbers, when the
    prompt or the asked answer does not fit: nothing is ever cut silently."""
    room = model.max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the model's context length is {model.max_model_len} tokens, and the prompt alone has "
            f"{num_prompt_tokens}; shorten it by at least {1 - room} tokens",
            param=param,
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthExceeded(
            f"the model's context length is {model.max_model_len} tokens, but "
            f"{num_prompt_tokens + max_tokens} were asked for ({num_prompt_tokens} in the prompt, "
            f"{max_tokens} for the answer); shorten the prompt or ask for at most {room}",
            param=param,
        )
    return room if max_tokens is None else max_tokens
