"""`response_format` and `structured_outputs`: what an answer has to look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

from gptq_api.api.errors import ApiError, bad_request
from gptq_api.api.requests.fields import Body, Name, SamplingFields, check_text
from gptq_api.grammar import compile as grammars

MAX_KEYS = 1024
"""of the outermost object of a schema"""


def _schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise ValueError("it must be a JSON schema, which is an object")
    return value


Schema = Annotated[
    Any,
    PlainValidator(_schema),
    WithJsonSchema({"anyOf": [{"type": "object", "maxProperties": MAX_KEYS}, {"type": "boolean"}]}),
]
GrammarText = Annotated[str, Field(min_length=1, max_length=grammars.MAX_GRAMMAR_BYTES), AfterValidator(check_text)]
ChoiceText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_text)]


class JsonSchemaFormat(Body):
    name: Name | None = None
    """Accepted, without effect."""
    description: Annotated[str, Field(max_length=2**16), AfterValidator(check_text)] | None = None
    """Accepted, without effect."""
    strict: bool | None = None
    """Accepted, without effect: the schema always holds."""
    definition: Schema = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """Exactly one of these."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: Annotated[list[ChoiceText], Len(1, 1024)] | None = None
    grammar: GrammarText | None = None
    """In llguidance's Lark syntax, or in GBNF."""


class ConstrainedFields(SamplingFields):
    """`SamplingFields`, and what the answer has to look like."""

    response_format: ResponseFormat | None = None
    """json_object: any JSON object; json_schema: a document that is valid under the schema."""
    structured_outputs: StructuredOutputs | None = None

    def unknown(self, *, strict: bool) -> list[str]:
        found = super().unknown(strict=strict)
        shape, structured = self.response_format, self.structured_outputs
        if shape is not None:
            found += (f"response_format.{name}" for name in shape.unknown(strict=strict))
            if shape.json_schema is not None:
                inner = shape.json_schema.unknown(strict=strict)
                found += (f"response_format.json_schema.{name}" for name in inner)
        if structured is not None:
            found += (f"structured_outputs.{name}" for name in structured.unknown(strict=strict))
        return found

    @property
    def is_constrained(self) -> bool:
        """Whether either field asks for something."""
        shape = self.response_format
        return (shape is not None and shape.type != "text") or self.structured_outputs is not None

    def constraint(self) -> Constraint | None:
        """What the two fields ask for together. Raises ApiError 400 where they contradict each other."""
        found, shape = list[Constraint](), self.response_format
        if shape is not None and shape.type == "json_object":
            found.append(Constraint(grammars.json_object, "response_format", {"type": "object"}))
        elif shape is not None and shape.type == "json_schema":
            if shape.json_schema is None:
                raise bad_request(
                    "'response_format' of type \"json_schema\" needs 'json_schema'.", "response_format.json_schema"
                )
            schema = shape.json_schema.definition
            param = "response_format.json_schema.schema"
            found.append(Constraint(lambda: grammars.json_schema(schema), param, schema))
        if self.structured_outputs is not None:
            found += _structured(self.structured_outputs)
            if len(found) != 1:
                raise bad_request(
                    "Give exactly one of 'json', 'regex', 'choice' and 'grammar' in 'structured_outputs', and no "
                    "'response_format' beside it.",
                    "structured_outputs",
                )
        if found and self.ignore_eos:
            raise bad_request(
                f"'ignore_eos' and '{found[0].param}' exclude each other: a text that is complete ends.", "ignore_eos"
            )
        return found[0] if found else None


def _structured(asked: StructuredOutputs) -> list[Constraint]:
    schema, regex, choice, grammar = asked.json_schema, asked.regex, asked.choice, asked.grammar
    found = []
    if schema is not None:
        found.append(Constraint(lambda: grammars.json_schema(schema), "structured_outputs.json", schema))
    if regex is not None:
        found.append(Constraint(lambda: grammars.regex(regex), "structured_outputs.regex"))
    if choice is not None:
        found.append(Constraint(lambda: grammars.choice(choice), "structured_outputs.choice"))
    if grammar is not None:
        found.append(Constraint(lambda: grammars.lark(grammar), "structured_outputs.grammar"))
    return found


class Constraint:
    """A grammar that a field asks for."""

    def __init__(self, write: Callable[[], str], param: str, schema: Any = None) -> None:
        """`schema`: where it is one, to find the place of what is wrong."""
        self._write, self.param, self.schema = write, param, schema

    def grammar(self) -> str:
        """Raises ApiError 400."""
        try:
            return self._write()
        except grammars.GrammarError as error:
            raise self.refusal(str(error)) from None

    def refusal(self, error: str) -> ApiError:
        """`error`: the compiler's words."""
        why = error if self.schema is None else grammars.where_refused(self.schema, error)
        return bad_request(
            f"Invalid value for '{self.param}': {' '.join(why.split())[:500]}.", self.param, "unsupported_grammar"
        )
