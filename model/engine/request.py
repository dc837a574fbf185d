"""What the engine knows of one generation: its tokens, how far they are computed, its parameters.

No torch here, and no text: a request goes from token ids to token ids.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are drawn. Bounds are checked at the edge and in `validate`.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `top_logprobs` None asks
    for no log-probabilities, 0 for the sampled token's alone. `prompt_logprobs` asks for those of
    the prompt. `seed`, `prompt_index`, `choice_index` and the position determine each draw.
    `min_tokens` and `max_tokens` count output tokens. `stop_token_ids` end the request;
    with `ignore_eos` the model's own end tokens do not.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    seed: int = 0
    prompt_index: int = 0
    choice_index: int = 0
