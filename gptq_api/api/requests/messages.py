"""The bodies of POST /v1/messages and /v1/messages/count_tokens (Anthropic's API), and what they mean as a chat
completion request."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import Field

from gptq_api.api.errors import bad_request
from gptq_api.api.requests.fields import MAX_STOP, MAX_STOP_TEXT, MAX_TOKEN, Body, Count, Name, Share, Text
from gptq_api.api.requests.own_fields import OwnFields
from gptq_api.api.requests.reading import invalid, missing, optional_text_at, parts_of, text_at
from gptq_api.api.requests.responses import MAX_TOOLS, Object
from gptq_api.api.requests.translated import Names, Translated, chat_request
from gptq_api.api.requests.turns import fitted
from gptq_api.api.tool_names import Origin, Toolbox, call, model_name
from gptq_api.text.chat import TemplateFacts

ATTRIBUTION = "x-anthropic-billing-header:"
"""Claude Code begins its system prompt with such a line, which is another one in every request."""
_OMITTED = {"image": "[an image was here: this model reads text only]", "document": "[a document was here]"}
StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_TEXT)]


MAX_BLOCKS = 1024
Blocks = Annotated[list[Object], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: Text | Blocks
    """A text, or blocks: text, tool_use, tool_result, thinking; others are skipped."""


class CountTokensRequest(OwnFields):
    model: Name | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: Text | Blocks | None = None
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Those with an `input_schema`; tools that run at Anthropic are skipped."""
    tool_choice: Object | None = None
    thinking: Object | None = None
    """Thoughts are told as thinking blocks where this is there and not disabled, and left out otherwise."""
    output_config: Object | None = None
    cache_control: Object | None = None
    """Accepted here and on every block: prefixes are always cached."""
    context_management: Object | None = None

    def skipped_fields(self) -> list[str]:
        """Known ones that have no effect."""
        ignored = []
        if (self.thinking or {}).get("budget_tokens") is not None:
            ignored.append("thinking.budget_tokens")
        if (self.output_config or {}).get("effort") is not None:
            ignored.append("output_config.effort")
        if self.context_management:
            ignored.append("context_management")
        return ignored

    @property
    def wants_thinking(self) -> bool:
        return (self.thinking or {}).get("type") not in (None, "disabled")

    def more_fields(self) -> dict[str, Any]:
        """Of a chat completion request, besides the conversation and tools."""
        return {"max_tokens": 1}

    def translated(self, template: TemplateFacts, *, strict: bool) -> Translated:
        """Raises ApiError 400."""
        skipped = [*self.unknown(strict=strict), *self.skipped_fields()]
        names = Names({"stop": "stop_sequences"})
        turns = _Turns(skipped)
        dropped = turns.add_system(self.system)
        for index, message in enumerate(self.messages):
            turns.add(message.role, message.content, f"messages[{index}].content")
        if not turns.messages:
            raise missing("messages")
        last = turns.messages[-1]
        fields = {
            "messages": fitted(turns.messages, template),
            "model": self.model,
            # what the client has said of the answer already is gone on with
            "continue_final_message": True if last["role"] == "assistant" and "tool_calls" not in last else None,
            **self.own(),
            **self.more_fields(),
        }
        box = self._tools(names, skipped)
        fields |= self._tool_fields(box, skipped) | self._format(names)
        given = {name: value for name, value in fields.items() if value is not None}
        return Translated(chat_request(given, names), names, box, list(dict.fromkeys(skipped)), dropped)

    def _tools(self, names: Names, skipped: list[str]) -> Toolbox:
        box = Toolbox()
        for index, tool in enumerate(self.tools or ()):
            path = f"tools[{index}]"
            kind = tool.get("type") or "custom"
            if kind != "custom" or "input_schema" not in tool:
                skipped.append(f"tools.{kind}")
                continue
            if not isinstance(tool["input_schema"], dict):
                raise invalid(f"{path}.input_schema", "it must be an object")
            names.paths[f"tools[{len(box.functions)}].function.parameters"] = f"{path}.input_schema"
            names.paths[f"tools[{len(box.functions)}].function"] = path
            names.paths[f"tools[{len(box.functions)}]"] = path
            strict = True if tool.get("strict") is True else None
            origin = Origin(text_at(tool, "name", path, longest=512))
            box.add(origin, optional_text_at(tool, "description", path), tool["input_schema"], strict)
        return box

    def _tool_fields(self, box: Toolbox, skipped: list[str]) -> dict[str, Any]:
        choice = self.tool_choice or {"type": "auto"}
        kind = text_at(choice, "type", "tool_choice", longest=512)
        chosen: Any = {"auto": "auto", "any": "required", "none": "none"}.get(kind)
        if kind == "tool":
            name = model_name(text_at(choice, "name", "tool_choice", longest=512))
            if name not in box.origins:
                raise bad_request(f"'tool_choice' names '{name}', which is not among 'tools'.", "tool_choice")
            chosen = {"type": "function", "function": {"name": name}}
        elif chosen is None:
            skipped.append(f"tool_choice.{kind}")
            chosen = "auto"
        if not box.functions:
            if chosen == "required":
                raise bad_request("'tool_choice' is 'any', and none of 'tools' can be called here.", "tool_choice")
            return {}
        one = True if choice.get("disable_parallel_tool_use") is True else None
        return {"tools": box.functions, "tool_choice": chosen, "parallel_tool_calls": None if one is None else False}

    def _format(self, names: Names) -> dict[str, Any]:
        wanted = (self.output_config or {}).get("format")
        if not isinstance(wanted, dict):
            return {}
        names.paths |= {
            "response_format.json_schema.schema": "output_config.format.schema",
            "response_format": "output_config.format",
        }
        schema = {"name": "output", "schema": wanted.get("schema"), "strict": True}
        return {"response_format": {"type": text_at(wanted, "type", "output_config.format"), "json_schema": schema}}


class MessagesRequest(CountTokensRequest):
    max_tokens: Count
    stop_sequences: Annotated[list[StopSequence], Field(max_length=MAX_STOP, fail_fast=True)] | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Ge(0), Le(MAX_TOKEN)] | None = None
    stream: bool | None = None
    metadata: Object | None = None
    service_tier: Name | None = None
    container: Name | None = None
    inference_geo: Name | None = None

    def skipped_fields(self) -> list[str]:
        return super().skipped_fields() + (["container"] if self.container else [])

    def more_fields(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
        }


class _Turns:
    """Takes messages one after the other."""

    def __init__(self, skipped: list[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._skipped = skipped

    def add_system(self, system: Any) -> str:
        """Without the attribution line: after it, nothing that was cached would be found. Returns its name."""
        if system is None:
            return ""
        texts = [text_at(part, "text", path) for path, kind, part in self._texts(system, "system")]
        dropped = ""
        if texts and texts[0].startswith(ATTRIBUTION):
            dropped = ATTRIBUTION.rstrip(":")
            texts[0] = texts[0].partition("\n")[2].lstrip("\n")
        if found := [text for text in texts if text]:
            self.messages.append({"role": "system", "content": "\n\n".join(found)})
        return dropped

    def add(self, role: str, content: Any, path: str) -> None:
        """Raises ApiError 400."""
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for place, kind, block in parts_of(content, path, "text"):
            if kind == "text":
                texts.append(text_at(block, "text", place))
            elif kind == "tool_use":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    raise invalid(f"{place}.input", "it must be an object")
                name = model_name(text_at(block, "name", place, longest=512))
                calls.append(call(text_at(block, "id", place, longest=512), name, json.dumps(arguments)))
            elif kind == "tool_result":
                called = text_at(block, "tool_use_id", place, longest=512)
                result = {"role": "tool", "tool_call_id": called, "content": self._result(block, place)}
                self.messages.append(result)
            elif kind not in ("thinking", "redacted_thinking"):  # thoughts of the past are not told again
                self._skip(kind, texts)
        said = "\n".join(text for text in texts if text)
        if calls:
            self.messages.append({"role": "assistant", "content": said, "tool_calls": calls})
        elif said:
            self.messages.append({"role": role, "content": said})

    def _result(self, block: dict[str, Any], place: str) -> str:
        texts: list[str] = []
        for path, kind, part in parts_of(block.get("content") or "", f"{place}.content", "text"):
            if kind == "text":
                texts.append(text_at(part, "text", path))
            else:
                self._skip(kind, texts)
        return ("Error: " if block.get("is_error") is True else "") + "\n".join(texts)

    def _texts(self, content: Any, path: str) -> list[tuple[str, str, dict[str, Any]]]:
        found = []
        for part in parts_of(content, path, "text"):
            if part[1] == "text":
                found.append(part)
            else:
                self._skip(part[1], [])
        return found

    def _skip(self, kind: str, texts: list[str]) -> None:
        self._skipped.append(f"messages.{kind}")
        if kind in _OMITTED:
            texts.append(_OMITTED[kind])
