"""JSON schemas of the kinds that JSON-Schema-Test-Suite and JSONSchemaBench hold, made by a seed, each with a maker of
documents that are valid under it; and schemas that cannot be enforced, each with the word that a refusal must name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator
from jsonschema.validators import extend

Make = Callable[[Random], Any]
Made = tuple[dict[str, Any], Make]
NAMES = ("id", "name", "size", "kind", "tags", "unit", "owner", "a b", "ünit", "x-rate", "$key", "0")
WORDS = (
    "red",
    "green",
    "blue",
    "",
    "two words",
    'a "quote"',
    "back\\slash",
    "line\nbreak",
    "Zürich",
    "日本",
    "null",
    "1",
)
PATTERNS: tuple[tuple[str, Make], ...] = (
    (r"^[a-z]{2,5}$", lambda r: "".join(r.choices("abcxyz", k=r.randint(2, 5)))),
    (r"^(red|green)-\d{1,3}$", lambda r: f"{r.choice(['red', 'green'])}-{r.randint(0, 999)}"),
    (r"^[A-Z]\d+$", lambda r: f"Q{r.randint(0, 99)}"),
    (r"^#[0-9a-f]{6}$", lambda r: f"#{r.randrange(16**6):06x}"),
    (r"^\+?\d{3}-\d{4}$", lambda r: f"{r.randint(100, 999)}-{r.randint(1000, 9999)}"),
    (r"^v\d+\.\d+(\.\d+)?$", lambda r: f"v{r.randint(0, 20)}.{r.randint(0, 9)}"),
    (r"a.c", lambda r: r.choice(["abc", "xa-cx"])),
    (r"^\S+ \S+$", lambda r: "two words"),
)
FORMATS: dict[str, tuple[str, str]] = {
    "date": ("2026-11-28", r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"),
    "time": (
        "12:30:59Z",
        r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)",
    ),
    "date-time": (
        "2026-11-28T12:30:59+01:00",
        r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[tT]([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?"
        r"([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)",
    ),
    "duration": ("P1DT2H", r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?"),
    "email": ("someone@example.org", r"[^@\s]+@[^@\s]+"),
    "hostname": ("db-1.example.org", r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.|$))+(?<!\.)"),
    "ipv4": ("192.0.2.7", r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}"),
    "ipv6": ("2001:db8:0:0:0:0:0:1", r"[0-9a-fA-F:]{2,39}"),
    "uuid": ("01234567-89ab-cdef-0123-456789abcdef", r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
    "uri": ("https://example.org/a?b=c#d", r"[A-Za-z][A-Za-z0-9+.-]*:\S*"),
}
"""name -> an example, and what every string of it matches"""


def _formats() -> FormatChecker:
    checker = FormatChecker(formats=())
    for name, (_, pattern) in FORMATS.items():
        whole = re.compile(pattern)
        checker.checks(name)(lambda value, whole=whole: not isinstance(value, str) or bool(whole.fullmatch(value)))
    return checker


def _is_integer(_: Any, value: Any) -> bool:
    if isinstance(value, Decimal):
        return value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)


EXACT = extend(Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer))
"""Draft 2020-12 over documents whose numbers are Decimal: what JSON says, without binary rounding"""


def validator(schema: dict[str, Any]) -> Validator:
    """jsonschema's, with the formats above."""
    EXACT.check_schema(schema)
    return EXACT(_exact(schema), format_checker=_formats())


def _exact(value: Any) -> Any:
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    return [_exact(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Case:
    name: str
    schema: dict[str, Any]
    make: Make
    """documents that are valid, their properties in the schema's order"""


@dataclass(frozen=True)
class Refusal:
    name: str
    schema: dict[str, Any]
    word: str
    """what the refusal must name"""


# --- values


def null(_: Random) -> Made:
    return {"type": "null"}, lambda r: None


def boolean(_: Random) -> Made:
    return {"type": "boolean"}, lambda r: r.random() < 0.5


def integer(random: Random) -> Made:
    low = random.choice([-1000, -10, -1, 0, 1, 7, 99])
    high = low + random.choice([0, 1, 9, 100, 5000])
    kind = random.randrange(5)
    if kind == 0:
        return {"type": "integer"}, lambda r: r.randint(-(10**9), 10**9)
    if kind == 1:
        return {"type": "integer", "minimum": low}, lambda r: r.randint(low, low + 1000)
    if kind == 2:
        return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}, (
            lambda r: r.randint(low, high)
        )
    if kind == 3:
        step = random.choice([2, 3, 5, 10])
        return {"type": "integer", "multipleOf": step}, lambda r: step * r.randint(0, 100)
    return {"type": "integer", "minimum": low, "maximum": high}, lambda r: r.randint(low, high)


def number(random: Random) -> Made:
    low = random.choice([-2.5, -1.0, 0.0, 0.5, 3.25])
    high = low + random.choice([0.5, 1.0, 10.0, 99.75])
    kind = random.randrange(4)
    if kind == 0:
        return {"type": "number"}, lambda r: r.choice([r.randint(-99, 99), 0.5, -12.25, 1e-7, 2.5e20])
    if kind == 1:
        return {"type": "number", "minimum": low, "maximum": high}, lambda r: r.choice([low, high])
    if kind == 2:
        return {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}, lambda r: low + 0.25
    step = random.choice([0.01, 0.5, 0.25])
    return {"type": "number", "multipleOf": step}, lambda r: float(Decimal(str(step)) * odd(r))


def odd(random: Random) -> int:
    """Its multiples have as many decimals as the step: llguidance takes 3.50 for a multiple of 0.25, and 3.5 not."""
    return 20 * random.randint(0, 9) + random.choice([1, 3, 7, 9])


def string(random: Random) -> Made:
    kind = random.randrange(3)
    if kind == 0:
        return {"type": "string"}, lambda r: r.choice(WORDS)
    if kind == 1:
        low = random.randint(0, 4)
        high = low + random.randint(0, 8)
        alphabet = 'abc é日"\\'
        return {"type": "string", "minLength": low, "maxLength": high}, (
            lambda r: "".join(r.choices(alphabet, k=r.randint(low, high)))
        )
    return {"type": "string", "maxLength": 12}, lambda r: r.choice(WORDS)[:12]


def pattern(random: Random) -> Made:
    text, make = random.choice(PATTERNS)
    return {"type": "string", "pattern": text}, make


def formatted(random: Random) -> Made:
    name = random.choice(sorted(FORMATS))
    return {"type": "string", "format": name}, lambda r: FORMATS[name][0]


def enum(random: Random) -> Made:
    values: list[Any] = random.sample([*WORDS, 1, -3, 2.5, True, False, None, [1, "a"], {"k": "v"}, []], 4)
    return {"enum": values}, lambda r: r.choice(values)


def const(random: Random) -> Made:
    value: Any = random.choice([*WORDS, 0, -7, 1.5, True, None, [], {"a": [1, {"b": None}]}, {"kind": "x", "n": 1}])
    return {"const": value}, lambda r: value


SCALARS = (null, boolean, integer, number, string, pattern, formatted, enum, const)


# --- containers


def array(random: Random, depth: int = 1) -> Made:
    low = random.randint(0, 2)
    high = low + random.randint(0, 3)
    item, make = value(random, depth - 1)
    schema: dict[str, Any] = {"type": "array", "items": item}
    if random.random() < 0.5:
        schema["minItems"] = low
    if random.random() < 0.7:
        schema["maxItems"] = high
    return schema, lambda r: [make(r) for _ in range(r.randint(low, high))]


def pair(random: Random, depth: int = 1) -> Made:
    """A tuple: one schema for each place."""
    made = [value(random, depth - 1) for _ in range(random.randint(1, 3))]
    schema: dict[str, Any] = {"type": "array", "prefixItems": [s for s, _ in made], "minItems": len(made)}
    schema["items"] = False
    return schema, lambda r: [make(r) for _, make in made]


def record(random: Random, depth: int = 2) -> Made:
    """An object with named properties, some of them required, and more or none beside them."""
    names = random.sample(NAMES, random.randint(1, 4))
    made = {name: value(random, depth - 1) for name in names}
    required = [name for name in names if random.random() < 0.6]
    schema: dict[str, Any] = {"type": "object", "properties": {name: s for name, (s, _) in made.items()}}
    if required:
        schema["required"] = required
    rest = random.randrange(3)
    if rest == 0:
        schema["additionalProperties"] = False
    elif rest == 1:
        schema["additionalProperties"] = {"type": "integer"}

    def make(r: Random) -> Any:
        document = {name: m(r) for name, (_, m) in made.items() if name in required or r.random() < 0.5}
        if rest == 1 and r.random() < 0.3:
            document["more"] = r.randint(0, 9)
        return document

    return schema, make


def table(random: Random, depth: int = 1) -> Made:
    """An object of any names with values of one kind, possibly with bounds on their number or a pattern for names."""
    item, make = value(random, depth - 1)
    kind = random.randrange(3)
    if kind == 0:
        return {"type": "object", "additionalProperties": item}, (
            lambda r: {name: make(r) for name in r.sample(NAMES, r.randint(0, 3))}
        )
    if kind == 1:
        return {"type": "object", "patternProperties": {"^x_[a-z]+$": item}, "additionalProperties": False}, (
            lambda r: {f"x_{letter}": make(r) for letter in r.sample("abcd", r.randint(0, 3))}
        )
    return {"type": "object", "additionalProperties": item, "maxProperties": 2}, (
        lambda r: {name: make(r) for name in r.sample(NAMES, r.randint(0, 2))}
    )


NESTED: tuple[Callable[..., Made], ...] = (array, pair, record, table)


def value(random: Random, depth: int) -> Made:
    if depth <= 0 or random.random() < 0.5:
        return random.choice(SCALARS)(random)
    return random.choice(NESTED)(random, depth)


# --- combinations


def nullable(random: Random) -> Made:
    kind = random.choice(["string", "integer", "boolean"])
    example = {"string": "x", "integer": 3, "boolean": True}[kind]
    return {"type": [kind, "null"]}, lambda r: r.choice([None, example])


def any_of(random: Random) -> Made:
    made = [value(random, 1) for _ in range(random.randint(2, 3))]
    return {"anyOf": [s for s, _ in made]}, lambda r: r.choice(made)[1](r)


def one_of(random: Random) -> Made:
    """Told apart by type, or by a property that is constant."""
    if random.random() < 0.5:
        made = [integer(random), string(random), boolean(random)][: random.randint(2, 3)]
        return {"oneOf": [s for s, _ in made]}, lambda r: r.choice(made)[1](r)
    kinds = random.sample(["circle", "square", "line"], 2)
    sides = [value(random, 1) for _ in kinds]
    options = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": side},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind, (side, _) in zip(kinds, sides, strict=True)
    ]

    def make(r: Random) -> Any:
        i = r.randrange(2)
        return {"kind": kinds[i], "value": sides[i][1](r)}

    return {"oneOf": options}, make


def all_of(random: Random) -> Made:
    if random.random() < 0.4:
        low, high = random.randint(-5, 5), random.randint(6, 40)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]}, lambda r: r.randint(low, high)
    names = random.sample(NAMES, 3)
    made = [value(random, 0) for _ in names]
    parts = [
        {"type": "object", "properties": {name: s}, "required": [name]}
        for name, (s, _) in zip(names, made, strict=True)
    ]
    return {"allOf": parts}, lambda r: {name: make(r) for name, (_, make) in zip(names, made, strict=True)}


def reference(random: Random) -> Made:
    place = random.choice(["$defs", "definitions"])
    inner, make = record(random, 1)
    there = {"$ref": f"#/{place}/thing"}
    schema = {
        "type": "object",
        "properties": {"first": there, "rest": {"type": "array", "items": there}},
        "required": ["first"],
        place: {"thing": inner},
    }
    return schema, lambda r: {"first": make(r), "rest": [make(r) for _ in range(r.randint(0, 2))]}


def recursive(random: Random) -> Made:
    item, make = random.choice(SCALARS)(random)
    if random.random() < 0.5:
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"value": item, "children": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["value", "children"],
            "additionalProperties": False,
        }

        def tree(r: Random, depth: int = 2) -> Any:
            return {"value": make(r), "children": [tree(r, depth - 1) for _ in range(r.randint(0, depth))]}

        return schema, tree
    node = {
        "type": "object",
        "properties": {"head": item, "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}},
        "required": ["head", "tail"],
        "additionalProperties": False,
    }

    def chain(r: Random, depth: int = 3) -> Any:
        return {"head": make(r), "tail": chain(r, depth - 1) if depth and r.random() < 0.5 else None}

    return {"$ref": "#/$defs/list", "$defs": {"list": node}}, chain


def annotated(random: Random) -> Made:
    """With everything that says something and demands nothing, as pydantic and zod write it."""
    schema, make = record(random, 2)
    for name, inner in schema["properties"].items():
        inner["title"] = str(name).title()
        inner["description"] = "Which one it is."
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/thing",
        "$comment": "none",
        "title": "Thing",
        "description": "A thing.",
        "examples": [{}],
        "default": {},
        **schema,
    }, make


def tool(random: Random) -> Made:
    """The parameters of a function, as agents send them."""
    names = random.sample(["path", "query", "limit", "mode", "recursive", "env"], 4)
    made = {
        "path": string(random),
        "query": pattern(random),
        "limit": integer(random),
        "mode": ({"type": "string", "enum": ["read", "write"]}, lambda r: r.choice(["read", "write"])),
        "recursive": boolean(random),
        "env": table(random, 1),
    }
    schema = {
        "type": "object",
        "properties": {name: {**made[name][0], "description": f"The {name}."} for name in names},
        "required": names[:2],
        "additionalProperties": False,
    }
    return schema, lambda r: {name: made[name][1](r) for i, name in enumerate(names) if i < 2 or r.random() < 0.5}


KINDS: tuple[Callable[..., Made], ...] = (
    *SCALARS,
    *NESTED,
    nullable,
    any_of,
    one_of,
    all_of,
    reference,
    recursive,
    annotated,
    tool,
)


def cases(count: int, seed: int = 14) -> Iterator[Case]:
    """Schemas that can be enforced, all kinds in turn."""
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        schema, make = kind(Random(seed * 10_000 + i))
        yield Case(f"{kind.__name__}-{i}", schema, make)


# --- what cannot be enforced

UNSUPPORTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    ("contains", {"type": "array", "contains": {"const": 1}}),
    ("minContains", {"type": "array", "minContains": 2}),
    ("maxContains", {"type": "array", "maxContains": 2}),
    ("unevaluatedItems", {"type": "array", "unevaluatedItems": False}),
    ("not", {"not": {"type": "integer"}}),
    ("if", {"if": {"type": "string"}}),
    ("then", {"then": {"minLength": 3}, "type": "string"}),
    ("else", {"else": {"type": "integer"}, "type": "integer"}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}),
    ("unevaluatedProperties", {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}),
    ("format", {"type": "string", "format": "idn-email"}),
    ("format", {"type": "string", "format": "json-pointer"}),
    ("pattern", {"type": "string", "pattern": "^(?=a)b$"}),
    ("pattern", {"type": "string", "pattern": "(a)\\1"}),
    ("oneOf", {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]}),
    ("$ref", {"$ref": "https://example.org/other.json"}),
    ("$ref", {"$ref": "#/$defs/missing"}),
    ("type", {"type": "decimal"}),
)
"""keyword that is not supported, or not like this -> a schema with it"""


def _inside(place: int, schema: dict[str, Any]) -> dict[str, Any]:
    if place == 1:
        return {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    if place == 2:
        return {"type": "array", "items": schema}
    if place == 3:
        return {"anyOf": [{"type": "null"}, schema]}
    return schema


def refusals(count: int) -> Iterator[Refusal]:
    """Schemas with one thing that cannot be enforced, at the top and further in."""
    for i in range(count):
        word, schema = UNSUPPORTED[i % len(UNSUPPORTED)]
        place = i // len(UNSUPPORTED) % 4
        yield Refusal(f"{word}-{i}", _inside(place, schema), word)


# --- documents that may be wrong


def spoiled(document: Any, random: Random) -> Any:
    """The document with one place changed; whether it is still valid, a validator knows."""
    if isinstance(document, dict) and document and random.random() < 0.7:
        name = random.choice(list(document))
        if random.random() < 0.3:
            return {key: item for key, item in document.items() if key != name}
        return {key: spoiled(item, random) if key == name else item for key, item in document.items()}
    if isinstance(document, list) and document and random.random() < 0.7:
        at = random.randrange(len(document))
        return [spoiled(item, random) if i == at else item for i, item in enumerate(document)]
    others: list[Any] = [None, True, -1, 10**12, 0.125, "", "?", "x" * 40, [], [1, 2, 3, 4, 5, 6], {}, {"other": "x"}]
    return random.choice(others)
