"""Items of the Responses API as chat messages."""

from __future__ import annotations

from typing import Any

from gptq_api.api.errors import bad_request, not_supported
from gptq_api.api.requests.reading import invalid, parts_of, text_at
from gptq_api.api.tool_names import call, custom_arguments, model_name

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_NOT_TEXT = ("input_image", "input_file", "input_audio")
_OMITTED = "[left out: this model reads text only]"


class Items:
    """Takes items one after the other."""

    def __init__(self, skipped: list[str]) -> None:
        """`skipped`: takes the names of what has no effect."""
        self.messages: list[dict[str, Any]] = []
        self._skipped = skipped

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def add(self, item: dict[str, Any], path: str) -> None:
        """Raises ApiError 400 for what cannot be left out without a word."""
        kind = item.get("type", "message" if "role" in item else "item_reference")
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise invalid(f"{path}.role", "it must be 'user', 'assistant', 'system' or 'developer'")
            self.say(_ROLES[role], self._text(item.get("content"), f"{path}.content", refuse=True))
        elif kind == "function_call":
            self._call(item, path, text_at(item, "arguments", path))
        elif kind == "custom_tool_call":
            self._call(item, path, custom_arguments(text_at(item, "input", path)))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = self._text(item.get("output"), f"{path}.output", refuse=False)
            self.messages.append(
                {"role": "tool", "tool_call_id": text_at(item, "call_id", path, longest=512), "content": content}
            )
        elif kind == "item_reference":
            what = "refers to an item of an answer before, and this server keeps none: send the item itself"
            raise not_supported(path, what)
        elif kind != "reasoning":  # thoughts of the past are not told again
            self._skipped.append(f"input.{kind}" if isinstance(kind, str) else "input.type")

    def _call(self, item: dict[str, Any], path: str, arguments: str) -> None:
        """Calls behind one another, and what was said before them, are one message."""
        namespace = item.get("namespace")
        name = model_name(text_at(item, "name", path, longest=512), namespace if isinstance(namespace, str) else None)
        made = call(text_at(item, "call_id", path, longest=512), name, arguments)
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant":
            last.setdefault("tool_calls", []).append(made)
        else:
            self.messages.append({"role": "assistant", "content": "", "tool_calls": [made]})

    def _text(self, content: Any, path: str, *, refuse: bool) -> str:
        """All text. `refuse`: whether what is not text is a 400; what a tool gave back cannot be mended by whoever
        sends it, so there it is left out and said so in its place."""
        found = []
        for place, kind, part in parts_of(content, path, "input_text"):
            if kind in _TEXTS:
                found.append(text_at(part, "text", place))
            elif kind == "refusal":
                found.append(text_at(part, "refusal", place))
            elif kind in _NOT_TEXT and refuse:
                message = f"Invalid value for '{place}': this model reads text only, got a part of type '{kind}'."
                raise bad_request(message, place, "unsupported_parameter")
            else:
                found.append(_OMITTED)
                self._skipped.append(f"input.{kind}")
        return "\n".join(found)
