"""Tools in prompts: through templates that know them, and through those that do not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.text.chat_template import CHATML, ChatTemplate
from server.text.reasoning import thinking
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import ToolCallDelta, ToolCallParser
from server.text.tool_prompt import knows_tools, notation, with_tools

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}},
}
ARGUMENTS = '{"city":"Rome"}'
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": "weather", "arguments": ARGUMENTS},
            }
            for i in range(2)
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "Sun"},
    {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
]

QWEN = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n"
    "{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>\n{% endfor %}{% endfor %}"
)
LLAMA = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    '{% for tool in tools or [] %}{{ tool | tojson }}{"name": "parameters"}<|python_tag|>'
    "{% endfor %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{% for call in message.tool_calls or [] %}[TOOL_CALLS]"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "{{ call.id }}{% endfor %}{% if message.role == 'tool' %}{{ message.tool_call_id }}{% endif %}"
    "{% endfor %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, None, None)


def test_what_a_template_knows_is_found_out() -> None:
    found = [(knows_tools(t), notation(t)) for t in map(template, (CHATML, QWEN, LLAMA, MISTRAL))]
    assert found == [(False, "hermes"), (True, "hermes"), (True, "llama"), (True, "mistral")]
    broken = template("{% if tools %}{{ raise_exception('no tools') }}{% endif %}")
    assert not knows_tools(broken)


def test_a_template_that_knows_tools_gets_them() -> None:
    messages, tools = with_tools(template(QWEN), MESSAGES, [TOOL])
    text = template(QWEN).render(messages, tools=tools)
    assert f"<tools>{json.dumps(TOOL)}</tools>" in text
    assert text.count('{"name": "weather", "arguments": {"city": "Rome"}}') == 2
    assert "tool: Rain" in text
    assert MESSAGES[2]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS  # as it was


def test_arguments_that_are_no_object_stay_text() -> None:
    broken = {"name": "weather", "arguments": '{"city":'}
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": broken}]}
    (told,), _ = with_tools(template(QWEN), [message], [])
    assert told["tool_calls"][0]["function"]["arguments"] == '{"city":'


def test_mistral_gets_ids_of_its_own_kind() -> None:
    messages, tools = with_tools(template(MISTRAL), MESSAGES, [TOOL])
    text = template(MISTRAL).render(messages, tools=tools)
    ids = [text[i + 12 : i + 21] for i in range(len(text)) if text.startswith("[TOOL_CALLS]", i)]
    assert len(set(ids)) == 2
    assert text.endswith("".join(ids))


def test_where_the_template_knows_no_tools_the_notation_is_ours() -> None:
    messages, tools = with_tools(template(CHATML), MESSAGES, [TOOL])
    assert tools is None
    system, user, assistant, results = messages
    assert json.dumps(TOOL, separators=(",", ":")) in system["content"].splitlines()
    assert system["content"].endswith("\n\nBe brief.")
    assert user == MESSAGES[1]
    assert "tool_calls" not in assistant
    assert results == {
        "role": "user",
        "content": "<tool_response>\nSun\n</tool_response>\n"
        "<tool_response>\nRain\n</tool_response>",
    }
    parser = ToolCallParser({"weather"})  # what was said reads back as it was
    assert parser.feed(assistant["content"]) == [
        "Let me see.",
        ToolCallDelta(0, "weather", ARGUMENTS),
        ToolCallDelta(1, "weather", ARGUMENTS),
    ]
    assert MESSAGES[2]["content"] == "Let me see."  # the request's own are as they were


def test_the_system_prompt_comes_first_also_without_one_and_only_with_tools() -> None:
    messages, _ = with_tools(template(CHATML), MESSAGES[1:2], [TOOL])
    assert [message["role"] for message in messages] == ["system", "user"]
    assert '{"name": "the function\'s name", "arguments": {' in messages[0]["content"]
    assert with_tools(template(CHATML), MESSAGES[:2], []) == (MESSAGES[:2], None)


@pytest.mark.parametrize(
    ("source", "prompt", "expected"),
    [
        ("{{ messages }}", "<think>\n", "no"),
        ("{% if x %}<think>{% endif %}", "assistant\n", "may"),
        ("<think>", "<think>\n\n</think>\n\n", "may"),
        ("</think>", "assistant\n<think>\n", "does"),
    ],
)
def test_whether_an_answer_thinks(
    byte_level: Tokenizer, source: str, prompt: str, expected: str
) -> None:
    assert thinking(source, byte_level, byte_level.encode(prompt)) == expected
