"""Which families write calls how, and which of them a checkpoint belongs to, by its chat template and vocabulary."""

from __future__ import annotations

from gptq_api.text.tokenizer import Tokenizer
from gptq_api.text.tool_formats.spelling import Spelling

_NAME_ARGUMENTS = '{ "name" : "%n" , "arguments" : %a }'

FAMILIES: dict[str, Spelling] = {
    "llama-3": Spelling('{ "name" : "%n" , "parameters" : %a }', between=" ; ", also="<|python_tag|>"),
    "pythonic": Spelling(
        "%n(%a",
        opening="[ ",
        between=" , ",
        closing=" ]",
        also="<|python_start|>",
        also_closing="<|python_end|>",
        keywords=True,
    ),
    "hermes": Spelling(f"<tool_call> {_NAME_ARGUMENTS} </tool_call>", between=" ", trigger="<tool_call>"),
    "mistral": Spelling(
        _NAME_ARGUMENTS, opening="[TOOL_CALLS] [ ", between=" , ", closing=" ]", trigger="[TOOL_CALLS]"
    ),
    "mistral-args": Spelling("[TOOL_CALLS]%n[ARGS] %a", between=" ", trigger="[TOOL_CALLS]"),
    "functionary-3.1": Spelling("<function=%n>%a</function>", between=" ", trigger="<function="),
    "functionary-3.2": Spelling(">>>%n\n%a", between=" ", trigger=">>>", lead=">>>all\n", prompted=">>>"),
    "firefunction": Spelling(_NAME_ARGUMENTS, opening="functools[ ", between=" , ", closing=" ]", trigger="functools["),
    "generic": Spelling(
        _NAME_ARGUMENTS,
        opening='{ "tool_calls" : [ ',
        between=" , ",
        closing=" ] }",
        response='{ "response" : "%a" }',
    ),
}
"""`generic` is for models that were never taught a way: the prompt tells them, and the grammar sees to it"""


def family_of(template: str, reads_tools: bool, tokenizer: Tokenizer) -> str:
    """`template`: its source; `reads_tools`: whether it has a place for them."""
    if not reads_tools:
        return "generic"
    if "[TOOL_CALLS]" in template:
        return "mistral-args" if "[ARGS]" in template else "mistral"
    if ">>>all" in template:
        return "functionary-3.2"
    if "<function=" in template:
        return "generic" if "<parameter=" in template else "functionary-3.1"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_start|>" in template or "func_name1(" in template:
        return "pythonic"
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama-3"
    if "functools[" in template:
        return "firefunction"
    return "generic"
