"""How families of models write calls that are no JSON objects of name and arguments (`tools/layouts.py` has those that
are): a pattern that is both turned into a grammar and read by.

In a pattern %n is the name of a function, %a its arguments, and a space stands for white space that may be there. A
name of a control token in it is that token where the vocabulary has one, and text where it has not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptq_api.text.tokens import Tokens

Item = tuple[Literal["text", "control", "space", "name", "arguments"], str]
"""one element of a pattern; the text of a text or a control token"""
SPACE = r"(?:[ ]|\n[ ]{0,16})?"
"""white space that may be there, bounded, since a model that is not sure goes on with it for ever"""
MAX_CALLS = 32
"""of one answer"""


@dataclass(slots=True, frozen=True)
class Spelling:
    """The calls of an answer: `opening`, calls with `between` among them, `closing`."""

    call: str
    opening: str = ""
    between: str = ""
    closing: str = ""
    trigger: str = ""
    """with this text, anywhere in an answer, calls begin; "": only an answer's first words can begin one"""
    also: str = ""
    """a control token that may stand before the calls, anywhere in an answer"""
    also_closing: str = ""
    """a control token that may stand behind them"""
    keywords: bool = False
    """arguments are written as Python's keyword arguments, and not as a JSON object"""
    lead: str = ""
    """what text that calls nothing begins with"""
    prompted: str = ""
    """the beginning of every answer, which stands in the prompt already"""

    def begins_with(self) -> str:
        return self.opening + self.call


PYTHONIC = Spelling(
    "%n(%a",
    opening="[ ",
    between=" , ",
    closing=" ]",
    also="<|python_start|>",
    also_closing="<|python_end|>",
    keywords=True,
)
"""LLaMA 3.2's small models and LLaMA 4"""
FUNCTIONARY_3_1 = Spelling("<function=%n>%a</function>", between=" ", trigger="<function=")
FUNCTIONARY_3_2 = Spelling(">>>%n\n%a", between=" ", trigger=">>>", lead=">>>all\n", prompted=">>>")


def control_name(content: str) -> str:
    """What a control token is called in grammars: <...>, whatever its name is."""
    if re.fullmatch(r"<[^<>\[\]\s]+>", content):
        return content
    return "<|" + re.sub(r"[^\w.:-]", "_", content.strip("[]<>| ")) + "|>"


def items(pattern: str, tokenizer: Tokens | None = None) -> list[Item]:
    """Without a tokenizer everything is text, as it is to whoever reads an answer."""
    found: list[Item] = []
    for part in re.split(r"(%n|%a| )", pattern):
        if part == " ":
            found.append(("space", ""))
        elif part in ("%n", "%a"):
            found.append(("name" if part == "%n" else "arguments", ""))
        elif part and tokenizer is not None:
            for piece in tokenizer.split_special(part):
                known = isinstance(piece, int)
                found.append(("control", tokenizer.id_to_token(piece)) if known else ("text", str(piece)))  # type: ignore[arg-type]
        elif part:
            found.append(("text", part))
    return found


def controls(spelling: Spelling, tokenizer: Tokens) -> frozenset[int]:
    """Ids of the control tokens that have to stand in the text that is read."""
    patterns = (spelling.opening, spelling.call, spelling.between, spelling.closing, spelling.also, spelling.trigger)
    parts = [part for pattern in patterns for part in tokenizer.split_special(pattern.replace(" ", ""))]
    return frozenset(part for part in parts if isinstance(part, int))


def rule(found: Sequence[Item], name: str = "", arguments: str = "") -> str:
    """The right side of a Lark rule. `name`: of the function; `arguments`: what they look like."""
    parts: list[str] = []
    regex = ""
    for kind, text in found:
        if kind in ("text", "space", "name"):
            regex += SPACE if kind == "space" else escaped(text if kind == "text" else name)
            continue
        if regex:
            parts.append(f"/{regex}/")
        regex = ""
        parts.append(control_name(text) if kind == "control" else arguments)
    return " ".join([*parts, f"/{regex}/"] if regex else parts)


def escaped(text: str) -> str:
    """A text as Rust's regexes have it, between slashes."""
    plain = re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)
    return plain.replace("\n", "\\n").replace(" ", "[ ]")
