"""Events: what a reader of a generation is told, in this order; the wires are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.engine.messages import TokenLogprob
from server.errors import HeadwaterError


@dataclass(slots=True, frozen=True)
class Started:
    """The engine has admitted the request: what it found in its caches is known."""


@dataclass(slots=True, frozen=True)
class Progress:
    """Nothing to show yet: the place in the queue (0 is the next), or how much of the prompt is
    computed, as (done, total) tokens."""

    queue_position: int = -1
    prefill: tuple[int, int] | None = None


@dataclass(slots=True, frozen=True)
class Paused:
    """The engine died. Another one goes on with the very next token."""


@dataclass(slots=True, frozen=True)
class Delta:
    """Tokens and the text they show; `end` is how many output tokens there are up to its end.
    `logprobs` has one entry a token where they were asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    end: int


@dataclass(slots=True, frozen=True)
class Done:
    """The end of a log. `abort`: somebody cancelled it."""

    finish_reason: Literal["stop", "length", "abort"]


@dataclass(slots=True, frozen=True)
class Failed:
    """The end of a log that broke."""

    error: HeadwaterError


Event = Started | Progress | Paused | Delta | Done | Failed
