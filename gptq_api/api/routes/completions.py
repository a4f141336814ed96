"""POST /v1/completions: raw prompts, as texts or as token ids."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import Request, Response

from gptq_api.api.generate import TextOptions, Work, admitted
from gptq_api.api.logprobs import TokenEntry, completion_logprobs
from gptq_api.api.prepare import completion_prompts
from gptq_api.api.route import guarded_router
from gptq_api.api.schema import CompletionRequest, StreamOptions
from gptq_api.api.schema_fields import unknown_header
from gptq_api.api.service import RecordDep, Service, ServiceDep
from gptq_api.api.shapes import CompletionChunks, Head, Logprobs, json_bytes
from gptq_api.api.sse import StreamResponse, events
from gptq_api.edge.disconnect import until_disconnect

router = guarded_router()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, service: ServiceDep, record: RecordDep) -> Response:
    """What follows each prompt. Choice `i` belongs to prompt `i // n`."""
    service.check_model(body.model)
    unknown = body.unknown(strict=service.settings.strict_params)
    body.check()
    head = Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), service.model_name, service.fingerprint)
    options = TextOptions(
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        continues=True,
    )
    logprobs: Logprobs | None = None
    if body.logprobs is not None:
        logprobs = partial(completion_logprobs, service.tokenizer, num_top=body.logprobs)
    with ExitStack() as owned:
        with service.preparing():
            prompts = await completion_prompts(service, body)
            work = owned.enter_context(admitted(service, record, prompts, options, body.cache_salt))
        echoes = await _echoes(service, body, work)
        if body.stream:
            stream_options = body.stream_options or StreamOptions()
            chunks = CompletionChunks(head, stream_options.include_usage, logprobs)
            return StreamResponse(
                events(work, chunks, stream_options, echoes),
                owned=owned.pop_all(),
                work=work,
                headers=unknown_header(unknown),
                ping_s=service.settings.sse_ping_s,
                send_timeout_s=service.settings.send_timeout_s,
            )
        answer = await until_disconnect(request, _answer(work, head, logprobs, echoes, body.num_choices))
        return Response(json_bytes(answer), headers=unknown_header(unknown), media_type="application/json")


async def _echoes(service: Service, body: CompletionRequest, work: Work) -> list[str]:
    """The text each choice begins with: its prompt as it was sent, ids as the text they stand for."""
    if not body.echo:
        return [""] * len(work.choices)
    decode = service.tokenizer.decode
    texts = await service.in_text_thread(
        lambda: [item if isinstance(item, str) else decode(item, skip_special=False) for item in body.prompt]
    )
    return [text for text, prompt in zip(texts, work.prompts, strict=True) for _ in prompt.params]


async def _answer(
    work: Work, head: Head, logprobs: Logprobs | None, echoes: list[str], num_choices: int
) -> dict[str, Any]:
    texts = list(echoes)
    entries: list[list[TokenEntry]] = [[] for _ in work.choices]
    reasons = [""] * len(work.choices)
    async for pieces in work.pieces():
        for piece in pieces:
            index = piece.choice.index
            texts[index] += piece.text
            entries[index] += piece.entries
            reasons[index] = piece.finish_reason or ""
    chosen = [index for start in _starts(work) for index in _best(work, start, num_choices)]
    choices = [
        {
            "index": i,
            "text": texts[index],
            "logprobs": None if logprobs is None else logprobs(entries[index]),
            "finish_reason": reasons[index],
        }
        for i, index in enumerate(chosen)
    ]
    return {**head.fields("text_completion"), "choices": choices, "usage": work.usage()}


def _starts(work: Work) -> list[int]:
    """The index of each prompt's first sample."""
    return [choice.index for choice in work.choices if choice.sample == 0]


def _best(work: Work, start: int, num_choices: int) -> list[int]:
    """best_of: the samples of one prompt that the model itself finds likeliest per token, best first."""
    num_samples = len(work.prompts[0].params)
    samples = range(start, start + num_samples)
    if num_samples == num_choices:
        return list(samples)
    return sorted(samples, key=lambda index: -work.choices[index].mean_logprob)[:num_choices]
