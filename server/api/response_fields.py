"""The body of `POST /v1/responses`, and the input items of responses and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from model.engine.request import Grammar
from server.api.body import Part
from server.api.chat import MAX_MESSAGES, ChatMessage, Parts
from server.api.sampling import MAX_TOP_LOGPROBS, SamplingFields
from server.api.session_fields import MAX_TEXT_CHARACTERS, Metadata, Text
from server.api.structured import schema_grammar
from server.api.tool_fields import MAX_TOOLS, FunctionName, ToolUse, chosen
from server.errors import InvalidRequest, UnsupportedParameter

LOGPROBS = "message.output_text.logprobs"
_REFUSED = {
    "prompt": "templates of prompts are not kept here; send the text as `input`",
    "context_management": "nothing is compacted here; use `truncation`",
    "moderation": "nothing is moderated here",
    "logprobs": f"ask for them with `include: [{LOGPROBS!r}]`",
    "max_tokens": "it is named `max_output_tokens` here",
    "max_completion_tokens": "it is named `max_output_tokens` here",
    "response_format": "it is `text.format` here",
    "messages": "they are named `input` here",
    "chat_template_kwargs": "what is kept is written out in one way; chat completions have it",
}
_FUNCTION = {"name", "description", "parameters"}

ResponseId = Annotated[str, Field(pattern=r"^resp_[0-9a-f]{32}$")]
ConversationId = Annotated[str, Field(pattern=r"^conv_[0-9a-f]{32}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class InputItem(Part):
    """A message, a call of a tool, or what a tool said; its `type` tells which."""

    type: str | None = Field(default=None, max_length=64)
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: CallId | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    arguments: Text | None = None
    output: str | Parts | None = None

    def message(self, param: str) -> dict[str, Any] | None:
        """The item as a chat message; None for thoughts, which no prompt has. Raises
        InvalidRequest, UnsupportedParameter."""
        match self.type or ("message" if self.role else None):
            case "message":
                self._need(param, "role", "content")
                message = ChatMessage(role=self.role or "user", content=self.content)
            case "function_call":
                self._need(param, "call_id", "name", "arguments")
                function = {"name": self.name, "arguments": self.arguments}
                call = {"id": self.call_id, "type": "function", "function": function}
                message = ChatMessage.of(f"{param}.name", role="assistant", tool_calls=[call])
            case "function_call_output":
                self._need(param, "call_id", "output")
                message = ChatMessage(role="tool", content=self.output, tool_call_id=self.call_id)
            case "reasoning":
                return None
            case None:
                raise InvalidRequest(f"`{param}.type` is missing", param=f"{param}.type")
            case other:
                raise UnsupportedParameter(
                    f"`{param}.type` is {other!r}; expected message, function_call, "
                    "function_call_output or reasoning",
                    param=f"{param}.type",
                )
        head, _, index = param.rpartition(".")
        return message.rendered(int(index), head)

    def _need(self, param: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise InvalidRequest(f"`{param}.{name}` is missing", param=f"{param}.{name}")


Items = Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]


def messages_of(items: Sequence[InputItem], param: str) -> list[dict[str, Any]]:
    """The items as chat messages, in order."""
    found = (item.message(f"{param}.{i}") for i, item in enumerate(items))
    return [message for message in found if message is not None]


class TextFormat(Part):
    model_config = ConfigDict(
        protected_namespaces=(), populate_by_name=True, serialize_by_alias=True
    )

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, max_length=256)
    description: str | None = Field(default=None, max_length=65_536)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """None for text. Raises InvalidRequest."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar("json_object", "")
        if self.schema_ is None:
            raise InvalidRequest(
                "`text.format.schema` is missing; a format of type json_schema needs it",
                param="text.format.schema",
            )
        return schema_grammar(self.schema_, "text.format.schema")


class TextConfig(Part):
    format: TextFormat | None = None


class ResponseTool(Part):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


Includes = Annotated[
    list[Annotated[str, Field(max_length=64)]], Field(max_length=16, fail_fast=True)
]


class ConversationName(Part):
    id: ConversationId


class ResponseRequest(SamplingFields):
    input: Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)] | Items | None = None
    instructions: Text | None = None
    previous_response_id: ResponseId | None = None
    conversation: ConversationId | ConversationName | None = None
    store: bool | None = None
    background: bool | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    truncation: Literal["disabled", "auto"] | None = None
    include: Includes | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: Metadata | None = None

    @property
    def conversation_id(self) -> str | None:
        named = self.conversation
        return named.id if isinstance(named, ConversationName) else named

    @property
    def stored(self) -> bool:
        return self.store is not False

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the most probable tokens; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or []) else None

    def check(self) -> None:
        """Raises UnsupportedParameter and InvalidRequest for what the types cannot say."""
        self.refuse(_REFUSED)
        if (self.n or 1) > 1:
            raise InvalidRequest("`n` must be 1: a response is one answer", param="n")
        if self.conversation is not None and self.previous_response_id is not None:
            raise InvalidRequest(
                "give `conversation` or `previous_response_id`: each says what comes before",
                param="previous_response_id",
            )
        if not self.stored:
            for name in ("background", "conversation"):
                if getattr(self, name):
                    raise InvalidRequest(
                        f"`{name}` needs `store`: what is not kept cannot be found again",
                        param=name,
                    )
        if self.top_logprobs and self.wanted_logprobs is None:
            raise InvalidRequest(
                f"`top_logprobs` needs `include: [{LOGPROBS!r}]`", param="top_logprobs"
            )

    def tool_use(self) -> ToolUse:
        """Raises InvalidRequest and UnsupportedParameter, naming the field."""
        return ToolUse.of(
            [tool.model_dump(include=_FUNCTION, exclude_none=True) for tool in self.tools or []],
            *chosen(self.tool_choice, flat=True),
            parallel=self.parallel_tool_calls,
        )

    def _make_grammars(self) -> dict[str, Grammar]:
        given = super()._make_grammars()
        format = self.text.format if self.text is not None else None
        grammar = None if format is None else format.grammar()
        return given if grammar is None else {"text.format": grammar, **given}

    def input_messages(self) -> list[dict[str, Any]]:
        """The input as chat messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input or [], "input")
