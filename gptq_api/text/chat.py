"""What chats and their templates are to whoever does not run a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gptq_api.errors import UserError
from gptq_api.text.tools.layouts import CallLayout


class ChatTemplateError(UserError):
    """These messages cannot be rendered (the text is for the client), or the template cannot be used at all."""


class TemplateFacts(msgspec.Struct, frozen=True):
    """What is known of a chat template without running it."""

    source: str
    """what was chosen and why, one line"""
    variables: frozenset[str]
    """names that a request may set, because the template reads them: `enable_thinking`, `date_string` ..."""
    reads_documents: bool
    names_thoughts: bool
    """whether it writes <think>"""
    calls: CallLayout
    """how the model writes tool calls"""
    stop_token_ids: tuple[int, ...]
    """end-of-turn tokens besides EOS"""
    stop: tuple[str, ...]
    """stop strings of formats whose turns end in plain text"""
    takes_system: bool
    """whether a conversation may begin with a system message"""
    takes_system_later: bool
    """whether there may be another one in the middle"""
    takes_user_twice: bool
    """whether two messages of the user may follow each other"""


def joined_parts(parts: Sequence[Any]) -> str:
    """The texts of OpenAI's content parts as one text with a line for each, since templates expect one; whatever is no
    text part is left out."""
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
