"""Fields of OpenAI and its peers that are known here and not honoured: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptq_api.api.errors import not_supported

_NOTHING: tuple[Any, ...] = (None, False, [], {})
REFUSED: dict[str, tuple[Any, ...]] = {
    "functions": _NOTHING,
    "function_call": (None, "none"),
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "grammar": (None, ""),
    "json_schema": _NOTHING,
    "modalities": (None, ["text"]),
    "audio": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": (None, "none"),
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "documents": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "return_tokens_as_token_ids": _NOTHING,
    "use_beam_search": _NOTHING,
    "length_penalty": (None, 1, 1.0),
    "suffix": (None, ""),
    "echo": _NOTHING,
    "best_of": (None, 1),
    "bad_words": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "repeat_penalty": (None, 1, 1.0),
    "typical_p": (None, 1, 1.0),
    "mirostat": (None, 0),
}
"""field of a body -> the values that mean "off"; of several in one body the first here is named, so that what asks for
something stands before what says how"""
INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar",
    "json_schema": "response_format",
    "best_of": "n",
    "repeat_penalty": "repetition_penalty",
}
"""what says the same here"""
REFUSED_IN_MESSAGES = ("function_call", "audio")


def refuse(fields: Mapping[str, Any]) -> None:
    """Raises ApiError 400 where one of the fields asks for something that is not there."""
    for name in (name for name in REFUSED if name in fields):
        # `True == 1`, so types are compared too
        if not any(type(fields[name]) is type(off) and fields[name] == off for off in REFUSED[name]):
            has = f", which has '{INSTEAD[name]}' instead" if name in INSTEAD else ""
            raise not_supported(name, f"is not supported by this server{has}")
