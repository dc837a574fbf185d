"""What an answer must look like: `response_format`, `regex`, `grammar`, as a Grammar."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from model.engine.request import MAX_GRAMMAR_BYTES, Grammar
from server.api.body import Part
from server.errors import InvalidRequest

MAX_SCHEMA_DEPTH, MAX_SCHEMA_VALUES = 64, MAX_GRAMMAR_BYTES


def _is_short(text: str) -> str:
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"it must have at most {MAX_GRAMMAR_BYTES} bytes")
    return text


GrammarText = Annotated[
    str, Field(min_length=1, max_length=MAX_GRAMMAR_BYTES), AfterValidator(_is_short)
]


class NamedSchema(Part):
    """`strict` is accepted and makes no difference: an answer always keeps to the schema."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str | None = Field(default=None, max_length=256)
    description: str | None = Field(default=None, max_length=65_536)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar | None:
        """None for text. Raises InvalidRequest for a schema that is missing or too large."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar("json_object", "")
        param = "response_format.json_schema.schema"
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequest(
                f"`{param}` is missing; a response format of type json_schema needs it", param=param
            )
        return schema_grammar(self.json_schema.schema_, param)


def schema_grammar(schema: dict[str, Any], param: str) -> Grammar:
    """The grammar of a JSON schema. Raises InvalidRequest, naming `param`, for one that is too
    large or too deep."""
    check_depth(schema, param)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        num_bytes = len(text.encode())
    except ValueError:  # also UnicodeEncodeError
        raise InvalidRequest(
            f"`{param}` has a number or a character that JSON does not have", param=param
        ) from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"`{param}` has {num_bytes} bytes as compact JSON; at most {MAX_GRAMMAR_BYTES} are "
            "taken",
            param=param,
        )
    return Grammar("json_schema", text)


def check_depth(schema: dict[str, Any], param: str) -> None:
    """Raises InvalidRequest, naming `param`, for arrays and objects that are nested too deep, or
    have too many values. No recursion, so that any depth can be told."""
    layer: list[Any] = [schema]
    num_values = 0
    for _ in range(MAX_SCHEMA_DEPTH):
        inner: list[Any] = []
        for one in layer:
            num_values += len(one)
            if num_values > MAX_SCHEMA_VALUES:
                raise InvalidRequest(
                    f"`{param}` has more than {MAX_SCHEMA_VALUES} values", param=param
                )
            children = one.values() if isinstance(one, dict) else one
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        layer = inner
    raise InvalidRequest(
        f"`{param}` is more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter, or use $ref",
        param=param,
    )
