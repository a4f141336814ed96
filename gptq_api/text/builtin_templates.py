"""Prompt formats for checkpoints that carry no chat template, as LLaMA-1 files do not.

Written for this server after the formats' descriptions; the system sentences of Vicuna, Alpaca and Koala are part of
the formats the models were trained on. None begins with BOS: it is added once, by whoever encodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gptq_api.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BuiltinTemplate:
    jinja: str
    stop: tuple[str, ...] = ()
    """strings that end an answer, for formats whose turns end in text and not in a control token"""


def _turns(*, system: str, after_system: str, user: str, assistant: str, user_end: str, assistant_end: str) -> str:
    """The common shape: a system sentence, then `Name: text` and a separator per turn, and `Name:` left open.

    An assistant turn without content is an open one. There is no space after the open colon: the space belongs to the
    model's first token.
    """
    return f"""
{{%- set ns = namespace(system=none) -%}}
{{%- for message in messages if message.role == 'system' -%}}
{{%- set ns.system = message.content if ns.system is none else ns.system ~ '\\n' ~ message.content -%}}
{{%- endfor -%}}
{{{{- {system!r} if ns.system is none else ns.system -}}}}{{{{- {after_system!r} -}}}}
{{%- set ns.open = false -%}}
{{%- for message in messages if message.role != 'system' -%}}
{{%- if message.role == 'user' -%}}
{{{{- {user!r} ~ ': ' ~ message.content ~ {user_end!r} -}}}}
{{%- elif message.role != 'assistant' -%}}
{{{{- raise_exception("this model's chat format has no role '" ~ message.role ~ "'") -}}}}
{{%- elif message.content -%}}
{{{{- {assistant!r} ~ ': ' ~ message.content ~ {assistant_end!r} -}}}}
{{%- else -%}}
{{{{- {assistant!r} ~ ':' -}}}}
{{%- set ns.open = loop.last -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt and not ns.open -%}}{{{{- {assistant!r} ~ ':' -}}}}{{%- endif -%}}
"""


def _assistant(reader: str) -> str:
    return (
        f"A chat between a curious {reader} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {reader}'s questions."
    )


_ONE_SHOT = (
    "\n### Human: Why is the sky blue?"
    "\n### Assistant: Sunlight holds all colours, and the molecules of the air scatter the blue part of it "
    "much more than the red part. So blue light reaches our eyes from every direction of the sky."
)

_LLAMA_2 = """
{%- set ns = namespace(system=none, first=true) -%}
{%- for message in messages if message.role == 'system' -%}
{%- set ns.system = message.content if ns.system is none else ns.system ~ '\\n' ~ message.content -%}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' -}}
{%- if ns.first and ns.system is not none -%}{{- '<<SYS>>\\n' ~ ns.system ~ '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{{- message.content ~ ' [/INST]' -}}
{%- set ns.first = false -%}
{%- elif message.role != 'assistant' -%}
{{- raise_exception("this model's chat format has no role '" ~ message.role ~ "'") -}}
{%- elif message.content -%}
{{- ' ' ~ message.content ~ ' ' ~ eos_token -}}
{%- if not loop.last -%}{{- bos_token -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""

_LLAMA_3 = """
{%- for message in messages -%}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_CHATML = """
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _hash_turns(after_system: str) -> str:
    return _turns(
        system=_assistant("human"),
        after_system=after_system + "\n### ",
        user="Human",
        assistant="Assistant",
        user_end="\n### ",
        assistant_end="\n### ",
    )


def _with_eos(template: str) -> str:
    """`</s>` in a separator is the control token, whatever this vocabulary calls it."""
    return template.replace("'</s>'", "eos_token")


BUILTIN: dict[str, BuiltinTemplate] = {
    "vicuna_v1.1": BuiltinTemplate(
        _with_eos(
            _turns(
                system=_assistant("user"),
                after_system=" ",
                user="USER",
                assistant="ASSISTANT",
                user_end=" ",
                assistant_end="</s>",
            )
        )
    ),
    "vicuna_v0": BuiltinTemplate(_hash_turns(""), stop=("###",)),
    "one_shot": BuiltinTemplate(_hash_turns(_ONE_SHOT), stop=("###",)),
    "alpaca": BuiltinTemplate(
        _with_eos(
            _turns(
                system=(
                    "Below is an instruction that describes a task. "
                    "Write a response that appropriately completes the request."
                ),
                after_system="\n\n",
                user="### Instruction",
                assistant="### Response",
                user_end="\n\n",
                assistant_end="</s>",
            )
        ),
        stop=("### Instruction:",),
    ),
    "koala": BuiltinTemplate(
        _with_eos(
            _turns(
                system="BEGINNING OF CONVERSATION:",
                after_system=" ",
                user="USER",
                assistant="GPT",
                user_end=" ",
                assistant_end="</s>",
            )
        )
    ),
    "llama-2": BuiltinTemplate(_LLAMA_2),
    "llama-3": BuiltinTemplate(_LLAMA_3),
    "chatml": BuiltinTemplate(_CHATML),
}
"""`one_shot` is FastChat's format for models it does not know; the example turn in it is ours."""

_BY_VOCABULARY = (("llama-3", ("<|start_header_id|>", "<|eot_id|>")), ("chatml", ("<|im_start|>", "<|im_end|>")))
_BY_NAME = (
    (re.compile(r"vicuna.*[-_ ]v?0(\.0)?(?![.\d])"), "vicuna_v0"),
    (re.compile(r"vicuna|wizardlm"), "vicuna_v1.1"),
    (re.compile(r"alpaca"), "alpaca"),
    (re.compile(r"koala"), "koala"),
    (re.compile(r"llama-?_?2"), "llama-2"),
)


def choose_builtin(model_path: Path, tokenizer: Tokenizer, model_name: str) -> tuple[str, str]:
    """(name of the built-in template, why), for a checkpoint that carries none."""
    for name, markers in _BY_VOCABULARY:
        if None not in map(tokenizer.token_to_id, markers):
            return name, f"its vocabulary holds {markers[1]}"
    for text in (model_name, model_path.absolute().name):
        for pattern, name in _BY_NAME:
            if match := pattern.search(text.lower()):
                return name, f"its name says {match[0]!r}"
    return "one_shot", "nothing in its name or vocabulary tells its format; --chat-template names another one"
