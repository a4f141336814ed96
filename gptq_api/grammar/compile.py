"""What an answer has to look like -> llguidance's serialized grammar, which is what crosses the processes.

Nothing is compiled here: these functions write the grammar down. Whether it can be compiled, and within which limits, a
child process finds out (`grammar/checker.py`) before a request is admitted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from gptq_api.errors import UserError

WHITESPACE = r"[ ]|\n[ ]{0,16}"
"""Between the tokens of JSON: at most one space, or a line break and its indentation. Without a bound a model that is
not sure goes on with white space until its tokens are used up."""
MAX_GRAMMAR_BYTES = 256 * 2**10
MAX_DEPTH = 64
"""of a JSON schema, objects and arrays within each other"""


def limits() -> LLParserLimits:
    """How large a grammar may become, in llguidance's units: some 50 ms to build it and 10 ms for one mask at most, 40
    MB of lexer states. Its own limits are five times as high."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class GrammarError(UserError):
    """What was asked for cannot be enforced; one sentence for the client, which names keyword, path or limit."""


def json_schema(schema: Any) -> str:
    """A JSON document that is valid under `schema` (draft 2020-12; true and false are schemas too).

    Raises GrammarError for what is no schema, too large, or counts what cannot be counted; other keywords are looked at
    when it is compiled.
    """
    _bounded(json.dumps(schema))  # before anything is done with one that is far too large
    return _bounded(LLMatcher.grammar_from_json_schema(json.dumps(_checked(schema)), overrides=_options()))


def embedded(schema: Any, *, lenient: bool = False) -> str:
    """The same as a part of a Lark rule. `lenient`: keywords that are not supported have no effect, and of `oneOf` more
    than one may hold.

    Raises GrammarError.
    """
    options = {**_options(), "lenient": lenient, "coerce_one_of": lenient}
    return "%json " + json.dumps({**_checked(schema, counts=not lenient), "x-guidance": options})


def native_lark(text: str) -> str:
    """A grammar of ours, which needs no translation. Raises GrammarError where it is too large."""
    return _bounded(LLMatcher.grammar_from_lark(text))


def _options() -> Any:
    return {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}


def _checked(schema: Any, *, counts: bool = True) -> dict[str, Any]:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema must be an object or a boolean")
    if depth_of(schema) > MAX_DEPTH:
        raise GrammarError(f"the schema is nested deeper than {MAX_DEPTH} levels")
    if "x-guidance" in schema:
        raise GrammarError("'x-guidance' is not a keyword of JSON schema")
    if counts:
        _check_counts(schema)
    return schema


def _check_counts(schema: dict[str, Any]) -> None:
    """llguidance counts properties and does not see that two of those without a name in the schema are called the same,
    and whoever reads the document keeps one of them."""
    for where, sub in subschemas(schema):
        least, required = sub.get("minProperties"), sub.get("required")
        told = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int) and least > told + 1:
            why = f"more than one beyond those that 'required' names ({told}) cannot be enforced"
            raise GrammarError(f"'minProperties' {least} at {where or '/'}: {why}")


def inner_schema(schema: Any) -> dict[str, Any]:
    """A schema that has been checked, for `%json` in a Lark grammar: with our white space."""
    found = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    return {**found, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}}


def outer_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """What `inner_schema` was made of."""
    return {key: value for key, value in schema.items() if key != "x-guidance"}


def after_thoughts(schema: Any) -> str:
    """Lark of a text that ends its thoughts, which the prompt began, and goes on with a JSON document."""
    lines = ["start: thoughts GAP? document", r"thoughts[lazy]: /(?s:.*)<\/think>/", r"GAP: /\n{1,2}/"]
    return "\n".join([*lines, f"document: %json {json.dumps(inner_schema(schema))}"])


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> str:
    """A text that the pattern matches as a whole; Rust's syntax, without look-around and back-references."""
    return _bounded(LLMatcher.grammar_from_regex(pattern))


def choice(texts: Sequence[str]) -> str:
    """One of these texts."""
    return regex("|".join(f"(?:{_literal(text)})" for text in texts))


def lark(text: str) -> str:
    """A text of llguidance's kind of Lark grammar, or of a GBNF one, which is translated."""
    try:
        return _bounded(LLMatcher.grammar_from_lark(any_to_lark(text)))
    except GrammarError:
        raise
    except Exception as error:  # what the translator raises for a grammar that is none is not documented
        raise GrammarError(f"the grammar cannot be read: {str(error)[:200]}") from None


def _literal(text: str) -> str:
    """The regex of exactly this text. `re.escape` also writes backslashes before what Rust's syntax gives a meaning."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~]", r"\\\g<0>", text)


def _bounded(grammar: str) -> str:
    size = len(grammar.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it has {size} bytes, and the limit is {MAX_GRAMMAR_BYTES}")
    return grammar


def depth_of(value: Any) -> int:
    """Levels of objects and arrays, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for item in level for child in _children(item)]
    return depth


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""keywords whose values are schemas by name"""
_NOT_SCHEMAS = ("enum", "const", "default", "examples", "required")


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema with its JSON pointer (RFC 6901), outermost first."""
    stack: list[tuple[str, Any]] = [(path, schema)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, list):
            stack += [(f"{where}/{i}", item) for i, item in reversed(list(enumerate(value)))]
        if not isinstance(value, dict):
            continue
        yield where, value
        for name, item in reversed(value.items()):
            if name in _SCHEMA_MAPS and isinstance(item, dict):
                inner = [(f"{where}/{name}/{_pointer(key)}", child) for key, child in item.items()]
                stack += reversed(inner)
            elif name not in _NOT_SCHEMAS:
                stack.append((f"{where}/{name}", item))


def _pointer(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def where_refused(schema: Any, error: str) -> str:
    """Why llguidance refused a schema, as a sentence that names the keyword and its place."""
    if found := re.match(r"Unimplemented keys: (\[.*\])", error):
        keys = json.loads(found[1])
        for where, sub in subschemas(schema):
            for key in keys:
                if key in sub:
                    return f"the keyword '{key}' at {where or '/'} is not supported"
        return f"the keyword '{keys[0]}' is not supported"
    if "coerce_one_of" in error:
        where = next((where for where, sub in subschemas(schema) if "oneOf" in sub), "")
        return f"'oneOf' at {where or '/'}: more than one of its schemas may hold; 'anyOf' allows that"
    for pattern, key in (
        (r"Unknown format: (.*)", "format"),
        (r"Invalid type: (.*)", "type"),
        (r"Resource '(.*)' is not present", "$ref"),
        (r"Pointer '(.*)' does not exist", "$ref"),
    ):
        if found := re.search(pattern, error):
            for where, sub in subschemas(schema):
                if key in sub and (str(sub[key]).endswith(found[1]) or found[1].endswith(str(sub[key]))):
                    return f"'{key}' at {where or '/'}: {_short(error)}"
    if "regex" in error.lower():
        for where, sub in subschemas(schema):
            if isinstance(sub.get("pattern"), str) and _is_wrong(sub["pattern"]):
                return f"'pattern' at {where or '/'}: {_short(error)}"
    return _short(error)


def _is_wrong(pattern: str) -> bool:
    is_error, _ = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_regex(pattern), limits=limits())
    return is_error


def _short(error: str) -> str:
    return " ".join(error.split())[:300]
