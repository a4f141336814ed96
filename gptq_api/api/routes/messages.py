"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from fastapi import Request, Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.answers.messages import MessagesShape
from gptq_api.api.body import beside
from gptq_api.api.document.declare import BODY, answers
from gptq_api.api.errors import ApiError
from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.messages import CountTokensRequest, MessagesRequest
from gptq_api.api.requests.prompts import chat_ids
from gptq_api.api.routes.chat import converse
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, Service, ServiceDep

router = guarded_router()
_ERRORS = (404, 429, 503, 529)


@router.post(
    "/v1/messages",
    **answers("Message", stream="MessageEvent", errors=(*BODY, *_ERRORS, 500, 504), done=False, error="MessagesError"),
)
async def messages(body: MessagesRequest, request: Request, service: ServiceDep, record: RecordDep) -> Response:
    """The next message of a conversation, whole or as a stream of server-sent events."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    asked = await beside(request, service, lambda: body.translated(service.template, strict=strict))
    shape = MessagesShape(
        service.model_name, asked.tools.origin, body.stop_sequences or (), thinking=body.wants_thinking
    )
    with asked.names.used():
        asked.chat.unknown(strict=strict)
        headers = {"request-id": record.request_id, **asked.headers()}
        return await converse(request, service, record, asked.chat, shape, headers)


@router.post("/v1/messages/count_tokens", **answers("MessageTokens", errors=(*BODY, *_ERRORS), error="MessagesError"))
async def count_tokens(body: CountTokensRequest, request: Request, service: ServiceDep, record: RecordDep) -> Response:
    """How many tokens a conversation is, with all that the chat template puts around it."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    asked = await beside(request, service, lambda: body.translated(service.template, strict=strict))
    with asked.names.used():
        async with service.preparing(record):
            asked.chat.unknown(strict=strict)
            num_tokens = await _count(service, asked.chat)
    headers = {"request-id": record.request_id, **asked.headers()}
    return json_response({"input_tokens": num_tokens}, headers)


async def _count(service: Service, chat: ChatCompletionRequest) -> int:
    """Also of a prompt that is too long to be answered, unless it is too long to be looked at."""
    try:
        return len(await chat_ids(service, chat))
    except ApiError as error:
        if error.error["code"] != "context_length_exceeded" or "at least" in error.error["message"]:
            raise
        return int(error.error["n_prompt_tokens"])
