"""A chat template that takes OpenAI's messages about tools, whatever the model's own takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.text.chat_template import ChatTemplate, Message
from server.text.tool_prompt import with_tools


class ToolTemplate(ChatTemplate):
    """`template`, with `tools` (OpenAI's definitions) in front of all that it renders."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.source = template.source
        self.fingerprint = template.fingerprint
        self.tools = tools
        self._inner = template

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ToolTemplate:
        """The same, with other tools."""
        return ToolTemplate(self._inner, tools)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **allowed: Any,
    ) -> str:
        """As `ChatTemplate.render`; `tools` take the place of its own."""
        told, known = with_tools(self._inner, messages, self.tools if tools is None else tools)
        return self._inner.render(
            told,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=known,
            **allowed,
        )
