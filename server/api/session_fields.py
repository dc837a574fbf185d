"""The fields of sessions with their bounds, as bodies and transcripts have them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from server.api.body import at_most
from server.api.sampling import MAX_TOP_LOGPROBS, FormattedFields
from server.errors import InvalidRequest
from server.services import Services

STRUCTURED = ("response_format", "regex", "grammar")  # of which an answer follows one
MAX_METADATA = 64
MAX_TEXT_CHARACTERS = 8 * 1024 * 1024
MAX_VALUE_CHARACTERS = 4096
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # no answer can hold one


def _is_value(value: Any) -> Any:
    match value:
        case None | bool():
            fits = True
        case str():
            fits = len(value) <= MAX_VALUE_CHARACTERS and not _HALF_PAIR.search(value)
        case int():
            fits = -(2**63) <= value < 2**63
        case float():
            fits = math.isfinite(value)
        case _:
            fits = False
    if not fits:
        raise ValueError(
            f"a value is a text of at most {MAX_VALUE_CHARACTERS} characters, a number of at most "
            "64 bits, true, false or null"
        )
    return value


# pydantic refuses half a surrogate pair only in a string that has a bound.
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
Title = Annotated[str, Field(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[Any, AfterValidator(_is_value)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]


class Defaults(FormattedFields):
    """Sampling parameters that hold where a turn does not say otherwise."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    async def check(self, services: Services) -> None:
        """Raises InvalidRequest for what would fail in every turn, naming the field."""
        try:
            if (self.n or 1) > 1:
                raise InvalidRequest("`n` must be 1: a turn has one answer", param="n")
            if self.stream:
                raise InvalidRequest("`stream` is said by each request, not here", param="stream")
            params = self.unlimited_params(services, top_logprobs=None)
            if self.max_tokens is not None:
                self.limited(params, self.max_tokens)
            await services.grammars.check(params.grammar, param=next(iter(self.grammars()), ""))
        except InvalidRequest as error:
            error.param = f"defaults.{error.param}"
            raise
