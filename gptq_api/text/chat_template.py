"""Messages to prompt tokens, through the checkpoint's chat template or a built-in one; users cannot forge turns.

How contents stay text. A template's output is one string in which `</s>` from the template and
`</s>` typed by a user look alike. So before rendering, every control token that stands in a message (and every fragment
at its edges that could become one together with its neighbour) is replaced by an opaque mark of private-use characters.
Control tokens found in the output are then the template's; the marks are turned back into what the user typed, as plain
text. All other characters of a message go through the template as they are, so `trim`, `split`, `tojson` and tests on
contents work as its author meant. Without any such string a prompt is encoded in one piece, as transformers does it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_api.text.builtin_templates import BUILTIN, choose_builtin
from gptq_api.text.chat import ChatTemplateError, TemplateFacts, joined_parts
from gptq_api.text.sandbox import CompiledTemplate, TemplateRaised
from gptq_api.text.tokenizer import Tokenizer
from gptq_api.text.tokenizer_config import read_json, read_tokenizer_config
from gptq_api.text.tools.layouts import layout_of
from gptq_api.text.tools.reader import THINK

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_TURN_MARKER = re.compile(r"\s*(<\|[^\s|]+\|>)")
_LLAMA_3_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


MAX_CHARS, MAX_GROWTH = 1_000_000, 8
"""of a prompt: so many characters, and so many for every character that went in"""


class ChatTemplate:
    """A compiled chat template and what ends an answer under it."""

    def __init__(
        self,
        jinja: str,
        tokenizer: Tokenizer,
        *,
        source: str,
        stop: tuple[str, ...] = (),
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        """`special_tokens`: the variables bos_token, eos_token ... of the template. Raises ChatTemplateError."""
        self._tokenizer = tokenizer
        self._variables = {"tools": None, "documents": None, **(special_tokens or {})}
        try:
            self._template = CompiledTemplate(jinja)
        except Exception as error:  # not only Jinja's own: Python compiles what Jinja made of it
            raise ChatTemplateError(
                f"the chat template ({source}) is not usable: {_reason(error)}; name another one with --chat-template"
            ) from None
        self._edges = {
            fragment
            for content in tokenizer.special_contents
            for length in range(1, len(content))
            for fragment in (content[:length], content[length:])
        }
        ours = {"messages", "add_generation_prompt", *self._variables}
        ends, strings = self._answer_ends()
        self.facts = TemplateFacts(
            source=source,
            variables=self._template.variables - ours,
            reads_documents="documents" in self._template.variables,
            names_thoughts=THINK in jinja,
            calls=layout_of(jinja, self._template.variables),
            stop_token_ids=ends,
            stop=(*stop, *strings),
            takes_system=self._takes("system", "user"),
            takes_system_later=self._takes("system", "user", "system", "user"),
            takes_user_twice=self._takes("user", "user"),
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt token ids, BOS exactly once where the model uses it. Raises ChatTemplateError.

        `continue_final_message`: the prompt ends with the last message's content, so that the answer goes on from it.
        `variables`: further ones of the template, JSON values that a client chose; control tokens in them stay text.
        """
        return self.rendered(messages, add_generation_prompt, continue_final_message, variables).ids()

    def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, for people to look at: in it a control token and its spelling look alike."""
        return self.rendered(messages, add_generation_prompt, continue_final_message, variables).text()

    def rendered(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """What the template made of them, for `render` and `render_text`. Raises ChatTemplateError."""
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError("add_generation_prompt and continue_final_message exclude each other")
        variables = dict(variables or {})
        marks = _Marks(self._tokenizer, self._edges, _strings([messages, variables]))
        plain = [_normalised(message, marks) for message in messages]
        end = ""
        if continue_final_message:
            if not plain or plain[-1].get("role") != "assistant" or not isinstance(plain[-1].get("content"), str):
                raise ChatTemplateError("continue_final_message needs a last message of role assistant with content")
            end = marks.sentinel
            plain[-1]["content"] += end
        text = self._run(plain, add_generation_prompt, _hidden(variables, marks))
        if end:
            text, found, _ = text.partition(end)
            if not found:
                raise ChatTemplateError("the chat template leaves out the last message, so it cannot be continued")
        return Rendered(text, marks, self._tokenizer)

    def _run(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, more: Mapping[str, Any] | None = None
    ) -> str:
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        variables = {**self._variables, **(more or {}), **ours}
        room = MAX_CHARS + MAX_GROWTH * sum(map(len, _strings(variables)))
        try:
            text = self._template.render(variables)
        except TemplateRaised as error:
            raise ChatTemplateError(error.message or "the chat template refuses these messages") from None
        except Exception as error:  # a template can fail in any way that Python can
            raise ChatTemplateError(f"the chat template cannot render these messages: {_reason(error)}") from None
        if len(text) > room:
            raise ChatTemplateError("the chat template makes far more text of these messages than they hold")
        return text

    def _takes(self, *roles: str) -> bool:
        """Whether a conversation of these roles is rendered with all that was said."""
        contents = [f"said{index}by" for index in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = self._run(messages, True)
        except ChatTemplateError:
            return False
        return all(content in text for content in contents)

    def _answer_ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What the template writes behind an assistant's message is what the model will end its answer with."""
        probe = "\ue000answer\ue001"
        try:
            text = self._run([{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}], False)
        except ChatTemplateError:
            return (), ()
        after = text.partition(probe)[2]
        parts = self._tokenizer.split_special(after.lstrip())
        if parts and isinstance(parts[0], int):
            names = _LLAMA_3_ENDS if self._tokenizer.id_to_token(parts[0]) == _LLAMA_3_ENDS[0] else ()
            ids = [parts[0], *(i for name in names if (i := self._tokenizer.token_to_id(name)) is not None)]
            return tuple(i for i in dict.fromkeys(ids) if i != self._tokenizer.eos_token_id), ()
        marker = _TURN_MARKER.match(after)
        return (), (marker[1],) if marker else ()


@dataclass(slots=True, frozen=True)
class Rendered:
    """A template's output, in which marks stand for the control tokens that users typed."""

    marked: str
    _marks: _Marks
    _tokenizer: Tokenizer

    def text(self) -> str:
        return self._marks.restore(self.marked)

    def ids(self) -> list[int]:
        """BOS exactly once where the model uses it."""
        tokenizer, marks = self._tokenizer, self._marks
        parts = tokenizer.split_special(self.marked)
        if not marks.found_in(self.marked):
            ids = tokenizer.encode(self.marked, parse_special=True)
            # A normalizer can make control tokens of look-alikes (full-width letters) that no mark stands for.
            found = [i for i in ids if i in tokenizer.special_token_ids]
            if found == [part for part in parts if isinstance(part, int)]:
                return tokenizer.with_bos(ids)
        parts = [part if isinstance(part, int) else marks.restore(part) for part in parts]
        return tokenizer.with_bos(tokenizer.encode_parts(parts))


class _Marks:
    """Opaque stand-ins for the control tokens that users typed, for one rendering."""

    def __init__(self, tokenizer: Tokenizer, edges: set[str], strings: Sequence[str]) -> None:
        nonce = "0"
        while any(f"\ue000{nonce}" in string for string in strings):
            nonce = str(secrets.randbelow(10**12))
        self._pattern = tokenizer.special_pattern
        self._edges = edges
        self._longest = max(map(len, edges), default=0)
        self._open = f"\ue000{nonce}\ue001"
        self._mark = re.compile(re.escape(self._open) + r"(\d+)\ue002")
        self._originals: list[str] = []
        self.sentinel = f"\ue000{nonce}\ue003"

    def hide(self, text: str) -> str:
        text = self._pattern.sub(lambda match: self._hidden(match[0]), text)
        core = text.strip()
        start = len(text) - len(text.lstrip())
        head = next((core[:n] for n in range(min(self._longest, len(core)), 0, -1) if core[:n] in self._edges), "")
        rest = core[len(head) :]
        tail = next((rest[-n:] for n in range(min(self._longest, len(rest)), 0, -1) if rest[-n:] in self._edges), "")
        middle = rest[: len(rest) - len(tail)]
        hidden = (self._hidden(head) if head else "") + middle + (self._hidden(tail) if tail else "")
        return text[:start] + hidden + text[start + len(core) :]

    def found_in(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def restore(self, text: str) -> str:
        return self._mark.sub(lambda match: self._originals[int(match[1])], text)

    def _hidden(self, original: str) -> str:
        self._originals.append(original)
        return f"{self._open}{len(self._originals) - 1}\ue002"


def _normalised(message: dict[str, Any], marks: _Marks) -> dict[str, Any]:
    """As templates expect it: developer is system, text parts are one string, tool arguments are an object."""
    result = {key: _hidden(value, marks) for key, value in message.items() if key not in ("role", "content")}
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ChatTemplateError(f"{role!r} is not a role")
    result["role"] = "system" if role == "developer" else role
    content = message.get("content")
    if isinstance(content, list):
        content = joined_parts(content)
    result["content"] = marks.hide(content) if isinstance(content, str) else content
    for call in result.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                continue  # the template prints what the client sent
    return result


def _hidden(value: Any, marks: _Marks) -> Any:
    if isinstance(value, str):
        return marks.hide(value)
    if isinstance(value, list):
        return [_hidden(item, marks) for item in value]
    if isinstance(value, dict):
        return {marks.hide(key): _hidden(item, marks) for key, item in value.items()}
    return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for item in items for string in _strings(item)]


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def load_chat_template(
    model_path: Path, tokenizer: Tokenizer, *, override: Path | str | None = None, model_name: str = ""
) -> ChatTemplate:
    """The override (a file or a built-in name), else the checkpoint's own, else a built-in one by vocabulary or name.

    Raises ChatTemplateError for an override that does not exist or a template that does not compile, TokenizerError for
    a file of the checkpoint that is not JSON.
    """
    config = read_tokenizer_config(model_path)
    special = dict(config.roles)
    for role, token_id in (("bos_token", tokenizer.bos_token_id), ("eos_token", tokenizer.eos_token_id)):
        special[role] = tokenizer.id_to_token(token_id) if token_id is not None else ""
    if override is not None:
        path = Path(override).expanduser()
        if path.is_file():
            jinja = path.read_text(encoding="utf-8-sig", errors="replace")
            return ChatTemplate(jinja, tokenizer, source=f"chat template: {path}", special_tokens=special)
        name, why = str(override), "as asked for"
        if name not in BUILTIN:
            raise ChatTemplateError(
                f"--chat-template {override} is neither a file nor a built-in template ({', '.join(BUILTIN)})"
            )
    else:
        found = _own_template(model_path)
        if found is not None:
            jinja, where = found
            return ChatTemplate(
                jinja, tokenizer, source=f"chat template: the checkpoint's {where}", special_tokens=special
            )
        name, why = choose_builtin(model_path, tokenizer, model_name)
        why = f"the checkpoint carries none; {why}"
    builtin = BUILTIN[name]
    source = f"chat template: built-in {name} ({why})"
    return ChatTemplate(builtin.jinja, tokenizer, source=source, stop=builtin.stop, special_tokens=special)


def _own_template(folder: Path) -> tuple[str, str] | None:
    """(template, file name), in the order in which transformers lets them win."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8-sig", errors="replace"), jinja.name
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template:
            return template, name
    return None
