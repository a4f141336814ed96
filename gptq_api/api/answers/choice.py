"""One sample of one prompt: the engine's tokens become the text that may be shown. Also what `gptq-api chat` shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptq_api.api.answers.logprobs import Ledger, TokenEntry
from gptq_api.engine.generation import Delta
from gptq_api.text.parts import CallDelta, Parts, StoppedReader
from gptq_api.text.stream import TextStream
from gptq_api.types import FinishReason, SamplingParams, TokenLogprobs

AnswerEnd = FinishReason | Literal["tool_calls"]
"""why an answer ended: "tool_calls" where the engine says "stop" and tools were called"""


@dataclass(slots=True)
class Piece:
    """News of one choice: text that may be shown, and with the last piece why the choice ended."""

    choice: Choice
    text: str
    entries: list[TokenEntry]
    """log-probabilities of the tokens whose text is shown by now; empty unless asked for"""
    finish_reason: AnswerEnd | None = None
    reasoning: str = ""
    """thoughts, which come before `text`"""
    calls: Sequence[CallDelta] = ()
    """more of tool calls, which come behind it"""


class Choice:
    """One sample of one prompt: its text, and when its tokens came."""

    def __init__(
        self, index: int, sample: int, params: SamplingParams, text: TextStream, reader: StoppedReader | None = None
    ) -> None:
        """`reader`: finds thoughts and calls in the text, and looks for stop strings instead of `text`."""
        self.index = index
        self.sample = sample
        """0 for the first of a prompt's samples"""
        self.finish_reason: FinishReason | None = None
        self.expired = False
        """whether it was to end where it was, for lack of time"""
        self.token_ids: list[int] | None = None
        """all that came, where somebody asked for them; the first `num_tokens` count"""
        self._num_told_ids = 0
        self.num_tokens = 0
        self.num_received = 0
        """tokens that came: more than count where a stop string was met before the last of them"""
        self.num_reasoning_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.gaps: list[float] = []
        """seconds between tokens; as many as tokens after the first"""
        self.tells_end = False
        """whether the token that ends the answer has a logprob too, though no text"""
        self._text = text
        self._reader = reader
        self._ledger = None if params.top_logprobs is None else Ledger()
        self._untold: list[TokenEntry] = []
        """of tokens whose text the reader holds back"""

    @property
    def stop_string(self) -> str | None:
        """The one that ended the text."""
        return self._text.stop_string if self._reader is None else self._reader.stop_string

    @property
    def stop_reason(self) -> str | None:
        """More about why it ended, where there is more to say."""
        return "deadline" if self.expired and self.finish_reason == "length" else None

    @property
    def mean_logprob(self) -> float:
        return 0.0 if self._ledger is None else self._ledger.mean

    def new_ids(self) -> list[int]:
        """Those that nobody was told yet."""
        assert self.token_ids is not None
        start, self._num_told_ids = self._num_told_ids, self.num_tokens
        return self.token_ids[start : self.num_tokens]

    def take(self, delta: Delta) -> list[Piece]:
        """Text that may be shown by now; the last piece of a choice, and only that one, has a finish_reason.

        There is no last piece where the engine gave the sequence up ("error", "too_complex"): what was held back is not
        shown.
        """
        tokens = delta.tokens
        self.num_received += len(tokens)
        if self.token_ids is not None:
            self.token_ids += tokens
        if tokens:
            self._clock(len(tokens))
        if delta.finish_reason == "stop" and not self._text.include_stop:
            tokens = tokens[:-1]  # the stop token, whose text is not part of the answer
        if self._reader is not None:
            return self._read(self._reader, delta, tokens)
        text = self._text.push(tokens) if self._ledger is None else self._push(self._ledger, tokens, delta.logprobs)
        if self._text.stopped:
            self.num_tokens = self._text.num_tokens  # those behind it are nobody's
            return [self._last(text, "stop")]
        self.num_tokens += len(delta.tokens)
        if self.tells_end and self._ledger is not None and len(tokens) < len(delta.tokens):
            end = self._text.num_chars
            self._ledger.add(delta.tokens[-1], end, end, delta.logprobs[-1])
        pieces = [Piece(self, text, self._shown(len(text)))] if text else []
        if delta.finish_reason in ("error", "too_complex"):
            self.finish_reason = delta.finish_reason
        elif delta.finish_reason is not None:
            pieces.append(self._last(self._text.finish(), delta.finish_reason))
        return pieces

    def _read(self, reader: StoppedReader, delta: Delta, tokens: list[int]) -> list[Piece]:
        """What `take` does, where thoughts and calls are looked for: token by token, since any of them may end it."""
        parts = Parts()
        for i, token in enumerate(tokens):
            self.num_reasoning_tokens += reader.thinking
            if self._ledger is None:
                text = self._text.push([token])
            else:
                text = self._push(self._ledger, [token], delta.logprobs[i:])
            parts += reader.push(text)
            if reader.stopped:
                self.num_tokens = self._text.num_tokens
                self._untold += self._shown(len(text) - reader.num_surplus, last=True, stopped=True)
                self.finish_reason = "stop"
                return [self._of(parts, "stop")]
            self._untold += self._shown(len(text))
        self.num_tokens += len(delta.tokens)
        self.finish_reason = delta.finish_reason
        if delta.finish_reason in (None, "error", "too_complex"):
            return [self._of(parts)] if parts else []
        text = self._text.finish()
        parts += reader.push(text)
        if not reader.stopped:
            parts += reader.finish()
        if reader.stopped:
            self.finish_reason = "stop"
        self._untold += self._shown(len(text), last=True)
        called = self.finish_reason == "stop" and reader.has_calls
        return [self._of(parts, "tool_calls" if called else self.finish_reason)]

    def _of(self, parts: Parts, reason: AnswerEnd | None = None) -> Piece:
        entries, self._untold = self._untold, []
        return Piece(self, parts.content, entries, reason, parts.reasoning, parts.calls)

    def _push(self, ledger: Ledger, tokens: list[int], logprobs: list[TokenLogprobs]) -> str:
        """New text, with an entry in the ledger for each token up to one that completes a stop string."""
        text = ""
        for token, told in zip(tokens, logprobs, strict=False):
            shown, start, end = self._text.push_token(token)
            ledger.add(token, start, end, told)
            text += shown
            if self._text.stopped:
                break
        return text

    def _last(self, text: str, reason: FinishReason) -> Piece:
        self.finish_reason = reason
        return Piece(self, text, self._shown(len(text), last=True, stopped=self._text.stopped), reason)

    def _shown(self, num_chars: int, last: bool = False, stopped: bool = False) -> list[TokenEntry]:
        return [] if self._ledger is None else self._ledger.shown(num_chars, last, stopped)

    def _clock(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self.last_token_at is None:
            self.first_token_at = self.last_token_at = now
            num_tokens -= 1
        if num_tokens == 1:
            self.gaps.append(now - self.last_token_at)
        elif num_tokens:  # tokens that a slow reader gets together: the time is shared among them
            self.gaps += [(now - self.last_token_at) / num_tokens] * num_tokens
        self.last_token_at = now
