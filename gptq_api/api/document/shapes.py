"""JSON Schemas of what routes answer. They are closed: an answer with a field that stands in none of them fails a test.

A route names its shape where it is declared (`declare.answers`); a new one is an entry in `SHAPES`.
"""

from __future__ import annotations

from gptq_api.api.document.agents import AGENT_SHAPES
from gptq_api.api.document.batches import BATCH_SHAPES
from gptq_api.api.document.primitives import (
    BYTE,
    COUNT,
    FLAG,
    LOGPROB,
    NULL,
    TEXT,
    TIME,
    Schema,
    array,
    const,
    either,
    ref,
    shape,
)

_ERROR = shape(
    {
        "n_prompt_tokens": COUNT | {"description": "with context_length_exceeded"},
        "n_ctx": COUNT | {"description": "with context_length_exceeded: the longest prompt plus answer, tokens"},
    },
    message=TEXT,
    type=TEXT,
    param=either(TEXT, NULL) | {"description": "the field of the request that is to blame"},
    code=either(TEXT, NULL),
)
_USAGE = shape(
    prompt_tokens=COUNT,
    completion_tokens=COUNT | {"description": "all that were generated, the token that ended an answer among them"},
    total_tokens=COUNT,
    prompt_tokens_details=shape(cached_tokens=COUNT, audio_tokens=COUNT),
    completion_tokens_details=shape(
        reasoning_tokens=COUNT,
        audio_tokens=COUNT,
        accepted_prediction_tokens=COUNT
        | {"description": "tokens of the prediction that saved a step: they are in the answer"},
        rejected_prediction_tokens=COUNT
        | {"description": "tokens of the prediction that were tried in vain; completion_tokens has none of them"},
    ),
)
_SPELLED: dict[str, Schema] = {
    "token": TEXT,
    "logprob": LOGPROB,
    "bytes": either(array(BYTE), NULL)
    | {"description": "UTF-8 of the token, which may be a part of a character; null for control tokens"},
}
_CHAT_LOGPROBS = shape(
    content=array(shape(**_SPELLED, top_logprobs=array(shape(**_SPELLED), maxItems=20)))
    | {"description": "the tokens whose text is shown: the one that ended the answer is none of them"},
    refusal=NULL,
)
_COMPLETION_LOGPROBS = shape(
    tokens=array(TEXT),
    token_logprobs=array(either(LOGPROB, NULL)),
    top_logprobs=either(array(either({"type": "object", "additionalProperties": LOGPROB}, NULL)), NULL),
    text_offset=array(COUNT),
)
_LISTED = shape(logprob=LOGPROB, rank=COUNT, decoded_token=TEXT)
_PROMPT_LOGPROBS: dict[str, Schema] = {
    "prompt_logprobs": array(either({"type": "object", "additionalProperties": _LISTED}, NULL))
    | {"description": "where they were asked for: null, then by token id what was told of each token"}
}
_HEAD: dict[str, Schema] = {"created": TIME, "model": TEXT, "system_fingerprint": TEXT}
_TIER = {"service_tier": const("default") | {"description": "where the request named one"}}
_FINISH = const("stop", "length")
_STOP_REASON = {"stop_reason": const("deadline") | {"description": "where the request's timeout cut the answer"}}
_TOKEN_IDS = {"token_ids": array(COUNT) | {"description": "with return_token_ids: new tokens, as usage counts them"}}
_PROMPT_IDS = {"prompt_token_ids": array(COUNT)}
_MESSAGE = shape(role=const("assistant"), content=TEXT, refusal=NULL)
_DELTA = shape({"role": const("assistant"), "content": TEXT})
_USAGE_OR_NULL = either(ref("Usage"), NULL)
_COUNTS: Schema = {"type": "object", "additionalProperties": COUNT}
_CHECKPOINT = shape(
    architecture=TEXT,
    layout=TEXT,
    layers=COUNT,
    hidden_size=COUNT,
    intermediate_size=COUNT,
    heads=COUNT,
    kv_heads=COUNT,
    head_dim=COUNT,
    parameters=COUNT,
    bits=_COUNTS | {"description": "bits of a quantized module -> how many modules"},
    group_sizes=_COUNTS | {"description": "-1: one group"},
    act_order=FLAG | {"description": "of the first layer's modules"},
    kernels=_COUNTS | {"description": "kernel -> how many Linears it takes"},
    linears=array(shape(kernel=TEXT, bits=TEXT, group_size=TEXT, num=COUNT)),
    weight_bytes=COUNT,
    kv_bytes_per_token=COUNT,
)
_MODEL = shape(id=TEXT, object=const("model"), created=TIME, owned_by=TEXT, max_model_len=COUNT)

SHAPES: dict[str, Schema] = {
    "Error": shape(error=_ERROR),
    "Usage": _USAGE,
    "ChatLogprobs": _CHAT_LOGPROBS,
    "CompletionLogprobs": _COMPLETION_LOGPROBS,
    "ChatCompletion": shape(
        {**_TIER, **_PROMPT_LOGPROBS, **_PROMPT_IDS},
        id=TEXT,
        object=const("chat.completion"),
        **_HEAD,
        choices=array(
            shape(
                {**_STOP_REASON, **_TOKEN_IDS},
                index=COUNT,
                message=_MESSAGE,
                logprobs=either(ref("ChatLogprobs"), NULL),
                finish_reason=_FINISH,
            ),
            minItems=1,
        ),
        usage=ref("Usage"),
    ),
    "ChatCompletionChunk": shape(
        {"usage": _USAGE_OR_NULL, **_TIER, **_PROMPT_IDS},
        id=TEXT,
        object=const("chat.completion.chunk"),
        **_HEAD,
        choices=array(
            shape(
                {**_STOP_REASON, **_TOKEN_IDS},
                index=COUNT,
                delta=_DELTA,
                logprobs=either(ref("ChatLogprobs"), NULL),
                finish_reason=either(_FINISH, NULL),
            )
        ),
    ),
    "Completion": shape(
        _TIER,
        id=TEXT,
        object=const("text_completion"),
        **_HEAD,
        choices=array(
            shape(
                {**_STOP_REASON, **_PROMPT_LOGPROBS, **_TOKEN_IDS, **_PROMPT_IDS},
                index=COUNT,
                text=TEXT,
                logprobs=either(ref("CompletionLogprobs"), NULL),
                finish_reason=_FINISH,
            ),
            minItems=1,
        ),
        usage=ref("Usage"),
    ),
    "CompletionChunk": shape(
        {"usage": _USAGE_OR_NULL, **_TIER},
        id=TEXT,
        object=const("text_completion"),
        **_HEAD,
        choices=array(
            shape(
                {**_STOP_REASON, **_TOKEN_IDS, **_PROMPT_IDS},
                index=COUNT,
                text=TEXT,
                logprobs=either(ref("CompletionLogprobs"), NULL),
                finish_reason=either(_FINISH, NULL),
            )
        ),
    ),
    "Model": _MODEL,
    "Models": shape(object=const("list"), data=array(ref("Model"), minItems=1)),
    "Tokens": either(
        shape({"token_strs": array(TEXT)}, count=COUNT, max_model_len=COUNT, tokens=array(COUNT)),
        shape(tokens=array(either(COUNT, shape(id=COUNT, piece=either(TEXT, array(BYTE))))))
        | {"description": "of `content`"},
    ),
    "Text": shape(prompt=TEXT, content=TEXT) | {"description": "one text, under vLLM's name and llama.cpp's"},
    "Prompt": shape(prompt=TEXT),
    "InputTokens": shape(object=const("response.input_tokens"), input_tokens=COUNT),
    "TokenizerInfo": shape(
        bos_token=either(TEXT, NULL),
        eos_token=either(TEXT, NULL),
        bos_token_id=either(COUNT, NULL),
        eos_token_id=either(COUNT, NULL),
        vocab_size=COUNT,
        model_max_length=COUNT,
        add_bos_token=FLAG,
        chat_template_source=TEXT,
    ),
    "Probe": shape(status=const("ok", "ready", "shutting down", "engine dead", "engine loading", "engine stalled")),
    "Metrics": TEXT,
    "Page": TEXT,
    "ServerInfo": shape(
        version=TEXT,
        model=TEXT,
        description=TEXT | {"description": "the model, its quantization, the kernels in use, memory"},
        device=TEXT,
        dtype=TEXT,
        chat_template=TEXT | {"description": "where it comes from"},
        max_model_len=COUNT,
        max_num_seqs=COUNT,
        kv_cache_tokens=COUNT,
        checkpoint=either(_CHECKPOINT, NULL),
    ),
    "OpenApi": {"type": "object", "required": ["openapi", "info", "paths"]},
    "Version": shape(version=TEXT),
    **AGENT_SHAPES,
    **BATCH_SHAPES,
}
"""by the name under which /openapi.json has them"""
