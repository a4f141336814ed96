"""Log-probabilities in OpenAI's two spellings."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from gptq_api.text.tokens import Tokens
from gptq_api.types import TokenLogprobs

LOWEST = -9999.0
"""OpenAI's number for a probability of zero; JSON has no -inf"""


@dataclass(slots=True, frozen=True)
class TokenEntry:
    """One shown token."""

    token_id: int
    text_offset: int
    """where its text begins in the choice's text, characters"""
    logprobs: TokenLogprobs


def chat_logprobs(tokenizer: Tokens, entries: list[TokenEntry], num_top: int) -> dict[str, Any]:
    content = [
        {
            **_spelled(tokenizer, entry.token_id, entry.logprobs.logprob),
            "top_logprobs": [_spelled(tokenizer, *pair) for pair in entry.logprobs.top[:num_top]],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokens, entries: list[TokenEntry], num_top: int) -> dict[str, Any]:
    """`top_logprobs` holds the sampled token besides the `num_top` best, with the very same number."""
    tops = []
    for entry in entries:
        top = {token_text(tokenizer, token): shown_logprob(value) for token, value in entry.logprobs.top[:num_top]}
        top[token_text(tokenizer, entry.token_id)] = shown_logprob(entry.logprobs.logprob)
        tops.append(top)
    return {
        "tokens": [token_text(tokenizer, entry.token_id) for entry in entries],
        "token_logprobs": [shown_logprob(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": tops if num_top else None,
        "text_offset": [entry.text_offset for entry in entries],
    }


def token_text(tokenizer: Tokens, token_id: int) -> str:
    """A token's own text; `bytes:\\xf0\\x9f` where it is a part of a character, so that no two look alike."""
    if token_id in tokenizer.special_token_ids:
        return tokenizer.id_to_token(token_id)
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _spelled(tokenizer: Tokens, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    # a control token stands for no text, which OpenAI's specification spells null
    return {"token": token_text(tokenizer, token_id), "logprob": shown_logprob(logprob), "bytes": list(data) or None}


def shown_logprob(logprob: float) -> float:
    """As JSON can say it."""
    return logprob if logprob > LOWEST else LOWEST  # also where it is NaN


class Ledger:
    """Which tokens' log-probabilities may be told: those whose text is shown."""

    def __init__(self) -> None:
        self._num_shown = 0
        self._waiting: deque[tuple[int, TokenEntry]] = deque()
        self._sum = 0.0
        self._num = 0

    def add(self, token_id: int, start: int, end: int, logprobs: TokenLogprobs) -> None:
        """`start`, `end`: where its text stands, as TextStream says."""
        self._waiting.append((end, TokenEntry(token_id, start, logprobs)))
        self._sum += max(logprobs.logprob, -1e30)
        self._num += 1

    @property
    def mean(self) -> float:
        """Log-probability per token so far; what best_of ranks by."""
        return self._sum / self._num if self._num else 0.0

    def shown(self, num_chars: int, last: bool, stopped: bool) -> list[TokenEntry]:
        """Entries that may be told after `num_chars` more characters were shown."""
        self._num_shown += num_chars
        entries = []
        while self._waiting:
            end, entry = self._waiting[0]
            hidden = stopped and entry.text_offset >= self._num_shown  # of the stop string only
            if not last and end > self._num_shown:
                break
            self._waiting.popleft()
            if not hidden:
                entries.append(entry)
        return entries
