"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import Request, Response

from gptq_api.api.generate import TextOptions, Work, admitted
from gptq_api.api.logprobs import TokenEntry, chat_logprobs
from gptq_api.api.prepare import chat_prompt
from gptq_api.api.route import guarded_router
from gptq_api.api.schema import ChatCompletionRequest, StreamOptions, check_messages
from gptq_api.api.schema_fields import unknown_header
from gptq_api.api.service import RecordDep, ServiceDep
from gptq_api.api.shapes import ChatChunks, Head, Logprobs, json_bytes
from gptq_api.api.sse import StreamResponse, events
from gptq_api.edge.disconnect import until_disconnect

router = guarded_router()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, service: ServiceDep, record: RecordDep
) -> Response:
    """The answer to a conversation, whole or as a stream of server-sent events."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    unknown = [*body.unknown(strict=strict), *check_messages(body.messages, strict=strict)]
    body.check()
    head = Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), service.model_name, service.fingerprint)
    options = TextOptions(
        stop=[*body.stop, *service.template.stop],
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        continues=bool(body.continue_final_message),
    )
    logprobs: Logprobs | None = None
    if body.logprobs:
        logprobs = partial(chat_logprobs, service.tokenizer, num_top=body.top_logprobs or 0)
    with ExitStack() as owned:
        with service.preparing():
            prompt = await chat_prompt(service, body)
            work = owned.enter_context(admitted(service, record, [prompt], options, body.cache_salt))
        if body.stream:
            stream_options = body.stream_options or StreamOptions()
            chunks = ChatChunks(head, stream_options.include_usage, logprobs)
            return StreamResponse(
                events(work, chunks, stream_options, [""] * len(work.choices)),
                owned=owned.pop_all(),
                work=work,
                headers=unknown_header(unknown),
                ping_s=service.settings.sse_ping_s,
                send_timeout_s=service.settings.send_timeout_s,
            )
        answer = await until_disconnect(request, _answer(work, head, logprobs))
        return Response(json_bytes(answer), headers=unknown_header(unknown), media_type="application/json")


async def _answer(work: Work, head: Head, logprobs: Logprobs | None) -> dict[str, Any]:
    texts = [""] * len(work.choices)
    entries: list[list[TokenEntry]] = [[] for _ in work.choices]
    reasons = [""] * len(work.choices)
    async for pieces in work.pieces():
        for piece in pieces:
            index = piece.choice.index
            texts[index] += piece.text
            entries[index] += piece.entries
            reasons[index] = piece.finish_reason or ""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": texts[i], "refusal": None},
            "logprobs": None if logprobs is None else logprobs(entries[i]),
            "finish_reason": reasons[i],
        }
        for i in range(len(work.choices))
    ]
    return {**head.fields("chat.completion"), "choices": choices, "usage": work.usage()}
