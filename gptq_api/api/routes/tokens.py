"""POST /tokenize, /detokenize and GET /tokenizer_info, in the bodies that vLLM made usual and lm-eval reads."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.answers.logprobs import token_text
from gptq_api.api.document.declare import BODY, WORK, answers
from gptq_api.api.errors import bad_request
from gptq_api.api.requests.chat import check_messages
from gptq_api.api.requests.fields import unknown_header
from gptq_api.api.requests.prompts import check_fits, render
from gptq_api.api.requests.tokens import DetokenizeRequest, TokenizeRequest
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import ServiceDep

router = guarded_router()


@router.post("/tokenize", **answers("Tokens", errors=(*BODY, 404, *WORK)))
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> Response:
    """The token ids of a text, or of messages under the chat template."""
    service.check_model(body.model)
    strict = service.settings.strict_params
    unknown = body.unknown(strict=strict)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either 'prompt' or 'messages'.", "prompt")
    with service.preparing():
        if body.messages is not None:
            unknown += check_messages(body.messages, strict=strict)
            generation_prompt = body.add_generation_prompt is not False and not body.continue_final_message
            ids = await render(service, body.messages, generation_prompt, bool(body.continue_final_message))
        else:
            text, add_bos = body.prompt or "", body.add_special_tokens is not False
            check_fits(service, [text], "prompt")
            ids = await service.in_text_thread(
                lambda: service.tokenizer.encode(text, add_bos=add_bos, parse_special=True)
            )
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_tokens, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [token_text(service.tokenizer, token_id) for token_id in ids]
    return json_response(answer, unknown_header(unknown))


@router.post("/detokenize", **answers("Text", errors=(*BODY, 404)))
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> Response:
    """The text of token ids, control tokens written out."""
    service.check_model(body.model)
    unknown = body.unknown(strict=service.settings.strict_params)
    limit = max(service.tokenizer.vocab_size, service.engine.ready.vocab_size)
    if body.tokens and (worst := max(body.tokens)) >= limit:
        raise bad_request(f"Invalid value for 'tokens': token id {worst} is not below {limit}.", "tokens")
    text = await service.in_text_thread(lambda: service.tokenizer.decode(body.tokens, skip_special=False))
    return json_response({"prompt": text}, unknown_header(unknown))


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
