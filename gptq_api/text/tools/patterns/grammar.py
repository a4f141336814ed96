"""Grammars of answers whose calls are written by a pattern, in llguidance's kind of Lark.

Its lexer takes the longest lexeme that goes on, so white space that may stand before a call is part of the call's first
lexeme, and free text excludes what begins a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptq_api.text.tokens import Tokens
from gptq_api.text.tools.patterns.spelling import MAX_CALLS, Spelling, control_name, escaped, items, rule

Embed = Callable[[Any], str]
"""JSON schema -> what a Lark rule calls it by"""

_ANY = "(?s:.*)"
_BLANK = r"[ \n]{0,4}"


@dataclass(slots=True, frozen=True)
class Demand:
    """What the request asks of an answer."""

    functions: Mapping[str, Any]
    """schemas of the arguments by name"""
    must_call: bool = False
    many: bool = True
    """whether several calls may be in one answer"""
    answer: Any = None
    """the schema that an answer without calls has to follow; None: any text"""


def write(spelling: Spelling, tokenizer: Tokens, demand: Demand, embed: Embed) -> str:
    """The grammar of one answer."""
    return _Writer(spelling, tokenizer, demand, embed).text()


class _Writer:
    def __init__(self, spelling: Spelling, tokenizer: Tokens, demand: Demand, embed: Embed) -> None:
        self._spelling, self._tokenizer, self._demand, self._embed = spelling, tokenizer, demand, embed
        self._rules: list[str] = ["%llguidance {}"]

    def text(self) -> str:
        body = " | ".join(self._bodies())
        return "\n".join([*self._rules[:1], f"start: {body}", *self._rules[1:]]) + "\n"

    def _bodies(self) -> list[str]:
        """What an answer may be."""
        demand = self._demand
        calls = self._calls()
        if demand.must_call:
            return self._forced(calls)
        if demand.answer is not None:
            return [*self._forced(calls), self._embed(demand.answer)]
        return [*self._texts(), *self._behind_text(calls)]

    def _forced(self, calls: str) -> list[str]:
        """Calls and nothing before them."""
        spelling = self._spelling
        if not spelling.trigger:
            also = [f"/{_BLANK}/ {control_name(spelling.also)} {calls}"] if self._is_control(spelling.also) else []
            return [calls, *also]
        if spelling.prompted:
            return [calls]
        return [f"{_behind_blank(rule(items(spelling.trigger, self._tokenizer)))} {calls}"]

    def _texts(self) -> list[str]:
        """Free text up to the end."""
        self._rules.append(f"TEXT: /{self._lead()}{_ANY}/{self._excluded()}")
        return ["TEXT"]

    def _behind_text(self, calls: str) -> list[str]:
        """Calls, with or without text before them."""
        spelling = self._spelling
        found = []
        if self._is_control(spelling.also):
            found.append(f"TEXT {control_name(spelling.also)} {calls}")
        if not spelling.trigger or spelling.prompted:
            found.append(calls)
        if spelling.trigger:
            trigger = items(spelling.trigger, self._tokenizer)
            if trigger[0][0] == "control":
                found.append(f"TEXT {rule(trigger)} {calls}")
            else:
                self._rules.append(f"TOLD: /{self._lead()}{_ANY}{escaped(spelling.trigger)}/{self._excluded()}")
                self._rules.append("told[lazy]: TOLD")
                found.append(f"told {calls}")
        return found

    def _lead(self) -> str:
        return escaped(self._spelling.lead.removeprefix(self._spelling.prompted))

    def _excluded(self) -> str:
        """What free text may not begin with: a call, where only the first words can be one."""
        if self._spelling.trigger:
            return ""
        head = items(self._spelling.begins_with())
        name = next(i for i, (kind, _) in enumerate(head) if kind == "name")
        names = "(?:" + "|".join(map(escaped, self._demand.functions)) + ")"
        regex = rule(head[:name]).strip("/") + names + escaped(head[name + 1][1])
        return f" & ~/[ \\n]*{regex}{_ANY}/"

    def _calls(self) -> str:
        """Calls, behind what triggers them; the name of the rule."""
        spelling, demand = self._spelling, self._demand
        opening, between = items(spelling.opening, self._tokenizer), items(spelling.between, self._tokenizer)
        call = items(spelling.call, self._tokenizer)
        first = [*opening, *call]
        if spelling.trigger:
            trigger = items(spelling.trigger, self._tokenizer)
            assert first[: len(trigger)] == trigger, "calls begin with their trigger"
            first = first[len(trigger) :]
        firsts, nexts = [], []
        for number, (name, schema) in enumerate(demand.functions.items()):
            arguments = f"arguments_{number}"
            body = self._keywords(number, schema) if spelling.keywords else self._embed(schema)
            self._rules.append(f"{arguments}: {body}")
            written = rule(first, name, arguments)
            self._rules.append(f"first_{number}: {written if spelling.trigger else _behind_blank(written)}")
            firsts.append(f"first_{number}")
            if demand.many:
                self._rules.append(f"next_{number}: {rule([*between, *call], name, arguments)}")
                nexts.append(f"next_{number}")
        more = f" ({' | '.join(nexts)}){{0,{MAX_CALLS - 1}}}" if demand.many else ""
        closing = rule(items(spelling.closing, self._tokenizer))
        after = f" {control_name(spelling.also_closing)}?" if self._is_control(spelling.also_closing) else ""
        self._rules.append(f"calls: ({' | '.join(firsts)}){more} {closing}{after}".rstrip())
        return "calls"

    def _is_control(self, name: str) -> bool:
        return bool(name) and self._tokenizer.token_to_id(name) in self._tokenizer.special_token_ids

    def _keywords(self, number: int, schema: Any) -> str:
        """Python's keyword arguments: the properties in the order of the schema, those that are not required left out
        or not, values spelled as JSON; an object behind ** where a schema says more than properties."""
        properties = plain_properties(schema)
        if properties is None:
            return f'"**" {self._embed(schema)} ")"'
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required") or []
        count = len(properties)
        for place, (name, value) in enumerate(properties.items()):
            said = self._embed({**value, **shared} if isinstance(value, dict) else value)
            later = f"more_{number}_{place + 1}"
            skipped, none = ("", "") if name in required else (f" | {later}", f" | none_{number}_{place + 1}")
            self._rules.append(f"none_{number}_{place}: /{escaped(name)}=/ {said} {later}{none}")
            self._rules.append(f"more_{number}_{place}: /,[ ]?{escaped(name)}=/ {said} {later}{skipped}")
        self._rules.append(f'none_{number}_{count}: ")"')
        self._rules.append(f'more_{number}_{count}: ")"')
        return f"none_{number}_0"


def plain_properties(schema: Any) -> dict[str, Any] | None:
    """The properties of an object that is described by them alone and whose names could be a program's."""
    if not isinstance(schema, dict):
        return None
    properties = schema.get("properties")
    known = {"type", "properties", "required", "additionalProperties", "description", "title", "$defs", "definitions"}
    if not isinstance(properties, dict) or schema.keys() - known or schema.get("type", "object") != "object":
        return {} if schema.keys() <= {"type"} and schema.get("type") == "object" and properties is None else None
    required = schema.get("required") or []
    if not all(name.isidentifier() for name in properties) or not set(required) <= properties.keys():
        return None
    return properties


def _behind_blank(written: str) -> str:
    """A rule that begins with a regex, with white space before it in the same lexeme."""
    return f"/{_BLANK}{written[1:]}" if written.startswith("/") else f"/{_BLANK}/ {written}"
