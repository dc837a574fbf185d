"""The bodies of the inspect routes, with their limits. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from model.engine.messages import AttentionInspection, CacheInspection, ForwardInspection, ModelInfo
from server.api.body import Body
from server.api.chat import Messages, prompt_token_ids
from server.api.session_fields import Text
from server.errors import ContextLengthExceeded, InvalidRequest
from server.off_loop import off_loop
from server.prompt import check_can_fit, room_for_answer
from server.services import Services

MAX_TOKENS = 4096
MAX_TOKENS_WITH_LAYERS = 512
MAX_ATTENTION_TOKENS = 512
MAX_VALUES = 300_000  # of one array of an attention answer
TOP_K, MAX_TOP_K = 10, 50
NEW_TOKENS, MAX_NEW_TOKENS = 100, 256
MAX_RECOMPUTED = 1 << 18  # tokens that a generation without the KV cache computes

Place = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[Place], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]


class TextBody(Body):
    """`POST /v1/inspect/tokens`: a text as it stands, or messages by the chat template."""

    model_config = ConfigDict(extra="forbid")

    text: Text | None = None
    messages: Messages | None = None

    async def prompt(self, services: Services) -> list[int]:
        """The token ids. Raises InvalidRequest unless there is exactly one of the two."""
        if (self.text is None) == (self.messages is None):
            raise InvalidRequest("give either `text` or `messages`", param="text")
        if self.messages is not None:
            return await prompt_token_ids(services, self.messages)
        text = self.text or ""
        check_can_fit(services.tokenizer, services.client.model, len(text), param="text")
        return await off_loop(len(text), lambda: services.tokenizer.encode_prompt(text))

    @property
    def given(self) -> str:
        """The name of the field that has the tokens."""
        return "text" if self.messages is None else "messages"


class SubjectBody(TextBody):
    """What forward and attention have in common: the tokens may also be given as ids."""

    token_ids: TokenIds | None = None

    @property
    def given(self) -> str:
        return super().given if self.token_ids is None else "token_ids"

    async def subject(self, services: Services, model: ModelInfo, limit: int) -> list[int]:
        """At least one token, at most `limit`. Raises InvalidRequest."""
        if self.token_ids is None:
            ids = await self.prompt(services)
        elif self.text is not None or self.messages is not None:
            raise InvalidRequest("give one of `text`, `messages`, `token_ids`", param="token_ids")
        else:
            ids = self.token_ids
            if max(ids) >= model.vocab_size:
                raise InvalidRequest(
                    f"`token_ids` has {max(ids)}; this model's ids go to {model.vocab_size - 1}",
                    param="token_ids",
                )
        return _checked(ids, model, limit, self.given)


class ForwardBody(SubjectBody):
    """`POST /v1/inspect/forward`"""

    top_k: int | None = Field(default=None, ge=1, le=MAX_TOP_K)
    layers: Literal["all"] | Annotated[list[Place], Field(fail_fast=True)] | None = None

    async def inspection(
        self, services: Services, model: ModelInfo
    ) -> tuple[list[int], ForwardInspection]:
        """The tokens, and what to look for. Raises InvalidRequest for what is beyond a limit."""
        if self.layers == "all":
            layers = list(range(model.num_layers))
        else:
            layers = sorted(set(self.layers or ()))
        _check_places(layers, model.num_layers, "layers", "layer")
        limit = MAX_TOKENS_WITH_LAYERS if layers else MAX_TOKENS
        ids = await self.subject(services, model, limit)
        return ids, ForwardInspection(self.top_k or TOP_K, layers)


class AttentionBody(SubjectBody):
    """`POST /v1/inspect/attention`"""

    layer: Place
    head: Literal["all"] | Place | None = None
    queries: Annotated[list[Place], Field(min_length=1, fail_fast=True)] | None = None

    async def inspection(
        self, services: Services, model: ModelInfo
    ) -> tuple[list[int], AttentionInspection]:
        """The tokens, and what to look for. Raises InvalidRequest for what is beyond a limit."""
        _check_places([self.layer], model.num_layers, "layer", "layer")
        heads = [self.head] if isinstance(self.head, int) else list(range(model.num_heads))
        _check_places(heads, model.num_heads, "head", "head")
        ids = await self.subject(services, model, MAX_ATTENTION_TOKENS)
        if self.queries is None:
            queries = list(range(len(ids)))
        else:
            queries = sorted(set(self.queries))
            _check_places(queries, len(ids), "queries", "token")
        num_values = len(heads) * sum(query + 1 for query in queries)
        if num_values > MAX_VALUES:
            raise InvalidRequest(
                f"each array of the answer would have {num_values} values; at most {MAX_VALUES} "
                "are given: ask for fewer `queries`, or for one `head`",
                param="queries",
            )
        return ids, AttentionInspection(self.layer, heads, queries)


class CacheBody(TextBody):
    """`POST /v1/inspect/kv-cache`"""

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_NEW_TOKENS)

    async def inspection(
        self, services: Services, model: ModelInfo
    ) -> tuple[list[int], CacheInspection]:
        """The prompt, and how many tokens to draw. Raises InvalidRequest for what is beyond a
        limit."""
        ids = _checked(await self.prompt(services), model, MAX_TOKENS, self.given)
        num_new = self.max_tokens or NEW_TOKENS
        room_for_answer(model, len(ids), num_new, param="max_tokens")
        recomputed = num_new * len(ids) + num_new * (num_new - 1) // 2
        if recomputed > MAX_RECOMPUTED:
            raise InvalidRequest(
                f"without the cache {recomputed} tokens would be computed; at most "
                f"{MAX_RECOMPUTED} are: shorten the prompt of {len(ids)} tokens, or ask for fewer",
                param="max_tokens",
            )
        return ids, CacheInspection(num_new)


def _checked(ids: list[int], model: ModelInfo, limit: int, param: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"`{param}` has no tokens; at least one is needed", param=param)
    if len(ids) > model.max_model_len:
        raise ContextLengthExceeded(
            f"the model's context length is {model.max_model_len} tokens, and `{param}` has "
            f"{len(ids)}; shorten it",
            param=param,
        )
    if len(ids) > limit:
        raise InvalidRequest(
            f"`{param}` has {len(ids)} tokens; this inspection takes at most {limit}", param=param
        )
    return ids


def _check_places(places: list[int], count: int, param: str, what: str) -> None:
    if places and places[-1] >= count:
        raise InvalidRequest(
            f"`{param}` has {places[-1]}; there are {count}, so a {what} is from 0 to {count - 1}",
            param=param,
        )
