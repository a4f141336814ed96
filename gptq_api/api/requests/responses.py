"""The body of POST /v1/responses, and what it means as a chat completion request. Stateless: nothing is kept."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Len
from pydantic import Field

from gptq_api.api.errors import bad_request, not_supported
from gptq_api.api.requests.fields import Count, Name, Share, Temperature, Text
from gptq_api.api.requests.own_fields import OwnFields
from gptq_api.api.requests.reading import invalid, missing, optional_text_at, text, text_at
from gptq_api.api.requests.responses_items import Items
from gptq_api.api.requests.translated import Names, Translated, chat_request
from gptq_api.api.requests.turns import fitted
from gptq_api.api.tool_names import CUSTOM_PARAMETERS, Origin, Toolbox, model_name
from gptq_api.text.chat import TemplateFacts

MAX_ITEMS = 8192
MAX_TOOLS = 1024
_LOGPROBS = "message.output_text.logprobs"
_STATELESS = "asks for a state, and this server keeps none: send the whole conversation in 'input'"
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "background": "asks for an answer in the background, which this server does not have",
    "prompt": "asks for a stored prompt, and this server keeps none",
}
_WITHOUT_EFFECT = ("context_management", "max_tool_calls", "moderation", "prompt_cache_options")

Object = Annotated[dict[str, Any], Len(0, MAX_TOOLS)]
Objects = Annotated[list[Object], Field(max_length=MAX_ITEMS, fail_fast=True)]


class ResponsesRequest(OwnFields):
    model: Name | None = None
    input: Text | Objects
    """A text, or items: messages, calls of functions and what came of them, reasoning."""
    instructions: Text | None = None
    """Said before everything in `input`, as the system's."""
    max_output_tokens: Count | None = None
    """Default: what the context leaves."""
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: Object | None = None
    text: Object | None = None
    """`format`: text, json_object or json_schema."""
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Of type function, custom or namespace; others are skipped."""
    tool_choice: Name | Object | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[Name], Field(max_length=64, fail_fast=True)] | None = None
    metadata: Object | None = None
    reasoning: Object | None = None
    store: bool | None = None
    """Accepted; nothing is stored."""
    truncation: Name | None = None
    user: Name | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    client_metadata: Object | None = None

    def unknown(self, *, strict: bool) -> list[str]:
        """Also fields that are known and have no effect here. Raises ApiError 400 for those that ask for what is not
        there, and with `strict` for unknown ones."""
        extra = self.model_extra or {}
        for name, what in _REFUSED.items():
            if extra.get(name) not in (None, False):
                raise not_supported(name, what)
        known = {name: extra.pop(name) for name in (*_REFUSED, *_WITHOUT_EFFECT) if name in extra}
        ignored = [name for name in _WITHOUT_EFFECT if known.get(name) not in (None, [], {})]
        if self.store:
            ignored.append("store")
        if self.truncation not in (None, "disabled"):
            ignored.append("truncation")
        if (self.reasoning or {}).get("effort") not in (None, "none"):
            ignored.append("reasoning.effort")
        if (self.text or {}).get("verbosity") is not None:
            ignored.append("text.verbosity")
        return [*super().unknown(strict=strict), *ignored]

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def translated(self, template: TemplateFacts, *, strict: bool) -> Translated:
        """Raises ApiError 400."""
        skipped = self.unknown(strict=strict)
        names = Names({"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "include"})
        tools, offered = self._tools(names, skipped)
        fields: dict[str, Any] = {
            "messages": fitted(self._messages(skipped), template),
            "model": self.model,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            **self.own(),
        }
        if not fields["messages"]:
            raise missing("input")
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        fields |= self._tool_fields(tools, offered, skipped) | self._format(names)
        given = {name: value for name, value in fields.items() if value is not None}
        return Translated(chat_request(given, names), names, tools, list(dict.fromkeys(skipped)))

    def _messages(self, skipped: list[str]) -> list[dict[str, Any]]:
        items = Items(skipped)
        if self.instructions:
            items.say("system", self.instructions)
        if isinstance(self.input, str):
            items.say("user", self.input)
        else:
            for index, item in enumerate(self.input):
                items.add(item, f"input[{index}]")
        return items.messages

    def _tools(self, names: Names, skipped: list[str]) -> tuple[Toolbox, list[str]]:
        """And the names that the model sees, those of one tool of the client's behind one another."""
        box = Toolbox()
        for index, tool in enumerate(self.tools or ()):
            path = f"tools[{index}]"
            if tool.get("type") != "namespace":
                _add_tool(box, tool, path, None, names, skipped)
                continue
            members = tool.get("tools")
            if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
                raise invalid(f"{path}.tools", "it must be an array of tools")
            namespace = text_at(tool, "name", path, longest=512)
            for number, member in enumerate(members[:MAX_TOOLS]):
                _add_tool(box, member, f"{path}.tools[{number}]", namespace, names, skipped)
        return box, list(box.origins)

    def _tool_fields(self, tools: Toolbox, offered: list[str], skipped: list[str]) -> dict[str, Any]:
        choice = self.tool_choice
        if isinstance(choice, str):
            if choice not in ("none", "auto", "required"):
                raise invalid("tool_choice", "it must be 'none', 'auto', 'required' or an object")
        elif choice is not None:
            kind = text_at(choice, "type", "tool_choice", longest=512)
            if kind == "allowed_tools":
                allowed = choice.get("tools")
                if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
                    raise invalid("tool_choice.tools", "it must be an array of tools")
                kept = {_chosen(tool) for tool in allowed}
                tools.functions = [tool for tool in tools.functions if tool["function"]["name"] in kept]
                choice = choice.get("mode") if choice.get("mode") in ("auto", "required") else "auto"
            elif kind in ("function", "custom"):
                text_at(choice, "name", "tool_choice", longest=512)
                name = _chosen(choice)
                if name not in offered:
                    raise bad_request(f"'tool_choice' names '{name[:64]}', which is not among 'tools'.", "tool_choice")
                choice = {"type": "function", "function": {"name": name}}
            else:
                skipped.append(f"tool_choice.{kind}")
                choice = None
        if not tools.functions:
            if choice == "required":
                raise bad_request("'tool_choice' is 'required', and none of 'tools' can be called here.", "tool_choice")
            return {}
        return {"tools": tools.functions, "tool_choice": choice, "parallel_tool_calls": self.parallel_tool_calls}

    def _format(self, names: Names) -> dict[str, Any]:
        wanted = (self.text or {}).get("format")
        if wanted is None:
            return {}
        if not isinstance(wanted, dict):
            raise invalid("text.format", "it must be an object")
        kind = text_at(wanted, "type", "text.format", longest=512)
        names.paths |= {"response_format.json_schema": "text.format", "response_format": "text.format"}
        if kind == "text":
            return {}
        if kind != "json_schema":
            return {"response_format": {"type": kind}}
        schema = {name: wanted[name] for name in ("name", "schema", "strict", "description") if name in wanted}
        return {"response_format": {"type": kind, "json_schema": schema}}


def _chosen(tool: dict[str, Any]) -> str:
    namespace = tool.get("namespace")
    return model_name(str(tool.get("name", "")), namespace if isinstance(namespace, str) else None)


def _add_tool(
    box: Toolbox, tool: dict[str, Any], path: str, namespace: str | None, names: Names, skipped: list[str]
) -> None:
    kind = text(tool.get("type", "function"), f"{path}.type", longest=512)
    if kind not in ("function", "custom"):
        skipped.append(f"tools.{kind}")
        return
    origin = Origin(text_at(tool, "name", path, longest=512), namespace, custom=kind == "custom")
    names.paths[f"tools[{len(box.functions)}].function"] = path
    names.paths[f"tools[{len(box.functions)}]"] = path
    description = optional_text_at(tool, "description", path)
    if kind == "custom":
        form = tool.get("format")
        if isinstance(form, dict) and isinstance(form.get("definition"), str):
            skipped.append("tools.custom.format")  # told to the model, not enforced
            description += f"\n\nThe input is written in this grammar ({form.get('syntax', '')}):\n{form['definition']}"
        box.add(origin, description, CUSTOM_PARAMETERS, strict=True)
        return
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict | None):
        raise invalid(f"{path}.parameters", "it must be an object")
    strict = tool.get("strict")
    box.add(origin, description, parameters, strict=strict if isinstance(strict, bool) else "strict" not in tool)
