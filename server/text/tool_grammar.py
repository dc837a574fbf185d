"""Grammars that leave a model nothing but valid tool calls, in the notation that is read back.

Lark, with each function's parameters as an inline JSON schema (llguidance's `%json`), so that
references inside a schema keep their root.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from model.engine.request import Grammar
from server.text.tool_prompt import Notation

MAX_CALLS = 8
_COMPACT = {"whitespace_flexible": False}
# Beside these, what an object may hold is not said by its `properties` alone.
_COMBINING = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties"}
    | {"dependentSchemas", "unevaluatedProperties"}
)


class _Spelling(NamedTuple):
    before: str
    head: str
    key: str
    tail: str
    between: str
    after: str


_SPELLINGS: dict[Notation, _Spelling] = {
    "hermes": _Spelling("", "<tool_call>\n", "arguments", "\n</tool_call>", "\n", ""),
    "llama": _Spelling("", "", "parameters", "", "; ", ""),
    "mistral": _Spelling("[", "", "arguments", "", ", ", "]"),
}


def calls_grammar(
    functions: Sequence[Mapping[str, Any]],
    notation: Notation,
    *,
    max_calls: int = MAX_CALLS,
    before: str = "",
    otherwise: Grammar | None = None,
) -> Grammar:
    """One to `max_calls` calls of `functions` (`name`, and `parameters`, a JSON schema of an
    object), after the text `before`. `otherwise`: or an answer by that JSON grammar."""
    spelling = _SPELLINGS[notation]
    more = f" ({json.dumps(spelling.between)} call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
    calls = " ".join(
        [
            *_literal(before),
            *_literal(spelling.before),
            f"call{more}",
            *_literal(spelling.after),
        ]
    )
    rules = [f"start: calls{' | answer' if otherwise is not None else ''}", f"calls: {calls}"]
    if otherwise is not None:
        schema = otherwise.text if otherwise.kind == "json_schema" else '{"type": "object"}'
        rules.append(
            " ".join(["answer:", *_literal(before), "%json", _schema_text(json.loads(schema))])
        )
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{spelling.head}{{"name": "{function["name"]}", "{spelling.key}": '
        tail = "}" + spelling.tail
        rules.append(f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps(tail)}")
        rules.append(f"arguments_{i}: %json {_schema_text(_parameters(function))}")
    return Grammar("lark", "\n".join(rules) + "\n")


def _literal(text: str) -> list[str]:
    return [json.dumps(text)] if text else []


def _schema_text(schema: Any) -> str:
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _COMPACT}
    return json.dumps(schema, separators=(",", ":"))


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: of an object, without properties if it has none, and
    closed."""
    parameters = dict(function.get("parameters") or {"properties": {}})
    if not _COMBINING & parameters.keys():
        parameters.setdefault("type", "object")
    return _closed(parameters)  # type: ignore[no-any-return]


def _closed(schema: Any) -> Any:
    """Without properties that the schema does not name, where it leaves that open: all that is
    valid then is valid by the schema too, and small models come to an end. One that says nothing
    of its properties stays open."""
    if not isinstance(schema, dict) or _COMBINING & schema.keys():
        return schema
    result = dict(schema)
    properties = result.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: _closed(inner) for name, inner in properties.items()}
        required = result.get("required", [])
        possible = isinstance(required, list) and all(name in properties for name in required)
        least = result.get("minProperties", 0)
        if possible and isinstance(least, int) and least <= len(properties):
            result.setdefault("additionalProperties", False)
    if isinstance(result.get("items"), dict):
        result["items"] = _closed(result["items"])
    return result
