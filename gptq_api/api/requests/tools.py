"""`tools` and `tool_choice`: which functions a model may call, and what its answer may look like then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from gptq_api.api.body import count_text
from gptq_api.api.errors import ApiError, bad_request
from gptq_api.api.requests.constraints import ConstrainedFields, Constraint, Schema
from gptq_api.api.requests.fields import Body, Name, check_text
from gptq_api.api.service import Service
from gptq_api.grammar import compile as grammars
from gptq_api.text.parts import StoppedReader
from gptq_api.text.tools.grammar import Function, answer_grammar
from gptq_api.text.tools.layouts import CallLayout
from gptq_api.text.tools.patterns.grammar import Demand, write
from gptq_api.text.tools.patterns.reader import CallReader
from gptq_api.text.tools.patterns.spelling import Spelling, controls
from gptq_api.text.tools.reader import END_THINK, THINK, AnswerReader

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$", min_length=1, max_length=256)]
Description = Annotated[str, Field(max_length=2**16), AfterValidator(check_text)]


class FunctionDefinition(Body):
    name: FunctionName
    description: Description | None = None
    parameters: Schema | None = None
    """JSON schema of the arguments, an object's. Default: no arguments."""
    strict: bool | None = None
    """Refuse a schema that cannot be enforced. Default: any object is taken instead, and the response header
    x-unsupported-params says so."""


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: Name


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


def _arguments(value: str) -> str:
    """What an assistant's message says that a function was called with: templates want the object."""
    check_text(value)
    count_text(value)
    try:
        found = json.loads(value or "{}")
    except (ValueError, RecursionError):
        raise ValueError("it must be a JSON object as text") from None
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object as text")
    return value or "{}"


class CalledFunction(Body):
    name: Name
    arguments: Annotated[str, Field(max_length=2**20), AfterValidator(_arguments)]


class ToolCall(Body):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolFields(ConstrainedFields):
    """`ConstrainedFields`, and functions."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    """Default: auto where there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold several calls. Default: true."""

    def unknown(self, *, strict: bool) -> list[str]:
        found = super().unknown(strict=strict)
        for index, tool in enumerate(self.tools or ()):
            found += (f"tools[{index}].{name}" for name in tool.unknown(strict=strict))
            found += (f"tools[{index}].function.{name}" for name in tool.function.unknown(strict=strict))
        return found

    @property
    def forced_name(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def shown_tools(self) -> list[dict[str, Any]]:
        """For the chat template."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    def check_tools(self) -> None:
        """Raises ApiError 400."""
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
            raise bad_request(f"Invalid value for 'tools': two of them are called '{twice}'.", "tools")
        if self.tool_choice == "required" and not names:
            raise bad_request("'tool_choice' is 'required', and there are no 'tools'.", "tool_choice")
        if self.forced_name is not None and self.forced_name not in names:
            raise bad_request(
                f"'tool_choice' names '{self.forced_name[:64]}', which is not among 'tools'.", "tool_choice"
            )


@dataclass(slots=True)
class Reading:
    """How an answer is constrained and read."""

    grammar: str = ""
    new_reader: Callable[[], StoppedReader] | None = None
    """None: its text is its content"""
    shown: frozenset[int] = frozenset()
    """control tokens that the reader looks for"""
    relaxed: list[str] = field(default_factory=list)
    """paths of schemas that are not enforced"""


async def reading(service: Service, body: ToolFields, prompt_ids: list[int]) -> Reading:
    """Raises ApiError 400."""
    layout = service.template.calls
    thinks = _thinks(service, prompt_ids)
    constraint = body.constraint()
    found = Reading()
    begin_token = _control_token(service, layout.begin)
    if body.may_call:
        functions = await _functions(service, body, found.relaxed)
        text_schema = None
        forced = body.tool_choice == "required" or body.forced_name is not None
        if constraint is not None and not forced:
            if constraint.schema is None:
                raise bad_request(f"'tools' and '{constraint.param}' exclude each other.", constraint.param)
            await _checked(service, constraint)
            text_schema = grammars.inner_schema(constraint.schema)
        many = body.parallel_tool_calls is not False and body.forced_name is None
        if layout.pattern is not None:
            schemas = {function.name: grammars.outer_schema(function.schema) for function in functions}
            answer = None if text_schema is None else grammars.outer_schema(text_schema)
            demand = Demand(schemas, must_call=forced, many=many, answer=answer)
            text = write(layout.pattern, service.tokenizer, demand, grammars.embedded)
        else:
            text = answer_grammar(
                layout,
                functions,
                forced=forced,
                many=many,
                begin_token=begin_token,
                text_schema=text_schema,
                thoughts=thinks == "does",
            )
        try:
            found.grammar = grammars.native_lark(text)
        except grammars.GrammarError as error:
            raise bad_request(f"Invalid value for 'tools': together, {error}.", "tools") from None
        if why := await service.grammars.check(found.grammar):  # each schema may be cheap and all of them too dear
            raise bad_request(f"Invalid value for 'tools': together, {why[:300]}.", "tools")
    elif constraint is not None:
        found.grammar = await _checked(service, constraint)
        if thinks == "does" and constraint.schema is not None:
            found.grammar = grammars.lark(grammars.after_thoughts(constraint.schema))
        elif thinks == "does":
            thinks = ""
    if found.grammar and body.ignore_eos:
        raise bad_request("'ignore_eos' and 'tools' exclude each other: a call that is complete ends.", "ignore_eos")
    if not body.may_call and not thinks:
        return found
    if layout.pattern is not None and body.may_call:
        return _read_by_pattern(service, body, layout.pattern, found)
    layout_read: CallLayout | None = layout if body.may_call else None
    stop = (*body.stop, *service.template.stop)
    include_stop = bool(body.include_stop_str_in_output)
    found.new_reader = lambda: StoppedReader(AnswerReader(layout_read, thinks), stop, include_stop)
    marks = [layout.begin] if body.may_call else []
    ids = (_control_token(service, mark) for mark in (*marks, *((THINK, END_THINK) if thinks else ())))
    found.shown = frozenset(i for i in ids if i is not None)
    return found


def _read_by_pattern(service: Service, body: ToolFields, pattern: Spelling, found: Reading) -> Reading:
    names = frozenset(tool.function.name for tool in body.tools or ())
    stop = (*body.stop, *service.template.stop)
    include_stop = bool(body.include_stop_str_in_output)
    found.new_reader = lambda: StoppedReader(CallReader(pattern, names), stop, include_stop)
    found.shown = controls(pattern, service.tokenizer)
    return found


def _thinks(service: Service, prompt_ids: list[int]) -> Literal["", "may", "does"]:
    """Whether this model thinks before it speaks: by its template and vocabulary, and the end of the prompt."""
    if not service.template.names_thoughts and service.tokenizer.token_to_id(THINK) is None:
        return ""
    end = service.tokenizer.decode(prompt_ids[-8:], skip_special=False).rstrip()
    return "does" if end.endswith(THINK) else "may"


def _control_token(service: Service, text: str) -> int | None:
    """Its id, where the text is a control token."""
    token_id = service.tokenizer.token_to_id(text) if text else None
    return token_id if token_id in service.tokenizer.special_token_ids else None


async def _functions(service: Service, body: ToolFields, relaxed: list[str]) -> list[Function]:
    """Those that may be called, their schemas enforceable."""
    functions = []
    for index, tool in enumerate(body.tools or ()):
        function = tool.function
        if body.forced_name is not None and function.name != body.forced_name:
            continue
        path = f"tools[{index}].function.parameters"
        schema = function.parameters
        if schema is None or schema is True:
            schema = {"type": "object", "additionalProperties": False} if schema is None else {"type": "object"}
        if isinstance(schema, dict):
            schema = {"type": "object", **{key: value for key, value in schema.items() if key != "$schema"}}
        if schema is False or schema["type"] != "object":
            raise bad_request(f"Invalid value for '{path}': arguments are an object.", path)
        constraint = Constraint(lambda schema=schema: grammars.json_schema(schema), path, schema)  # type: ignore[misc]
        try:
            await _checked(service, constraint)
        except ApiError:
            if function.strict:
                raise
            relaxed.append(path)
            schema = {"type": "object"}
        functions.append(Function(function.name, grammars.inner_schema(schema)))
    return functions


async def _checked(service: Service, constraint: Constraint) -> str:
    grammar = constraint.grammar()
    if error := await service.grammars.check(grammar):
        raise constraint.refusal(error)
    return grammar
