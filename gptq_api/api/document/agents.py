"""Shapes of the answers of the Responses and Messages APIs."""

from __future__ import annotations

from gptq_api.api.document.primitives import (
    BYTE,
    COUNT,
    FLAG,
    NULL,
    TEXT,
    TIME,
    Schema,
    array,
    const,
    either,
    ref,
    shape,
)

_ANY: Schema = {"type": "object"}
_NUMBER: Schema = {"type": "number"}
_TEXT_OR_NULL = either(TEXT, NULL)
_TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": {"type": "number", "maximum": 0}, "bytes": array(BYTE)}
_LOGPROBS = array(shape(**_TOKEN, top_logprobs=array(shape(**_TOKEN), maxItems=20)))
_STATUS = const("in_progress", "completed", "incomplete")
_OUTPUT_TEXT = shape(type=const("output_text"), text=TEXT, annotations=array(_ANY, maxItems=0), logprobs=_LOGPROBS)
_REASONING_TEXT = shape(type=const("reasoning_text"), text=TEXT)
_CALLED: dict[str, Schema] = {"id": TEXT, "status": _STATUS, "call_id": TEXT, "name": TEXT}
_ITEM = either(
    shape(id=TEXT, type=const("message"), status=_STATUS, role=const("assistant"), content=array(_OUTPUT_TEXT)),
    shape(
        id=TEXT,
        type=const("reasoning"),
        status=_STATUS,
        summary=array(_ANY, maxItems=0),
        content=array(_REASONING_TEXT),
    ),
    shape({"namespace": TEXT}, type=const("function_call"), arguments=TEXT, **_CALLED),
    shape({"namespace": TEXT}, type=const("custom_tool_call"), input=TEXT, **_CALLED),
)
_RESPONSE = shape(
    id=TEXT,
    object=const("response"),
    created_at=TIME,
    completed_at=either(TIME, NULL),
    status=const("in_progress", "completed", "incomplete", "failed"),
    error=either(shape(code=TEXT, message=TEXT), NULL),
    incomplete_details=either(shape(reason=const("max_output_tokens")), NULL),
    output=array(ref("OutputItem")),
    usage=either(
        shape(
            input_tokens=COUNT,
            input_tokens_details=shape(cached_tokens=COUNT, cache_write_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=shape(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        ),
        NULL,
    ),
    background={"const": False},
    instructions=_TEXT_OR_NULL,
    max_output_tokens=either(COUNT, NULL),
    max_tool_calls=NULL,
    metadata=_ANY,
    model=TEXT,
    parallel_tool_calls=FLAG,
    previous_response_id=NULL,
    presence_penalty=_NUMBER,
    frequency_penalty=_NUMBER,
    prompt_cache_key=_TEXT_OR_NULL,
    reasoning=_ANY,
    safety_identifier=_TEXT_OR_NULL,
    service_tier=const("default"),
    store={"const": False},
    temperature=_NUMBER,
    text=_ANY,
    tool_choice=either(TEXT, _ANY),
    tools=array(_ANY),
    top_logprobs=COUNT,
    top_p=_NUMBER,
    truncation=const("disabled"),
    user=_TEXT_OR_NULL,
)
_INDEXED: dict[str, Schema] = {"output_index": COUNT, "sequence_number": COUNT}
_IN_ITEM: dict[str, Schema] = {"item_id": TEXT, **_INDEXED}
_IN_PART: dict[str, Schema] = {"content_index": COUNT, **_IN_ITEM}
_PART = either(_OUTPUT_TEXT, _REASONING_TEXT)
_RESPONSE_EVENT = either(
    shape(
        type=const(*(f"response.{name}" for name in ("created", "in_progress", "completed", "incomplete", "failed"))),
        response=ref("Response"),
        sequence_number=COUNT,
    ),
    shape(
        type=const("response.output_item.added", "response.output_item.done"),
        item=ref("OutputItem"),
        **_INDEXED,
    ),
    shape(type=const("response.content_part.added", "response.content_part.done"), part=_PART, **_IN_PART),
    shape(type=const("response.output_text.delta"), delta=TEXT, logprobs=_LOGPROBS, **_IN_PART),
    shape(type=const("response.output_text.done"), text=TEXT, logprobs=_LOGPROBS, **_IN_PART),
    shape(type=const("response.reasoning_text.delta"), delta=TEXT, **_IN_PART),
    shape(type=const("response.reasoning_text.done"), text=TEXT, **_IN_PART),
    shape(
        type=const("response.function_call_arguments.delta", "response.custom_tool_call_input.delta"),
        delta=TEXT,
        **_IN_ITEM,
    ),
    shape(type=const("response.function_call_arguments.done"), arguments=TEXT, **_IN_ITEM),
    shape(type=const("response.custom_tool_call_input.done"), input=TEXT, **_IN_ITEM),
)

_STOP_REASON = const("end_turn", "max_tokens", "stop_sequence", "tool_use")
_END: dict[str, Schema] = {"stop_reason": either(_STOP_REASON, NULL), "stop_sequence": _TEXT_OR_NULL}
_MESSAGE_USAGE = shape(
    input_tokens=COUNT | {"description": "those of the prompt that were not in the prefix cache"},
    cache_creation_input_tokens=COUNT,
    cache_read_input_tokens=COUNT,
    output_tokens=COUNT,
)
_BLOCK = either(
    shape(type=const("text"), text=TEXT),
    shape(type=const("thinking"), thinking=TEXT, signature=TEXT),
    shape(type=const("tool_use"), id=TEXT, name=TEXT, input=_ANY),
)
_BLOCK_DELTA = either(
    shape(type=const("text_delta"), text=TEXT),
    shape(type=const("thinking_delta"), thinking=TEXT),
    shape(type=const("signature_delta"), signature=TEXT),
    shape(type=const("input_json_delta"), partial_json=TEXT),
)
_MESSAGES_ERROR = shape(
    type=const("error"),
    error=shape(
        type=const(
            "invalid_request_error",
            "authentication_error",
            "permission_error",
            "not_found_error",
            "request_too_large",
            "rate_limit_error",
            "overloaded_error",
            "api_error",
        ),
        message=TEXT,
    ),
    request_id=TEXT,
)
AGENT_SHAPES: dict[str, Schema] = {
    "OutputItem": _ITEM,
    "Response": _RESPONSE,
    "ResponseEvent": _RESPONSE_EVENT,
    "Message": shape(
        id=TEXT,
        type=const("message"),
        role=const("assistant"),
        model=TEXT,
        content=array(_BLOCK),
        usage=_MESSAGE_USAGE,
        **_END,
    ),
    "MessageEvent": either(
        shape(type=const("message_start"), message=ref("Message")),
        shape(type=const("content_block_start"), index=COUNT, content_block=_BLOCK),
        shape(type=const("content_block_delta"), index=COUNT, delta=_BLOCK_DELTA),
        shape(type=const("content_block_stop"), index=COUNT),
        shape(type=const("message_delta"), delta=shape(**_END), usage=_MESSAGE_USAGE),
        shape(type=const("message_stop", "ping")),
        ref("MessagesError"),
    ),
    "MessageTokens": shape(input_tokens=COUNT),
    "MessagesError": _MESSAGES_ERROR,
}
