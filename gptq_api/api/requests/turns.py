"""Messages in the order and number that a chat template takes.

The Responses and Messages APIs allow any sequence: Codex begins with several developer and user messages, Claude Code
has system messages in the middle. Templates differ: some take everything, some raise unless user and assistant
alternate behind one system message, some drop what they do not expect.
"""

from __future__ import annotations

from typing import Any

from gptq_api.text.chat import TemplateFacts

Message = dict[str, Any]
_GAP = "\n\n"


def fitted(messages: list[Message], template: TemplateFacts) -> list[Message]:
    """System messages at the head become one. One that comes later stays at its place, which keeps what is before it in
    the prefix cache: as a system message where the template takes it there, as the user's otherwise."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    told = messages[:head]
    if head and not template.takes_system:
        told = [{**message, "role": "user"} for message in told]
    rest = messages[head:]
    if not template.takes_system_later:
        rest = [{**message, "role": "user"} if message["role"] == "system" else message for message in rest]
    joins = {"assistant"} if template.takes_user_twice else {"assistant", "user"}
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
