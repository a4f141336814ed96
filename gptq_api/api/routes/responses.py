"""POST /v1/responses: OpenAI's Responses API, without a state."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from gptq_api.api.answers.logprobs import TokenEntry, chat_logprobs
from gptq_api.api.answers.responses import ResponsesShape
from gptq_api.api.body import beside
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.errors import ApiError
from gptq_api.api.requests.responses import ResponsesRequest
from gptq_api.api.routes.chat import converse
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, Service, ServiceDep

router = guarded_router()


@router.post(
    "/v1/responses", **answers("Response", stream="ResponseEvent", errors=(*BODY, 404, *WORK, 500, 504), done=False)
)
async def responses(body: ResponsesRequest, request: Request, service: ServiceDep, record: RecordDep) -> Response:
    """The answer to items, whole or as a stream of server-sent events. Nothing is stored."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    asked = await beside(request, service, lambda: body.translated(service.template, strict=strict))
    spelled = _logprobs(service, body.top_logprobs or 0) if body.wants_logprobs else None
    shape = ResponsesShape(_echoed(service, body), asked.tools.origin, spelled)
    with asked.names.used():
        asked.chat.unknown(strict=strict)
        try:
            return await converse(request, service, record, asked.chat, shape, asked.headers())
        except ApiError as error:
            if error.error["code"] == "context_length_exceeded" and error.error["param"] == "messages":
                error.error["message"] = (
                    "Your input exceeds the context window of this model. Please adjust your input and try again. "
                    f"({error.error['n_prompt_tokens']} tokens, {error.error['n_ctx'] - 1} fit.)"
                )
            raise


def _logprobs(service: Service, num_top: int) -> Any:
    def spelled(entries: list[TokenEntry]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = chat_logprobs(service.tokenizer, entries, num_top)["content"]
        for entry in content:
            for token in (entry, *entry["top_logprobs"]):
                token["bytes"] = token["bytes"] or []  # which is never null there
        return content

    return spelled


def _echoed(service: Service, body: ResponsesRequest) -> dict[str, Any]:
    """What an answer repeats of its request, with the defaults that were meant."""
    text = body.text or {}
    reasoning = body.reasoning or {}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": service.model_name,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
