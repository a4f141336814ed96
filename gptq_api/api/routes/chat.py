"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from fastapi import Request, Response

from gptq_api.api.answers.formats import ChatFormat, Head, UsageEvents
from gptq_api.api.answers.logprobs import chat_logprobs
from gptq_api.api.answers.respond import respond
from gptq_api.api.answers.stream import Shape
from gptq_api.api.answers.work import admitted
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.fields import unknown_header
from gptq_api.api.requests.prompts import chat_prompt, cut_header
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, Service, ServiceDep
from gptq_api.edge.request_log import RequestRecord

router = guarded_router()


@router.post(
    "/v1/chat/completions",
    **answers("ChatCompletion", stream="ChatCompletionChunk", errors=(*BODY, 404, *WORK, 500, 504)),
)
async def chat_completions(
    body: ChatCompletionRequest, request: Request, service: ServiceDep, record: RecordDep
) -> Response:
    """The answer to a conversation, whole or as a stream of server-sent events."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    headers = unknown_header([*body.unknown(strict=strict), *body.without_effect(service.template, strict=strict)])
    logprobs = partial(chat_logprobs, service.tokenizer, num_top=body.top_logprobs or 0) if body.logprobs else None
    usage = UsageEvents(body.usage_at_end, body.usage_in_chunks)
    shape = ChatFormat(Head.new("chatcmpl", service, body.service_tier), body.num_choices, usage, logprobs)
    return await converse(request, service, record, body, shape, headers)


async def converse(
    request: Request,
    service: Service,
    record: RequestRecord,
    body: ChatCompletionRequest,
    shape: Shape,
    headers: dict[str, str],
) -> Response:
    """The one way of every conversation, whichever API it came by, to its answer in `shape`. Raises ApiError."""
    record.notes |= body.notes()
    body.check()
    terms = body.terms(request.headers)
    new_text = body.text_streams(
        service.tokenizer,
        more_stop=service.template.stop,
        continues=bool(body.continue_final_message) or body.is_constrained,
    )
    with ExitStack() as owned:
        with service.preparing():
            prompts = [await chat_prompt(service, body)]
            headers = headers | cut_header(body, prompts)
            work = owned.enter_context(admitted(service, record, prompts, new_text, terms))
        return await respond(request, work, shape, owned, stream=bool(body.stream), headers=headers)
