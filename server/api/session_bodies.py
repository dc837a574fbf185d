"""The bodies of the routes of sessions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from server.api.body import Body
from server.api.chat import Messages
from server.api.session_fields import STRUCTURED, Defaults, Metadata, Text, Title
from server.errors import InvalidRequest
from server.services import Services
from server.sessions import OnBusy, Wish
from server.store.records import SessionRecord

TurnId = Annotated[str, Field(pattern=r"^turn_[0-9a-f]{32}$")]


class NewSession(Body):
    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    instructions: Text | None = None
    metadata: Metadata | None = None
    defaults: Defaults | None = None
    overflow: Literal["error", "drop_oldest"] | None = None


class SessionChange(Body):
    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    metadata: Metadata | None = None
    defaults: Defaults | None = None
    head: TurnId | None = None


class AnswerFields(Defaults):
    """What all that makes an answer has in common."""

    on_busy: OnBusy | None = None
    _own: ClassVar[frozenset[str]] = frozenset()  # what no default of the session's says

    async def wish(self, services: Services, session: SessionRecord) -> Wish:
        """How the answer is to be drawn: as the body says, else as the session's defaults do.
        A grammar of the body's takes the place of the defaults' one."""
        if (self.n or 1) > 1:
            raise InvalidRequest(
                "`n` must be 1: a turn has one answer, and `regenerate` makes another", param="n"
            )
        own = any(getattr(self, name) is not None for name in STRUCTURED)
        fields = self.model_copy(
            update={
                name: value
                for name, value in Defaults.model_validate(session.defaults)
                if getattr(self, name) is None
                and name not in self._own
                and not (name in STRUCTURED and own)
            }
        )
        for param, grammar in fields.grammars().items():
            await services.grammars.check(grammar, param=param)
        if self.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        top = (fields.top_logprobs or 0) if fields.logprobs else None
        return Wish(
            lambda max_tokens: fields.sampling_params(
                services, max_tokens=max_tokens, top_logprobs=top
            ),
            fields.max_tokens,
            fields.stop or [],
        )


class NewTurn(AnswerFields):
    input: str | Messages
    parent: TurnId | None = None
    answer: bool | None = None

    def messages(self) -> list[dict[str, Any]]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [message.rendered(i, "input") for i, message in enumerate(self.input)]


class Regenerate(AnswerFields):
    _own: ClassVar[frozenset[str]] = frozenset(
        {"seed"}
    )  # with the one of the answer before, it would be the same answer

    turn: TurnId | None = None


class Continue(Body):
    model_config = ConfigDict(extra="forbid")

    stream: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    on_busy: OnBusy | None = None


class Fork(Body):
    model_config = ConfigDict(extra="forbid")

    at: TurnId | None = None
    token: int | None = Field(default=None, ge=0)
    replace: int | None = Field(default=None, ge=0)
