"""A validated request body -> prompts as token ids and the sampling parameters of each choice, or a 400."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from gptq_api.api.errors import bad_request, context_exceeded, unavailable
from gptq_api.api.requests.chat import ChatCompletionRequest, ChatMessage
from gptq_api.api.requests.completions import CompletionRequest
from gptq_api.api.requests.constraints import ConstrainedFields
from gptq_api.api.requests.fields import SamplingFields
from gptq_api.api.requests.prediction import PredictionFields
from gptq_api.api.requests.template import TemplateFields, document_texts
from gptq_api.api.requests.tools import Reading, ToolFields, reading
from gptq_api.api.service import Service
from gptq_api.engine.client import Prompt
from gptq_api.text.chat import ChatTemplateError
from gptq_api.text.process import TextError, TextProcessGone
from gptq_api.text.tokens import NoRowError
from gptq_api.text.tools.history import has_many_calls, one_call_a_message, with_tools
from gptq_api.types import SamplingParams, pack_ids

T = TypeVar("T")
SMALLEST_TOP_P = 1e-6
"""top_p 0 is legal and means the likeliest token; any nucleus holds that one"""
MAX_PREDICTED_CHARS = 8
"""of a prediction for each token of the context, twice as many as texts have; the rest is not worth encoding"""


async def chat_prompt(service: Service, body: ChatCompletionRequest) -> tuple[Prompt, Reading]:
    """The prompt, and how its answers are read. Raises ApiError 400."""
    ids = await chat_ids(service, body)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    found = await reading(service, body, ids)
    num_prompt_top, stop_ids = body.prompt_logprobs, tuple(service.template.stop_token_ids)
    grammar = found.grammar
    prompt = _prompt(service, body, ids, body.num_choices, num_top, num_prompt_top, stop_ids, "messages", grammar)
    return replace(prompt, prediction=await _prediction(service, body)), found


async def chat_ids(service: Service, body: ChatCompletionRequest) -> list[int]:
    """A conversation as the model sees it. Raises ApiError 400."""
    return await render(service, body, body.messages, *_ending(body))


async def chat_text(service: Service, body: ChatCompletionRequest) -> str:
    """The same for people. Raises ApiError 400."""
    return await _in_template(service, body, body.messages, *_ending(body), service.text.render_text)


def _ending(body: ChatCompletionRequest) -> tuple[bool, bool]:
    """Whether an answer is begun after the last message, and whether that one goes on."""
    return body.add_generation_prompt is not False and not body.continue_final_message, bool(
        body.continue_final_message
    )


async def render(
    service: Service,
    body: TemplateFields,
    messages: list[ChatMessage],
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> list[int]:
    """Messages -> token ids. Raises ApiError 400 where they are too long or the template refuses them or the body's
    variables."""
    return await _in_template(
        service, body, messages, add_generation_prompt, continue_final_message, service.text.render
    )


async def _in_template(
    service: Service,
    body: TemplateFields,
    messages: list[ChatMessage],
    add_generation_prompt: bool,
    continue_final_message: bool,
    render: Callable[..., Awaitable[T]],
) -> T:
    body.check_template(service.template)
    variables = body.template_variables(service.template)
    check_fits(service, [text for document in body.documents or [] for text in document_texts(document)], "documents")
    check_fits(service, [text for message in messages for text in message.texts], "messages")
    tools: list[dict[str, Any]] = body.shown_tools() if isinstance(body, ToolFields) else []
    check_fits(service, [json.dumps(tool, ensure_ascii=False) for tool in tools], "tools")
    layout = service.template.calls
    rendered = with_tools([message.rendered() for message in messages], tools, layout)
    if tools and layout.told_by_template:
        variables["tools"] = tools

    async def attempt(messages: list[dict[str, Any]]) -> T:
        return await render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    with refused_text("messages"):
        try:
            return await attempt(rendered)
        except ChatTemplateError:
            if has_many_calls(rendered):
                return await attempt(one_call_a_message(rendered))
            raise


@contextmanager
def refused_text(param: str) -> Iterator[None]:
    """Around what is asked of the process that encodes and renders: what it refuses is an ApiError, 400."""
    try:
        yield
    except ChatTemplateError as error:
        raise bad_request(f"The chat template refused the messages: {str(error)[:300]}", param) from None
    except TextError as error:
        raise bad_request(f"Invalid value for '{param}': {str(error)[:300]}.", param) from None
    except TextProcessGone as error:
        raise unavailable(f"The prompt cannot be encoded: {error}.", "tokenizer_unavailable") from None


async def completion_prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """Raises ApiError 400."""
    num_samples = max(body.num_choices, body.best_of or 1)
    if len(body.prompt) * num_samples > service.engine.places.most:
        raise bad_request(
            f"{len(body.prompt)} prompts of {num_samples} samples are more sequences than the "
            f"{service.engine.places.most} this server takes at a time from one client.",
            "n" if num_samples > 1 else "prompt",
        )
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    check_fits(service, texts, "prompt", each=True)
    add_bos = body.add_special_tokens is not False
    with refused_text("prompt"):  # the whole prompt is the caller's, control tokens included
        encoded = iter(await service.text.encode(texts, add_bos=add_bos, parse_special=True) if texts else [])
    num_top = body.logprobs
    if num_top is None and body.best_of is not None and body.best_of > body.num_choices:
        num_top = 0  # ranked by them
    asked = [body.logprobs if body.echoes_logprobs else None, body.prompt_logprobs]
    num_prompt_top = max((num for num in asked if num is not None), default=None)
    grammar, prediction = await _grammar(service, body), await _prediction(service, body)
    prompts = []
    for item in body.prompt:
        ids = next(encoded) if isinstance(item, str) else item
        prompt = _prompt(service, body, ids, num_samples, num_top, num_prompt_top, (), "prompt", grammar)
        prompts.append(replace(prompt, prediction=prediction))
    return prompts


async def _prediction(service: Service, body: PredictionFields) -> bytes:
    """What the answer may look like, for Prompt.prediction: encoded as text, as the model would write it, and at most
    the context. Raises ApiError 400 where it cannot be encoded."""
    if body.prediction is None or not body.prediction.content or service.settings.speculate == "off":
        return b""
    text = body.prediction.content[: MAX_PREDICTED_CHARS * service.max_tokens]
    with refused_text("prediction.content"):
        (ids,) = await service.text.encode([text])
    num_rows = service.engine.ready.vocab_size
    return pack_ids(token_id for token_id in ids[: service.max_tokens] if token_id < num_rows)


async def _grammar(service: Service, body: ConstrainedFields) -> str:
    """What the answer has to look like, for SamplingParams.grammar. Raises ApiError 400."""
    constraint = body.constraint()
    if constraint is None:
        return ""
    grammar = constraint.grammar()
    if error := await service.grammars.check(grammar):
        raise constraint.refusal(error)
    return grammar


def check_fits(service: Service, texts: list[str], param: str, each: bool = False) -> None:
    """Refuse what cannot fit by its length alone, before any time goes into encoding it."""
    sizes = [len(text.encode()) for text in texts]
    size = max(sizes, default=0) if each else sum(sizes)
    least = size // max(service.tokenizer.max_token_bytes, 1)
    if least > service.max_tokens:
        raise context_exceeded(service.max_tokens, least, 0, what=param, param=param, at_least=True)


def _prompt(
    service: Service,
    body: SamplingFields,
    ids: list[int],
    num_samples: int,
    num_top: int | None,
    num_prompt_top: int | None,
    stop_ids: tuple[int, ...],
    param: str,
    grammar: str = "",
) -> Prompt:
    """The one way of every prompt to the engine; where max_tokens is 0 there is nothing to run but for logprobs of the
    prompt. Raises ApiError 400."""
    _check_ids(service, ids, param)
    if num_samples > (most := service.engine.places.most):
        raise bad_request(f"Invalid value for 'n': this server takes {most} sequences at a time from one client.", "n")
    room = service.max_tokens - len(ids)
    limit, limit_param = body.answer_limit
    if room < (0 if limit == 0 else 1):
        raise context_exceeded(service.max_tokens, len(ids), limit or 1, what=param, param=param)
    if limit is not None and limit > room and service.settings.strict_params:
        raise context_exceeded(service.max_tokens, len(ids), limit, what=param, param=limit_param)
    wanted = body.usual_tokens if limit is None else limit
    max_tokens = room if wanted is None else min(wanted, room)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"Invalid value for 'min_tokens': it must not be more than max_tokens ({max_tokens}), got {min_tokens}.",
            "min_tokens",
        )
    first = SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=max(_or(body.top_p, 1.0), SMALLEST_TOP_P),
        top_k=min(max(body.top_k or 0, 0), service.engine.ready.vocab_size),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=_seed(body.seed),
        stop_token_ids=_stop_token_ids(service, body, stop_ids),
        min_tokens=min_tokens,
        logit_bias=_logit_bias(service, body),
        top_logprobs=num_top,
        prompt_logprobs=num_prompt_top,
        grammar=grammar,
    )
    if grammar and not first.stop_token_ids:
        raise bad_request("This model has no end token, so no grammar can be followed to its end.", None)
    # the first sample is what n = 1 would have given, and tells of the prompt for all of them
    other = msgspec.structs.replace(first, prompt_logprobs=None)
    rest = [msgspec.structs.replace(other, seed=_derived(first.seed, i)) for i in range(1, num_samples)]
    return Prompt(ids, [first, *rest])


def cut_header(body: SamplingFields, prompts: list[Prompt]) -> dict[str, str]:
    """The response header that says that an answer may be shorter than was allowed, because the context leaves no more
    room behind the (longest) prompt. Coding agents ask for 32,000 tokens whatever the context is."""
    limit, _ = body.answer_limit
    least = min(prompt.params[0].max_tokens for prompt in prompts)
    return {"x-max-tokens": str(least)} if limit is not None and least < limit else {}


def _check_ids(service: Service, ids: list[int], param: str) -> None:
    if not ids:
        raise bad_request(f"Invalid value for '{param}': it must hold at least one token.", param)
    try:
        service.tokenizer.check_rows(ids, service.engine.ready.vocab_size)
    except NoRowError as error:
        raise bad_request(f"Invalid value for '{param}': {error}.", param) from None


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _seed(seed: int | None) -> int:
    """Any 64-bit seed -> 63 bits, so that whatever reads it may be signed."""
    return secrets.randbits(63) if seed is None else seed & (2**63 - 1)


def _derived(seed: int, sample: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _stop_token_ids(service: Service, body: SamplingFields, template_ids: tuple[int, ...]) -> tuple[int, ...]:
    ready = service.engine.ready
    asked = body.stop_token_ids or []
    if asked and max(asked) >= ready.vocab_size:
        raise bad_request(
            f"Invalid value for 'stop_token_ids': token id {max(asked)} is not below {ready.vocab_size}.",
            "stop_token_ids",
        )
    named = service.tokenizer.end_ids(ready.eos_token_ids, ready.vocab_size, template_ids)
    ends = () if body.ignore_eos else named
    return tuple(sorted({*asked, *ends}))


def _logit_bias(service: Service, body: SamplingFields) -> dict[int, float]:
    bias = {int(key): float(value) for key, value in (body.logit_bias or {}).items()}
    vocab_size = service.engine.ready.vocab_size
    if bias and (worst := max(bias)) >= vocab_size:
        raise bad_request(f"Invalid value for 'logit_bias': token id {worst} is not below {vocab_size}.", "logit_bias")
    return bias
