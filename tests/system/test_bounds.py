"""The ends of every sampling field's range, over HTTP: an answer or a 400 that names value and bound, never a 500."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.support.server import Server, check_error, stream_chunks

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DENORMAL = 5e-324
LEGAL: dict[str, list[Any]] = {
    "temperature": [0, DENORMAL, 1e-300, 1e-45, 1e-38, 2],
    "top_p": [0, DENORMAL, 1e-45, 1e-38, 1],
    "min_p": [0, DENORMAL, 1e-45, 1e-38, 1],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "presence_penalty": [-2, -DENORMAL, DENORMAL, 1e-45, 2],
    "frequency_penalty": [-2, -DENORMAL, DENORMAL, 1e-45, 2],
    "repetition_penalty": [0.01, 1, 10],
    "seed": [-(2**63), 0, 2**63 - 1],
    "logit_bias": [{"7": -100, "8": DENORMAL}, {"7": 100, "8": -DENORMAL}, {"0": 1e-45}],
    "min_tokens": [0, 4],
}
OUTSIDE: list[tuple[str, Any, str]] = [
    ("temperature", -DENORMAL, "0"),
    ("temperature", 2.0000000000000004, "2"),
    ("top_p", -DENORMAL, "0"),
    ("top_p", 1.0000000000000002, "1"),
    ("min_p", -DENORMAL, "0"),
    ("min_p", 1.0000000000000002, "1"),
    ("top_k", -2, "-1"),
    ("top_k", 2**31, str(2**31 - 1)),
    ("presence_penalty", -2.0000000000000004, "-2"),
    ("presence_penalty", 2.0000000000000004, "2"),
    ("frequency_penalty", -2.0000000000000004, "-2"),
    ("frequency_penalty", 2.0000000000000004, "2"),
    ("repetition_penalty", 0, "0.01"),
    ("repetition_penalty", DENORMAL, "0.01"),
    ("repetition_penalty", 1e-38, "0.01"),
    ("repetition_penalty", 0.009999999999999998, "0.01"),
    ("repetition_penalty", 10.000000000000002, "10"),
    ("seed", -(2**63) - 1, str(-(2**63))),
    ("seed", 2**63, str(2**63 - 1)),
    ("min_tokens", -1, "0"),
    ("max_tokens", 2**31, str(2**31 - 1)),
]
LONG: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "seed": 1}


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "a a a"}]} if path == CHAT else {"prompt": "a a a"}
    return prompt | LONG | fields


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_legal_end_is_answered(server: Server, path: str) -> None:
    for field, values in LEGAL.items():
        for value in values:
            answer = server.post(path, body(path, **{field: value}))
            assert answer.status_code == 200, (field, value, answer.text)
            assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_just_outside_is_told_with_value_and_bound(server: Server, path: str) -> None:
    for field, value, bound in OUTSIDE:
        error = check_error(server.post(path, body(path, **{field: value})), 400, field)
        assert f"got {value}" in error["message"] and f" {bound}, got" in error["message"], error["message"]


def test_extremes_together(server: Server) -> None:
    """Every repetition_penalty's end with every other field's: nothing overflows float32."""
    ends: dict[str, list[Any]] = {
        "repetition_penalty": [0.01, 10],
        "presence_penalty": [-2, 2],
        "frequency_penalty": [-2, 2],
        "temperature": [0, DENORMAL, 2],
        "logit_bias": [{str(i): sign for i in range(0, 2048, 2)} for sign in (-100, 100)],
    }
    for values in itertools.product(*ends.values()):
        fields = dict(zip(ends, values, strict=True))
        more = {"top_p": 0, "min_p": 1, "top_k": 1} if fields["presence_penalty"] < 0 else {"top_p": DENORMAL}
        answer = server.post(COMPLETIONS, body(COMPLETIONS, min_tokens=2, logprobs=5, **fields, **more))
        assert answer.status_code == 200, (fields, answer.text)
        told = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert len(told) == 4 and all(-1e4 < value <= 0 for value in told), "of the logits as they were"
        json.dumps(told, allow_nan=False)


def test_a_long_answer_of_one_token_with_the_harshest_penalties(server: Server) -> None:
    """The count that frequency_penalty is multiplied with grows; the bias keeps the token in front."""
    harsh = {"logit_bias": {"7": 100}, "repetition_penalty": 0.01, "frequency_penalty": -2, "presence_penalty": -2}
    found = stream_chunks(server, body(CHAT, **harsh, max_tokens=500, temperature=2))
    assert found[-1]["choices"][0]["finish_reason"] == "length"
