"""For each field of the two generation routes: a value, and by what one sees that it did something.

`python tools/fields_table.py` writes docs/fields.md; tests/system/test_fields.py sends what is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

END = "END"
"""stands for the id of the model's end token, as a key of logit_bias"""
LONG = "What does a library do with a book that nobody has asked for since it was bought? " * 3


@dataclass(slots=True)
class Seen:
    """Two answers to a body, without the field and with it."""

    without: httpx.Response
    answer: httpx.Response
    log: str

    @property
    def choice(self) -> dict[str, Any]:
        found: dict[str, Any] = self.answer.json()["choices"][0]
        return found

    @property
    def text(self) -> str:
        return text_of(self.answer)

    @property
    def usage(self) -> dict[str, Any]:
        found: dict[str, Any] = self.answer.json()["usage"]
        return found

    @property
    def differs(self) -> bool:
        """Whether the text is another one."""
        return self.answer.status_code == 200 and self.text != text_of(self.without)

    @property
    def prompt_differs(self) -> bool:
        return bool(self.usage["prompt_tokens"] != self.without.json()["usage"]["prompt_tokens"])

    @property
    def num_tokens(self) -> int:
        return int(self.usage["completion_tokens"])


def text_of(answer: httpx.Response) -> str:
    choice = answer.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@dataclass(slots=True)
class Case:
    value: Any
    seen: Callable[[Seen], bool]
    beside: dict[str, Any] = field(default_factory=dict)
    """what else is in the body, with the field and without it"""
    variables: bool = False
    """whether it takes a chat template that reads variables"""


def differs(seen: Seen) -> bool:
    return seen.differs


def prompt_differs(seen: Seen) -> bool:
    return seen.prompt_differs


def logged(word: str) -> Callable[[Seen], bool]:
    return lambda seen: word in seen.log and seen.answer.status_code == 200


def nothing(seen: Seen) -> bool:
    """Of a field that is accepted."""
    return seen.answer.status_code == 200 and seen.text == text_of(seen.without)


def ends_with_stop(seen: Seen) -> bool:
    return bool(seen.choice["finish_reason"] == "stop" != seen.without.json()["choices"][0]["finish_reason"])


def at_the_deadline(seen: Seen) -> bool:
    return seen.answer.status_code == 504 or seen.choice.get("stop_reason") == "deadline"


def tells_ids(seen: Seen) -> bool:
    prompt = (seen.choice | seen.answer.json())["prompt_token_ids"]
    return len(prompt) == seen.usage["prompt_tokens"] and len(seen.choice["token_ids"]) == seen.num_tokens


FUNCTION = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
TALKED = [{"role": "user", "content": "Count to ten."}, {"role": "assistant", "content": "1, 2, 3,"}]
MORE = {"max_tokens": 60}
ENDS = {"logit_bias": {END: 100}}
"""The end token is what comes first."""
CASES: dict[str, Case] = {
    "model": Case("none-such", lambda seen: seen.answer.status_code == 404),
    "messages": Case([{"role": "user", "content": "Bye"}], differs),
    "prompt": Case([1, 5, 6], differs),
    "temperature": Case(0, differs, MORE),
    "top_p": Case(0.01, differs, MORE),
    "top_k": Case(1, differs, MORE),
    "min_p": Case(1, differs, MORE),
    "presence_penalty": Case(2, differs, {"temperature": 0, "max_tokens": 60}),
    "frequency_penalty": Case(2, differs, {"temperature": 0, "max_tokens": 60}),
    "repetition_penalty": Case(10, differs, {"temperature": 0, "max_tokens": 60}),
    "seed": Case(8, differs, MORE),
    "n": Case(2, lambda seen: len(seen.answer.json()["choices"]) == 2),
    "max_tokens": Case(3, lambda seen: seen.num_tokens == 3),
    "max_completion_tokens": Case(3, lambda seen: seen.num_tokens == 3),
    "min_tokens": Case(5, lambda seen: seen.num_tokens >= 5, ENDS | {"ignore_eos": False}),
    "stop": Case(["e", "a", "i", "o", " "], ends_with_stop),
    "stop_token_ids": Case([65], ends_with_stop, {"logit_bias": {"65": 100}}),
    "ignore_eos": Case(True, lambda seen: seen.num_tokens == 12, ENDS | {"ignore_eos": False}),
    "include_stop_str_in_output": Case(True, differs, {"stop": ["e", "a", "i", "o", " "]}),
    "skip_special_tokens": Case(False, differs, ENDS),
    "logit_bias": Case({"65": 100}, differs),
    "return_token_ids": Case(True, tells_ids),
    "stream": Case(True, lambda seen: seen.answer.headers["content-type"].startswith("text/event-stream")),
    "stream_options": Case(
        {"include_usage": True}, lambda seen: '"completion_tokens":12' in seen.answer.text, {"stream": True}
    ),
    "cache_salt": Case(
        "seen-salt", lambda seen: seen.usage["prompt_tokens_details"]["cached_tokens"] == 0, {"user": "seen-before"}
    ),
    "user": Case("seen-user", logged("seen-user")),
    "metadata": Case({"job": "seen-job"}, logged("seen-job")),
    "store": Case(True, logged("store=True")),
    "safety_identifier": Case("seen-id", logged("seen-id")),
    "prompt_cache_key": Case("seen-key", logged("seen-key")),
    "prompt_cache_retention": Case("24h", nothing),
    "service_tier": Case("flex", lambda seen: nothing(seen) and seen.answer.json()["service_tier"] == "default"),
    "response_format": Case(
        {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}},
        lambda seen: isinstance(json.loads(seen.text), bool),
        {"ignore_eos": False},
    ),
    "structured_outputs": Case(
        {"choice": ["seen", "not seen"]}, lambda seen: seen.text in ("seen", "not seen"), {"ignore_eos": False}
    ),
    "tools": Case([FUNCTION], prompt_differs, {"ignore_eos": False}),
    "tool_choice": Case(
        "required",
        lambda seen: bool(seen.choice["message"].get("tool_calls")),
        {"tools": [FUNCTION], "ignore_eos": False, "max_tokens": 100},
    ),
    "timeout": Case(0.001, at_the_deadline, {"max_tokens": 300}),
    "chat_template_kwargs": Case({"enable_thinking": True}, prompt_differs, variables=True),
    "documents": Case([{"title": "Books", "text": "Nothing was asked for."}], prompt_differs, variables=True),
    "reasoning_effort": Case("high", prompt_differs, variables=True),
    "verbosity": Case("high", prompt_differs, variables=True),
    "logprobs": Case(True, lambda seen: len(seen.choice["logprobs"]["content"]) == 12),
    "completions.logprobs": Case(2, lambda seen: len(seen.choice["logprobs"]["tokens"]) == 12),
    "top_logprobs": Case(
        2, lambda seen: len(seen.choice["logprobs"]["content"][0]["top_logprobs"]) == 2, {"logprobs": True}
    ),
    "add_generation_prompt": Case(False, prompt_differs),
    "continue_final_message": Case(True, prompt_differs, {"messages": TALKED}),
    "prompt_logprobs": Case(1, lambda seen: '"prompt_logprobs":[null,' in seen.answer.text),
    "echo": Case(True, lambda seen: seen.text.startswith(LONG)),
    "best_of": Case(3, lambda seen: seen.num_tokens == 36),
    "add_special_tokens": Case(False, prompt_differs),
}
"""by name, where the routes differ with the word for the route before it"""
ELSEWHERE = {
    "priority": "tests/system/test_fields.py::test_an_urgent_request_overtakes_those_that_wait",
    "parallel_tool_calls": "tests/text/tools/test_grammar.py::test_auto",
    "prediction": "tests/system/test_prediction.py::test_a_copy_comes_in_fewer_steps",
}
"""fields whose effect takes more than two requests: the test that sees it"""


def case_of(route: str, name: str) -> Case | None:
    """None: there is a test elsewhere. Raises KeyError for a field that nobody looks at."""
    if name in ELSEWHERE:
        return None
    return CASES.get(f"{route}.{name}") or CASES[name]
