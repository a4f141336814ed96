"""Messages in the order and number that a chat template takes.

The Responses and Messages APIs allow any sequence: Codex begins with several developer and user messages, Claude Code
has system messages in the middle. Templates differ: some take everything, some raise unless user and assistant
alternate behind one system message, some drop what they do not expect.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gptq_api.text.chat_template import ChatTemplate, ChatTemplateError

Message = dict[str, Any]
_GAP = "\n\n"


@lru_cache(maxsize=64)
def takes(template: ChatTemplate, roles: tuple[str, ...]) -> bool:
    """Whether a conversation of these roles is rendered with all that was said."""
    contents = [f"said{index}by" for index in range(len(roles))]
    try:
        text = template.render_text(
            [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        )
    except ChatTemplateError:
        return False
    return all(content in text for content in contents)


def fitted(messages: list[Message], template: ChatTemplate) -> list[Message]:
    """System messages at the head become one. One that comes later stays at its place, which keeps what is before it in
    the prefix cache: as a system message where the template takes it there, as the user's otherwise."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    told = messages[:head]
    if head and not takes(template, ("system", "user")):
        told = [{**message, "role": "user"} for message in told]
    rest = messages[head:]
    if not takes(template, ("system", "user", "system", "user")):
        rest = [{**message, "role": "user"} if message["role"] == "system" else message for message in rest]
    joins = {"assistant"} if takes(template, ("user", "user")) else {"assistant", "user"}
    found: list[Message] = []
    for index, message in enumerate([*told, *rest]):
        role = message["role"]
        joined = role in joins or (role == "system" and index < head)
        if joined and found and found[-1]["role"] == role and "tool_calls" not in found[-1]:
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    return found


def _joined(first: Message, second: Message) -> Message:
    texts = [message["content"] for message in (first, second) if message.get("content")]
    return {**first, **second, "content": _GAP.join(texts) or first.get("content")}
