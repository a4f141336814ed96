"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from fastapi import Request, Response

from gptq_api.api.answers.formats import ChatFormat, Head, UsageEvents
from gptq_api.api.answers.logprobs import chat_logprobs
from gptq_api.api.answers.prompt_logprobs import Scoring
from gptq_api.api.answers.respond import respond
from gptq_api.api.answers.stream import Shape
from gptq_api.api.answers.work import admitted
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.fields import MAX_UNKNOWN, unknown_header
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
    call_ends_with = "stop" if body.forced_name is not None else "tool_calls"  # as OpenAI does
    shape = ChatFormat(
        Head.new("chatcmpl", service, body.service_tier),
        body.num_choices,
        usage,
        logprobs,
        may_call=body.may_call,
        call_ends_with=call_ends_with,
    )
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
    with ExitStack() as owned:
        async with service.preparing(record):
            prompt, found = await chat_prompt(service, body)
            prompts = [prompt]
            headers = headers | cut_header(body, prompts) | _relaxed(headers, found.relaxed)
            new_text = body.text_streams(
                service.tokenizer,
                more_stop=service.template.stop,
                continues=bool(body.continue_final_message) or bool(found.grammar),
                shown=found.shown,
                stops=found.new_reader is None,
            )
            scoring = None
            if body.prompt_logprobs is not None:
                scoring = Scoring(service, prompts, [""], None, body.prompt_logprobs)
            work = owned.enter_context(admitted(service, record, prompts, new_text, terms, found.new_reader, scoring))
        if body.return_token_ids:
            work.tell_ids()
        return await respond(request, work, shape, owned, stream=bool(body.stream), headers=headers)


def _relaxed(headers: dict[str, str], paths: list[str]) -> dict[str, str]:
    """The header that names what has no effect, with the schemas that are not enforced."""
    named = headers.get("x-unsupported-params")
    return unknown_header([*([named] if named else []), *paths[:MAX_UNKNOWN]])
