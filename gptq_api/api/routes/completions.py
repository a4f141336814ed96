"""POST /v1/completions: raw prompts, as texts or as token ids."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from fastapi import Request, Response

from gptq_api.api.answers.formats import CompletionFormat, Head, UsageEvents
from gptq_api.api.answers.logprobs import completion_logprobs
from gptq_api.api.answers.prompt_logprobs import Scoring
from gptq_api.api.answers.respond import respond
from gptq_api.api.answers.work import admitted
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.requests.completions import CompletionRequest
from gptq_api.api.requests.fields import unknown_header
from gptq_api.api.requests.prompts import completion_prompts, cut_header
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, Service, ServiceDep

router = guarded_router()


@router.post("/v1/completions", **answers("Completion", stream="CompletionChunk", errors=(*BODY, 404, *WORK, 500, 504)))
async def completions(body: CompletionRequest, request: Request, service: ServiceDep, record: RecordDep) -> Response:
    """What follows each prompt. Choice `i` belongs to prompt `i // n`."""
    service.check_model(body.model)
    headers = unknown_header(body.unknown(strict=service.settings.strict_params))
    record.notes |= body.notes()
    body.check()
    terms = body.terms(request.headers)
    logprobs = None
    if body.logprobs is not None:
        logprobs = partial(completion_logprobs, service.tokenizer, num_top=body.logprobs)
    usage = UsageEvents(body.usage_at_end, body.usage_in_chunks)
    new_text = body.text_streams(service.tokenizer, continues=True)
    with ExitStack() as owned:
        async with service.preparing(record):
            prompts = await completion_prompts(service, body)
            headers |= cut_header(body, prompts)
            texts = await _echoed_texts(service, body)
            scoring = None
            if prompts[0].params[0].prompt_logprobs is not None:
                num_echoed = body.logprobs if body.echo else None
                scoring = Scoring(service, prompts, texts, num_echoed, body.prompt_logprobs)
            work = owned.enter_context(
                admitted(service, record, prompts, new_text, terms, scoring=scoring, operation="text_completion")
            )
        if body.return_token_ids:
            work.tell_ids()
        for choice in work.choices:
            choice.tells_end = body.echoes_logprobs  # who reads those of the prompt counts on one for each token
        echoes = [text for text, prompt in zip(texts, prompts, strict=True) for _ in prompt.params]
        head = Head.new("cmpl", service, body.service_tier)
        shape = CompletionFormat(head, body.num_choices, usage, logprobs, echoes, scoring)
        return await respond(request, work, shape, owned, stream=bool(body.stream), headers=headers)


async def _echoed_texts(service: Service, body: CompletionRequest) -> list[str]:
    """What the choices of each prompt begin with: the prompt as it was sent, ids as the text they stand for."""
    if not body.echo:
        return [""] * len(body.prompt)
    decode = service.tokenizer.decode
    return await service.in_text_thread(
        lambda: [item if isinstance(item, str) else decode(item, skip_special=False) for item in body.prompt]
    )
