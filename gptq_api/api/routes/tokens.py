"""Texts, tokens and the template between them: /tokenize and /detokenize in vLLM's bodies and llama.cpp's,
/tokenizer_info, which lm-eval reads, /apply-template, and how many tokens a conversation is."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.answers.logprobs import token_text
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.errors import bad_request
from gptq_api.api.requests.chat import ChatCompletionRequest, check_messages
from gptq_api.api.requests.fields import unknown_header
from gptq_api.api.requests.prompts import chat_ids, chat_text, check_fits, refused_text, render
from gptq_api.api.requests.tokens import DetokenizeRequest, TokenizeRequest
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, Service, ServiceDep

router = guarded_router()


@router.post("/tokenize", **answers("Tokens", errors=(*BODY, 404, *WORK)))
async def tokenize(body: TokenizeRequest, service: ServiceDep, record: RecordDep) -> Response:
    """The token ids of a text, or of messages under the chat template."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    unknown = body.unknown(strict=strict)
    if len(body.given) != 1:
        raise bad_request("Give one of 'prompt', 'messages' and 'content'.", "prompt")
    async with service.preparing(record):
        if body.messages is not None:
            unknown += check_messages(body.messages, strict=strict)
            generation_prompt = body.add_generation_prompt is not False and not body.continue_final_message
            ids = await render(service, body, body.messages, generation_prompt, bool(body.continue_final_message))
        elif body.prompt is not None:
            ids = await _encoded(service, body.prompt, "prompt", body.add_special_tokens is not False, True)
        else:
            special = body.parse_special is not False
            ids = await _encoded(service, body.content or "", "content", bool(body.add_special), special)
    if body.content is not None:
        pieces = [_piece(service, token_id) for token_id in ids] if body.with_pieces else ids
        return json_response({"tokens": pieces}, unknown_header(unknown))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_tokens, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [token_text(service.tokenizer, token_id) for token_id in ids]
    return json_response(answer, unknown_header(unknown))


async def _encoded(service: Service, text: str, param: str, add_bos: bool, parse_special: bool) -> list[int]:
    check_fits(service, [text], param)
    with refused_text(param):
        return (await service.text.encode([text], add_bos=add_bos, parse_special=parse_special))[0]


def _piece(service: Service, token_id: int) -> dict[str, Any]:
    data = service.tokenizer.piece(token_id, skip_special=False)
    try:
        return {"id": token_id, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(data)}


@router.post("/detokenize", **answers("Text", errors=(*BODY, 404, *WORK)))
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> Response:
    """The text of token ids, control tokens written out, under vLLM's name and llama.cpp's: both send the same body."""
    service.check_model(body.model)
    unknown = body.unknown(strict=service.settings.strict_params)
    limit = max(service.tokenizer.vocab_size, service.engine.ready.vocab_size)
    if body.tokens and (worst := max(body.tokens)) >= limit:
        raise bad_request(f"Invalid value for 'tokens': token id {worst} is not below {limit}.", "tokens")
    text = await service.in_text_thread(lambda: service.tokenizer.decode(body.tokens, skip_special=False))
    return json_response({"prompt": text, "content": text}, unknown_header(unknown))


@router.post("/apply-template", **answers("Prompt", errors=(*BODY, 404, *WORK)))
async def apply_template(body: ChatCompletionRequest, service: ServiceDep, record: RecordDep) -> Response:
    """What the chat template makes of a conversation, as text: control tokens and their spelling look alike in it."""
    headers = check_chat(service, body)
    async with service.preparing(record):
        return json_response({"prompt": await chat_text(service, body)}, headers)


@router.post("/v1/chat/completions/input_tokens", **answers("InputTokens", errors=(*BODY, 404, *WORK)))
async def input_tokens(body: ChatCompletionRequest, service: ServiceDep, record: RecordDep) -> Response:
    """How many tokens a conversation is, by the body that would be answered."""
    headers = check_chat(service, body)
    async with service.preparing(record):
        ids = await chat_ids(service, body)
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)}, headers)


def check_chat(service: Service, body: ChatCompletionRequest) -> dict[str, str]:
    """Headers of the answer. Raises ApiError 400, 404."""
    service.check_model(body.model)
    headers = unknown_header(body.unknown(strict=service.settings.strict_params))
    body.check()
    return headers


@router.get("/tokenizer_info", **answers("TokenizerInfo"))
async def tokenizer_info(service: ServiceDep) -> Response:
    """What lm-eval asks for to choose its own tokenizer."""
    tokenizer = service.tokenizer
    bos, eos = (
        None if token_id is None else tokenizer.id_to_token(token_id)
        for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    answer = {
        "bos_token": bos,
        "eos_token": eos,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.max_tokens,
        "add_bos_token": tokenizer.adds_bos,
        "chat_template_source": service.template.source,
    }
    return json_response(answer)
