"""The fields of a request that are about tools, with their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from model.engine.request import Grammar, SamplingParams
from server.errors import InvalidRequest, UnsupportedParameter
from server.text.answer_text import Markup
from server.text.chat_template import ChatTemplate
from server.text.reasoning import CLOSE, Thinking, thinking
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import NAME
from server.text.tool_grammar import MAX_CALLS, calls_grammar
from server.text.tool_prompt import Notation, notation

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 64

FunctionName = Annotated[str, Field(pattern=f"^{NAME}$")]


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: FunctionDefinition


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    arguments: str


class ToolCall(BaseModel):
    """A call that an assistant's message has made."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools: `tools` are OpenAI's definitions, none where none may be
    called. `enforced`: nothing but calls may come. `name`: the only function that may be called."""

    tools: list[dict[str, Any]]
    enforced: bool = False
    name: str | None = None
    parallel: bool = True

    def applied(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
    ) -> tuple[SamplingParams, Markup]:
        """`params` with the grammar that the tools ask for, and how the answer is to be read.
        `prompt` are the token ids it answers.

        Raises InvalidRequest for two grammars that exclude each other."""
        thinks = thinking(template.source, tokenizer, prompt)
        grammar = self._grammar(params.grammar, notation(template), thinks)
        if grammar is not None and grammar is params.grammar and thinks == "does":
            thinks = "no"  # it leaves no room for the end of that
        names = tuple(tool["function"]["name"] for tool in self.tools)
        params = msgspec.structs.replace(params, grammar=grammar)
        return params, Markup(names, self.parallel, thinks)

    def _grammar(
        self, given: Grammar | None, notation: Notation, thinking: Thinking
    ) -> Grammar | None:
        """The answer's grammar, `given` being that of the request's other fields. Where the prompt
        has begun to think, it begins with the end of that."""
        if not self.tools or (given is None and not self.enforced):
            return given
        if given is not None and given.kind not in ("json_schema", "json_object"):
            raise InvalidRequest(
                "`regex` and `grammar` leave no room for tool calls; leave out `tools`, or set "
                "`tool_choice` to none",
                param="tools",
            )
        functions = [tool["function"] for tool in self.tools]
        if self.name is not None:
            functions = [function for function in functions if function["name"] == self.name]
        return calls_grammar(
            functions,
            notation,
            max_calls=MAX_CALLS if self.parallel and self.name is None else 1,
            before=f"\n{CLOSE}\n\n" if thinking == "does" else "",
            otherwise=None if self.enforced else given,
        )


class ToolFields(BaseModel):
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse:
        """The checked fields. Raises InvalidRequest and UnsupportedParameter, naming the field."""
        tools = self.tools or []
        self._check_definitions(tools)
        names = {tool.function.name for tool in tools}
        choice, name = self._choice()
        if choice in ("required", "function") and not tools:
            raise InvalidRequest(
                "`tool_choice` asks for a call, but there are no `tools`; give some, or leave it "
                "out",
                param="tool_choice",
            )
        if name is not None and name not in names:
            raise InvalidRequest(
                f"`tool_choice` names the function {name[:64]!r}, which is none of `tools`",
                param="tool_choice",
            )
        return ToolUse(
            [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools],
            enforced=choice in ("required", "function"),
            name=name,
            parallel=self.parallel_tool_calls is not False,
        )

    def _choice(self) -> tuple[str, str | None]:
        choice = self.tool_choice
        if choice is None:
            return "auto", None
        if isinstance(choice, str):
            if choice in ("none", "auto", "required"):
                return choice, None
        elif choice.get("type") == "function":
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str):
                return "function", name
        else:
            raise UnsupportedParameter(
                f"`tool_choice` of type {str(choice.get('type'))[:64]!r} is not supported; "
                'expected {"type": "function", "function": {"name": ...}}',
                param="tool_choice",
            )
        raise InvalidRequest(
            "`tool_choice` must be none, auto, required, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )

    @staticmethod
    def _check_definitions(tools: list[Tool]) -> None:
        size = 0
        seen: set[str] = set()
        for i, tool in enumerate(tools):
            name, parameters = tool.function.name, tool.function.parameters or {}
            where = f"tools.{i}.function"
            if name in seen:
                raise InvalidRequest(
                    f"`{where}.name`: there is another function {name!r}; names must differ",
                    param=f"{where}.name",
                )
            seen.add(name)
            if _depth(parameters) > MAX_SCHEMA_DEPTH:
                raise InvalidRequest(
                    f"`{where}.parameters` is nested more than {MAX_SCHEMA_DEPTH} deep",
                    param=f"{where}.parameters",
                )
            if parameters.get("type", "object") != "object":
                raise InvalidRequest(
                    f"`{where}.parameters` must be the JSON schema of an object: its `type` is "
                    f"{str(parameters['type'])[:64]!r}, expected 'object'",
                    param=f"{where}.parameters",
                )
            size += len(msgspec.json.encode(parameters))
        if size > MAX_SCHEMA_BYTES:
            raise InvalidRequest(
                f"the parameters of all `tools` together are {size} bytes of JSON; expected at "
                f"most {MAX_SCHEMA_BYTES}",
                param="tools",
            )


def _depth(document: Any) -> int:
    """How deep objects and arrays are nested; no recursion, so that any depth can be told."""
    deepest = 0
    stack = [(document, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, dict | list):
            deepest = max(deepest, depth)
            inner = value.values() if isinstance(value, dict) else value
            stack += [(item, depth + 1) for item in inner]
    return deepest
