"""The fields of a request that are about tools, with their bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from model.engine.request import MAX_GRAMMAR_BYTES, Grammar, SamplingParams
from server.api.body import Part
from server.api.structured import check_depth
from server.errors import InvalidRequest, UnsupportedParameter
from server.text.answer_text import Markup
from server.text.chat_template import ChatTemplate
from server.text.reasoning import CLOSE, Thinking, thinking
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import NAME
from server.text.tool_grammar import MAX_CALLS, calls_grammar
from server.text.tool_prompt import Notation, notation

MAX_TOOLS = 128

Choice = Literal["none", "auto", "required", "function"]
FunctionName = Annotated[str, Field(pattern=f"^{NAME}$")]


class FunctionDefinition(Part):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: FunctionDefinition


class CalledFunction(Part):
    name: FunctionName
    arguments: str


class ToolCall(Part):
    """A call that an assistant's message has made."""

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

    @classmethod
    def of(
        cls,
        functions: Sequence[dict[str, Any]],
        choice: Choice,
        name: str | None,
        *,
        parallel: bool | None,
        inside: str = "",
        schema: str = "parameters",
    ) -> ToolUse:
        """What the fields of a wire say. `functions` have `name`, and what is there of
        `description`, `parameters` and `strict`; `name` is what a `choice` of "function" names. In
        the body a function's name is at `tools.0.name`, with what is `inside` before `.name`, and
        `schema` is what its parameters are called there.

        Raises InvalidRequest, naming the field."""
        _check_functions(functions, inside, schema)
        enforced = choice in ("required", "function")
        if enforced and not functions:
            raise InvalidRequest(
                "`tool_choice` asks for a call, but there are no `tools`; give some, or leave it "
                "out",
                param="tool_choice",
            )
        if name is not None and all(function["name"] != name for function in functions):
            raise InvalidRequest(
                f"`tool_choice` names the function {name[:64]!r}, which is none of `tools`",
                param="tool_choice",
            )
        tools = [{"type": "function", "function": function} for function in functions]
        return cls([] if choice == "none" else tools, enforced, name, parallel is not False)

    def asking(self, grammars: Iterable[str]) -> str:
        """The field that asks for the answer's grammar, where `grammars` are those beside the
        tools that ask for one."""
        return "tools" if self.enforced else next(iter(grammars), "tools")

    def checkable(self, template: ChatTemplate, given: Grammar | None) -> Grammar | None:
        """The grammar of `applied` as far as it can be known before the prompt: the end of
        thoughts may be in front where there are none. Raises InvalidRequest."""
        return self._grammar(
            given, notation(template), "does" if CLOSE in template.source else "no"
        )

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
    """The fields of chat."""

    model_config = ConfigDict(strict=True)

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse:
        """The checked fields. Raises InvalidRequest and UnsupportedParameter, naming the field."""
        return ToolUse.of(
            [tool.function.model_dump(exclude_none=True) for tool in self.tools or []],
            *chosen(self.tool_choice),
            parallel=self.parallel_tool_calls,
            inside=".function",
        )


def chosen(choice: str | dict[str, Any] | None, *, flat: bool = False) -> tuple[Choice, str | None]:
    """OpenAI's `tool_choice`, and the function that it names; `flat`: not within `function`.
    Raises InvalidRequest and UnsupportedParameter."""
    example = '"name": ...' if flat else '"function": {"name": ...}'
    example = f'{{"type": "function", {example}}}'
    match choice:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return choice, None
        case {"type": "function", "name": str(name)} if flat:
            return "function", name
        case {"type": "function", "function": {"name": str(name)}} if not flat:
            return "function", name
        case dict() if choice.get("type") != "function":
            raise UnsupportedParameter(
                f"`tool_choice` of type {str(choice.get('type'))[:64]!r} is not supported; "
                f"expected {example}",
                param="tool_choice",
            )
    raise InvalidRequest(
        f"`tool_choice` must be none, auto, required, or {example}", param="tool_choice"
    )


def _check_functions(functions: Sequence[Mapping[str, Any]], inside: str, schema: str) -> None:
    size = 0
    seen: set[str] = set()
    for i, function in enumerate(functions):
        name, parameters = function["name"], function.get("parameters") or {}
        where = f"tools.{i}{inside}.{schema}"
        if name in seen:
            param = f"tools.{i}{inside}.name"
            raise InvalidRequest(
                f"`{param}`: there is another function {name!r}; names must differ", param=param
            )
        seen.add(name)
        check_depth(parameters, where)
        if parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f"`{where}` must be the JSON schema of an object: its `type` is "
                f"{str(parameters['type'])[:64]!r}, expected 'object'",
                param=where,
            )
        size += len(msgspec.json.encode(parameters))
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"the schemas of all `tools` together are {size} bytes of JSON; expected at most "
            f"{MAX_GRAMMAR_BYTES}",
            param="tools",
        )
