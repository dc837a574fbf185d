"""refusal: what is wrong with a Submit.

Bounds are checked at the edge; they are checked here again, because one bad request must never take
the engine down.
"""

from __future__ import annotations

import math

from model.engine.messages import RequestError, Submit
from model.engine.scheduler import Scheduler
from model.grammar import GrammarError


def grammar_refused(error: GrammarError) -> RequestError:
    """The error of a request whose grammar cannot be followed, at its start or later."""
    text = f"the grammar of this request cannot be followed: {error}"
    return RequestError("invalid_request_error", "invalid_value", text)


def refusal(
    message: Submit, scheduler: Scheduler, vocab_size: int, *, ended: bool
) -> RequestError | None:
    """Why this request cannot be run; None when it can. One that has `ended` already, a resumed
    one, needs no room for more tokens."""
    params = message.params
    num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
    limit = scheduler.max_model_len

    def invalid(text: str, code: str = "invalid_value") -> RequestError:
        return RequestError("invalid_request_error", code, text)

    if message.request_id in scheduler:
        return invalid("a request with this id is running already")
    if not message.prompt_token_ids:
        return invalid("the prompt has no tokens; at least one is needed")
    if not ended and (num_tokens >= limit or not scheduler.fits(num_tokens)):
        return invalid(
            f"the prompt has {num_tokens} tokens and leaves no room for an answer: the model's "
            f"context length is {limit} tokens",
            "context_length_exceeded",
        )
    parts = (
        message.prompt_token_ids,
        message.output_token_ids,
        params.stop_token_ids,
        params.logit_bias,
    )
    ids = [i for part in parts if part for i in (min(part), max(part))]
    if min(ids) < 0 or max(ids) >= vocab_size:
        return invalid(f"token ids must be from 0 to {vocab_size - 1}")
    numbers = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        *params.logit_bias.values(),
    )
    if not all(map(math.isfinite, numbers)):
        return invalid("sampling parameters must be finite numbers")
    if params.temperature < 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
        return invalid("temperature must be >= 0, top_p in (0, 1], min_p in [0, 1]")
    if params.repetition_penalty <= 0 or params.top_k < 0:
        return invalid("repetition_penalty must be > 0 and top_k >= 0")
    if not 0 <= params.min_tokens <= params.max_tokens or params.max_tokens < 1:
        return invalid("0 <= min_tokens <= max_tokens and max_tokens >= 1 are needed")
    return None
