"""Prompts: whether they fit, and the room that they leave for an answer, in tokens."""

from __future__ import annotations

from model.engine.messages import ModelInfo
from server.errors import ContextLengthExceeded
from server.text.tokenizer import Tokenizer


def check_can_fit(
    tokenizer: Tokenizer, model: ModelInfo | None, num_characters: int, *, param: str
) -> None:
    """Raises ContextLengthExceeded for so long a text that no tokenising is needed to see that it
    does not fit."""
    if model is None:
        return
    least = tokenizer.least_tokens(num_characters)
    if least > model.max_model_len:
        raise ContextLengthExceeded(
            f"the model's context length is {model.max_model_len} tokens, and the prompt alone has "
            f"at least {least}: it has {num_characters} characters",
            param=param,
        )


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
