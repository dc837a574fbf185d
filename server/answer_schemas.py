"""JSON schemas of what the routes answer, for `/openapi.json`.

Answers are written by hand where they are made, so these are descriptions; a test holds real
answers against them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "integer", "description": "unix seconds"}
ANY: Schema = {}
ANY_OBJECT: Schema = {"type": "object"}


def null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def id_of(prefix: str) -> Schema:
    return {"type": "string", "pattern": f"^{prefix}[0-9a-f]{{32}}$"}


def record(optional: dict[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object that has all of `fields`, and may have the `optional` ones."""
    return {
        "type": "object",
        "properties": {**fields, **(optional or {})},
        "required": list(fields),
    }


def page_of(schema: Schema) -> Schema:
    return record(
        object=one_of("list"),
        data=listed(schema),
        first_id=null(TEXT),
        last_id=null(TEXT),
        has_more=FLAG,
    )


_CACHED = record(device=COUNT, host=COUNT, disk=COUNT)
_CHAT_CALL = record(id=TEXT, type=one_of("function"), function=record(name=TEXT, arguments=TEXT))
_TOP = record(token=TEXT, logprob=NUMBER, bytes=listed(COUNT))
_TOKEN = record(token=TEXT, logprob=NUMBER, bytes=listed(COUNT), top_logprobs=listed(_TOP))
_CONTENT = record({"logprobs": listed(_TOKEN), "annotations": listed(ANY)}, type=TEXT, text=TEXT)
_SESSION: dict[str, Schema] = {
    "id": id_of("sess_"),
    "object": one_of("session"),
    "title": null(TEXT),
    "instructions": null(TEXT),
    "metadata": ANY_OBJECT,
    "defaults": ANY_OBJECT,
    "overflow": one_of("error", "drop_oldest"),
    "head": null(id_of("turn_")),
    "model": TEXT,
    "generating": null(id_of("gen_")),
    "created_at": TIME,
    "updated_at": TIME,
}

SCHEMAS: dict[str, Schema] = {
    "Error": record(
        error=record(message=TEXT, type=TEXT, code=TEXT, param=null(TEXT)),
    ),
    "AnthropicError": record(
        type=one_of("error"),
        error=record({"details": ANY_OBJECT}, type=TEXT, message=TEXT),
        request_id=TEXT,
    ),
    "Usage": record(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=record(cached_tokens=COUNT),
    ),
    "ChatCompletion": record(
        id=id_of("chatcmpl-"),
        object=one_of("chat.completion"),
        created=TIME,
        model=TEXT,
        choices=listed(
            record(
                index=COUNT,
                message=record(
                    {"reasoning_content": TEXT, "tool_calls": listed(_CHAT_CALL)},
                    role=one_of("assistant"),
                    content=null(TEXT),
                    refusal={"type": "null"},
                ),
                logprobs=null(record(content=listed(_TOKEN), refusal={"type": "null"})),
                finish_reason=one_of("stop", "length", "tool_calls"),
            )
        ),
        usage=ref("Usage"),
    ),
    "Completion": record(
        id=id_of("cmpl-"),
        object=one_of("text_completion"),
        created=TIME,
        model=TEXT,
        choices=listed(
            record(
                index=COUNT,
                text=TEXT,
                logprobs=null(
                    record(
                        tokens=listed(TEXT),
                        token_logprobs=listed(null(NUMBER)),
                        top_logprobs=listed(null(ANY_OBJECT)),
                        text_offset=listed(COUNT),
                    )
                ),
                finish_reason=one_of("stop", "length"),
            )
        ),
        usage=ref("Usage"),
    ),
    "Item": {
        "description": "a message, a function_call, a function_call_output, or reasoning",
        **record(
            {
                "role": TEXT,
                "content": listed(_CONTENT),
                "summary": listed(ANY),
                "call_id": TEXT,
                "name": TEXT,
                "arguments": TEXT,
                "output": TEXT,
            },
            id=TEXT,
            type=one_of("message", "function_call", "function_call_output", "reasoning"),
            status=one_of("completed", "incomplete", "in_progress"),
        ),
    },
    "ItemList": page_of(ref("Item")),
    "Response": record(
        id=id_of("resp_"),
        object=one_of("response"),
        created_at=TIME,
        status=one_of("queued", "in_progress", "completed", "incomplete", "cancelled", "failed"),
        background=FLAG,
        completed_at=null(TIME),
        conversation=null(record(id=id_of("conv_"))),
        error=null(record(code=TEXT, message=TEXT)),
        incomplete_details=null(record(reason=one_of("max_output_tokens"))),
        instructions=null(TEXT),
        max_output_tokens=null(COUNT),
        max_tool_calls={"type": "null"},
        metadata=ANY_OBJECT,
        model=TEXT,
        output=listed(ref("Item")),
        parallel_tool_calls=FLAG,
        previous_response_id=null(id_of("resp_")),
        reasoning=ANY_OBJECT,
        service_tier=TEXT,
        store=FLAG,
        temperature=NUMBER,
        text=ANY_OBJECT,
        tool_choice=ANY,
        tools=listed(ANY_OBJECT),
        top_logprobs=COUNT,
        top_p=NUMBER,
        truncation=one_of("disabled", "auto"),
        usage=null(
            record(
                input_tokens=COUNT,
                input_tokens_details=record(cached_tokens=COUNT, cache_write_tokens=COUNT),
                output_tokens=COUNT,
                output_tokens_details=record(reasoning_tokens=COUNT),
                total_tokens=COUNT,
            )
        ),
    ),
    "Deleted": record(id=TEXT, object=TEXT, deleted=FLAG),
    "Conversation": record(
        id=id_of("conv_"), object=one_of("conversation"), created_at=TIME, metadata=ANY_OBJECT
    ),
    "Message": record(
        id=id_of("msg_"),
        type=one_of("message"),
        role=one_of("assistant"),
        model=TEXT,
        content=listed(
            record(
                {
                    "text": TEXT,
                    "thinking": TEXT,
                    "signature": TEXT,
                    "id": TEXT,
                    "name": TEXT,
                    "input": ANY_OBJECT,
                },
                type=one_of("text", "thinking", "tool_use"),
            )
        ),
        stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        stop_sequence=null(TEXT),
        usage=record(
            input_tokens=COUNT,
            cache_read_input_tokens=COUNT,
            cache_creation_input_tokens=COUNT,
            output_tokens=COUNT,
        ),
    ),
    "TokenCount": record(input_tokens=COUNT),
    "InputTokens": record(object=one_of("response.input_tokens"), input_tokens=COUNT),
    "Turn": record(
        {
            "token_ids": listed(COUNT),
            "prompt_token_ids": listed(COUNT),
            "replaces_history": FLAG,
            "rewrite": ANY_OBJECT,
            "dropped": COUNT,
        },
        id=id_of("turn_"),
        object=one_of("session.turn"),
        session=id_of("sess_"),
        parent=null(id_of("turn_")),
        role=one_of("system", "user", "assistant", "tool"),
        content=listed(record(type=one_of("text"), text=TEXT)),
        status=one_of("complete", "interrupted", "running"),
        finish_reason=null(TEXT),
        generation=null(id_of("gen_")),
        num_tokens=COUNT,
        created_at=TIME,
    ),
    "Session": record({"turns": listed(ref("Turn"))}, **_SESSION),
    "SessionList": page_of(ref("Session")),
    "SessionTree": record(
        object=one_of("session.tree"),
        session=id_of("sess_"),
        head=null(id_of("turn_")),
        turns=listed(ref("Turn")),
    ),
    "SessionCache": record(
        object=one_of("session.cache"),
        session=id_of("sess_"),
        head=null(id_of("turn_")),
        tokens=COUNT,
        block_size=COUNT,
        tiers=record(device=COUNT, host=COUNT, disk=COUNT, none=COUNT),
        on_disk=COUNT,
        blocks=listed(
            record(index=COUNT, start=COUNT, end=COUNT, tier=TEXT, device=FLAG, disk=FLAG)
        ),
        last_turn=null(
            record(
                turn=TEXT,
                prompt_tokens=COUNT,
                cached_tokens=_CACHED,
                expected_tokens=COUNT,
                miss=null(ANY_OBJECT),
            )
        ),
    ),
    "SessionExport": record(
        format=one_of("headwater.session"),
        version={"const": 1},
        session=ANY_OBJECT,
        turns=listed(ANY_OBJECT),
    ),
    "Generation": record(
        id=id_of("gen_"),
        object=one_of("generation"),
        finish_reason=one_of("stop", "length", "abort", "error"),
        session=null(id_of("sess_")),
        turn=null(id_of("turn_")),
    ),
    "Model": record(
        {
            "max_model_len": COUNT,
            "context_length": COUNT,
            "num_parameters": COUNT,
            "quantization": TEXT,
            "device": TEXT,
            "dtype": TEXT,
            "ops": TEXT,
            "reproducible": FLAG,
            "fingerprint": TEXT,
        },
        id=TEXT,
        object=one_of("model"),
        created=TIME,
        owned_by=TEXT,
        type=one_of("model"),
        display_name=TEXT,
        created_at={"type": "string", "format": "date-time"},
        lifecycle=one_of("active"),
        sampling_defaults=ANY_OBJECT,
    ),
    "ModelList": page_of(ref("Model")),
    "Tokens": record(
        tokens=listed(COUNT), pieces=listed(TEXT), count=COUNT, max_model_len=null(COUNT)
    ),
    "DetokenizedText": record(text=TEXT, count=COUNT),
    "Health": record(status=one_of("ok")),
    "Ready": record({"model": TEXT, "reason": TEXT}, status=TEXT),
    "Version": record(version=TEXT, model=TEXT),
}
