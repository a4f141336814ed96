"""What an answer with tools may look like, as a Lark grammar of llguidance's kind."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptq_api.text.tools.layouts import CallLayout

_GAP = r"([ ]|\n[ ]{0,16})?"
"""models of one family differ in their white space"""


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    schema: dict[str, Any]
    """JSON schema of its arguments, an object's"""


def answer_grammar(
    layout: CallLayout,
    functions: Sequence[Function],
    *,
    forced: bool,
    many: bool,
    begin_token: int | None = None,
    text_schema: dict[str, Any] | None = None,
    thoughts: bool = False,
) -> str:
    """`forced`: there is at least one call and no text; `many`: more than one call is allowed; `begin_token`: the id of
    `layout.begin` where that is a control token; `text_schema`: what an answer without calls has to be; `thoughts`:
    the prompt ends with <think>, so that all that follows what ends the thoughts."""
    begin = _quoted(layout.begin) if begin_token is None else f"<[{begin_token}]>"
    calls = f"call ({_loose(layout.between)} call)*" if many else "call"
    body = " ".join(part for part in (_loose(layout.opening), calls, _loose(layout.closing)) if part)
    lines = []
    if forced:
        lines.append(f"answer: {begin} {body}")
    elif text_schema is not None:
        lines.append(f"answer: {begin} {body} | document")
        lines.append(f"document: %json {json.dumps(text_schema)}")
    elif begin_token is not None:
        lines.append(f"answer: TEXT? | TEXT? {begin} {body}")
        lines.append("TEXT: /(?s:.+)/")
    elif layout.begin:
        # The shortest text up to the mark is one lexeme; a text without the mark is another, which it cannot become.
        mark = _regex(layout.begin)
        lines.append(f"answer: TEXT? | until {body}")
        lines.append(f"until[lazy]: /(?s:.*){mark}/")
        lines.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){mark}(?s:.*)/")
    else:
        lines.append(f"answer: TEXT? | {body}")
        lines.append(r'TEXT: /(?s:.+)/ & ~/\{[ \n]*"name"[ \n]*:[ \n]*"(?s:.*)/')
    lines.insert(0, "start: thoughts /\\n{1,2}/? answer" if thoughts else "start: answer")
    if thoughts:
        lines.append(r"thoughts[lazy]: /(?s:.*)<\/think>/")
    lines.append(r"GAP: /[ ]|\n[ ]{0,16}/")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        # One lexeme, so that a text that begins like a call and is none can be told from it at its end.
        words = [r"\{", '"name"', ":", f'"{_regex(function.name)}"', ",", f'"{layout.key}"', ":", ""]
        lines.append(f'call_{i}: /{_GAP.join(words)}/ arguments_{i} GAP? "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(function.schema)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _loose(text: str) -> str:
    """Its line breaks may be missing, or its blanks."""
    parts = re.split(r"([ \n])", text)
    return " ".join("GAP?" if part in (" ", "\n") else _quoted(part) for part in parts if part)


def _regex(text: str) -> str:
    return re.sub(r"[\\/.+*?()|\[\]{}^$]", r"\\\g<0>", text)
