"""The bodies of `/v1/messages`: Anthropic's messages, and what they are in a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import ConfigDict, Field

from model.engine.request import Grammar
from server.api.body import Part
from server.api.chat import MAX_MESSAGES, ChatMessage
from server.api.sampling import SamplingFields, Stops
from server.api.session_fields import Text
from server.api.structured import schema_grammar
from server.api.template_fields import Keywords, keywords
from server.api.tool_fields import MAX_TOOLS, Choice, FunctionName, ToolUse
from server.errors import InvalidRequest, NoThreads, UnsupportedParameter

_REFUSED = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls nobody",
    "context_management": "nothing is compacted here",
    "compaction": "nothing is compacted here",
    "fallbacks": "this server has one model",
    "stop": "it is named `stop_sequences` here",
    "response_format": "it is `output_config.format` here",
}
_CHOICES: dict[str, Choice] = {
    "auto": "auto",
    "any": "required",
    "tool": "function",
    "none": "none",
}
_IGNORED_BLOCKS = ("thinking", "redacted_thinking")


class Block(Part):
    """A content block; its `type` tells which of the fields it has."""

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None
    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: FunctionName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    content: (
        Text | Annotated[list[Block], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None


Content = Text | Annotated[list[Block], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class Message(Part):
    role: Literal["user", "assistant"]
    content: Content

    def in_chat(self, param: str) -> Iterator[ChatMessage]:
        """The message as those of a chat, where each result of a tool is one of its own. Raises
        InvalidRequest, UnsupportedParameter."""
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for i, block in enumerate(_blocks(self.content)):
            where = f"{param}.content.{i}"
            if block.type == "tool_result" and self.role == "user":
                _need(block, where, "tool_use_id")
                if texts:
                    yield ChatMessage(role="user", content="".join(texts))
                    texts = []
                said = text_of(block.content or "", f"{where}.content")
                yield ChatMessage(role="tool", content=said, tool_call_id=block.tool_use_id)
            elif block.type == "tool_use" and self.role == "assistant":
                _need(block, where, "id", "name", "input")
                arguments = msgspec.json.encode(block.input).decode()
                function = {"name": block.name, "arguments": arguments}
                calls.append({"id": block.id, "type": "function", "function": function})
            else:
                texts.append(_text(block, where))
        if texts or calls or not self.content:
            said_all = {"role": self.role, "content": "".join(texts), "tool_calls": calls or None}
            yield ChatMessage.of(f"{param}.content", **said_all)


class MessageTool(Part):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Part):
    model_config = ConfigDict(protected_namespaces=())

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    format: OutputFormat | None = None


class ThinkingConfig(Part):
    type: Annotated[str, Field(max_length=64)]


class CountTokensRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Content | None = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: ThinkingConfig | None = None
    chat_template_kwargs: Keywords | None = None
    output_format: OutputFormat | None = None  # what `output_config.format` was called before

    def check(self) -> None:
        """Raises UnsupportedParameter and InvalidRequest for what the types cannot say."""
        if (self.model_extra or {}).get("thread") is not None:
            raise NoThreads
        self.refuse(_REFUSED)
        if (self.n or 1) > 1:
            raise InvalidRequest("`n` must be 1: a message is one answer", param="n")

    def in_chat(self) -> list[ChatMessage]:
        """The system prompt and the messages. Raises InvalidRequest, UnsupportedParameter."""
        said = []
        if self.system:
            said.append(ChatMessage(role="system", content=text_of(self.system, "system")))
        for i, message in enumerate(self.messages):
            said += message.in_chat(f"messages.{i}")
        return said

    @property
    def goes_on(self) -> bool:
        """Whether the answer goes on with the last message, which is the assistant's own."""
        last = self.messages[-1]
        blocks = _blocks(last.content)
        return last.role == "assistant" and all(block.type != "tool_use" for block in blocks)

    def keywords(self) -> dict[str, Any]:
        """What the chat template gets beside messages and tools. Raises InvalidRequest."""
        disabled = self.thinking is not None and self.thinking.type == "disabled"
        return keywords(self.chat_template_kwargs, thinks=not disabled)

    def tool_use(self) -> ToolUse:
        """Raises InvalidRequest."""
        choice = self.tool_choice or ToolChoice(type="auto")
        if choice.type == "tool" and choice.name is None:
            raise InvalidRequest("`tool_choice.name` is missing", param="tool_choice.name")
        functions = []
        for tool in self.tools or []:
            function = {"name": tool.name, "parameters": tool.input_schema}
            if tool.description is not None:
                function["description"] = tool.description
            functions.append(function)
        return ToolUse.of(
            functions,
            _CHOICES[choice.type],
            choice.name if choice.type == "tool" else None,
            parallel=not choice.disable_parallel_tool_use,
            schema="input_schema",
        )

    def _make_grammars(self) -> dict[str, Grammar]:
        config = self.output_config or OutputConfig()
        formats = {"output_config.format": config.format, "output_format": self.output_format}
        return {
            name: schema_grammar(format.schema_, f"{name}.schema")
            for name, format in formats.items()
            if format is not None
        } | super()._make_grammars()


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: Stops | None = None


def text_of(content: Content, param: str) -> str:
    """The text of content that may hold nothing else. Raises UnsupportedParameter."""
    return "".join([_text(block, f"{param}.{i}") for i, block in enumerate(_blocks(content))])


def _blocks(content: Content) -> list[Block]:
    return [Block(type="text", text=content)] if isinstance(content, str) else content


def _text(block: Block, param: str) -> str:
    if block.type in _IGNORED_BLOCKS:
        return ""
    if block.type != "text":
        raise UnsupportedParameter(
            f"`{param}` is a block of type {block.type!r}, which is not supported there; this "
            "model reads text only",
            param=param,
        )
    _need(block, param, "text")
    return block.text or ""


def _need(block: Block, param: str, *names: str) -> None:
    for name in names:
        if getattr(block, name) is None:
            raise InvalidRequest(f"`{param}.{name}` is missing", param=f"{param}.{name}")
