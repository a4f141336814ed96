"""How models of each family write tool calls, and which family a chat template is of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gptq_api.text.tools.patterns.spelling import FUNCTIONARY_3_1, FUNCTIONARY_3_2, PYTHONIC, Spelling


@dataclass(frozen=True, slots=True)
class CallLayout:
    """The text of an answer's calls: `begin`, `opening`, the calls with `between` between them, `closing`. A call is a
    JSON object of a name and, under `key`, the arguments."""

    name: str
    begin: str
    """what no other text holds; "": an answer that begins with a call is calls"""
    opening: str
    key: str
    between: str
    closing: str
    told_by_template: bool = True
    """whether the chat template tells the model about tools and shows it past calls; otherwise history.py does"""
    id_length: int = 24
    """characters of a call's id"""
    id_prefix: str = "call_"
    pattern: Spelling | None = None
    """how calls are written that are no such objects; all above but `told_by_template` means nothing then"""

    @property
    def head(self) -> str:
        """Of a call, up to its name."""
        return '{"name": "'

    @property
    def middle(self) -> str:
        """Between the name and the arguments."""
        return f'", "{self.key}": '


HERMES = CallLayout(
    "Hermes and Qwen", "<tool_call>", "\n", "arguments", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
)
LLAMA_3 = CallLayout("LLaMA 3", "", "", "parameters", "; ", "")
# Mistral's templates raise for ids of another length.
MISTRAL = CallLayout("Mistral", "[TOOL_CALLS]", "[", "arguments", ", ", "]", id_length=9, id_prefix="")
GENERIC = CallLayout(
    "generic",
    "<tool_call>",
    "\n",
    "arguments",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
    told_by_template=False,
)


_PATTERNS = (
    (FUNCTIONARY_3_2, ">>>all"),
    (FUNCTIONARY_3_1, "<function="),
    (PYTHONIC, "<|python_start|>"),
    (PYTHONIC, "func_name1("),
)
"""and what a template of that kind holds"""


def layout_of(jinja: str, variables: Collection[str]) -> CallLayout:
    """By what a chat template writes; `variables`: those that it reads. Templates that know nothing of tools, and those
    that write in no way known here, get the generic layout, about which we tell the model ourselves."""
    if "tools" not in variables:
        return GENERIC
    if "<function=" in jinja and "<parameter=" in jinja:  # arguments in tags of their own
        return GENERIC
    for pattern, mark in _PATTERNS:
        if mark in jinja:
            return CallLayout("by a pattern", "", "", "", "", "", pattern=pattern)
    for layout, mark in ((MISTRAL, "[TOOL_CALLS]"), (HERMES, "<tool_call>"), (LLAMA_3, '"parameters"')):
        if mark in jinja:
            return layout
    return GENERIC
