"""The mailbox of a request: what the engine's steps bring for it, until its reader takes it.

engine/client.py fills it; whoever submitted the request reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from gptq_api.types import FinishReason, PromptLogprobs, TokenLogprobs


@dataclass(slots=True)
class Delta:
    """What a choice got since its last delta: one token on a quick reader, several on a slow one."""

    choice: int
    """counts the samples of the first prompt, then those of the second ..."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """one per token where SamplingParams.top_logprobs asked for them, otherwise empty"""
    finish_reason: FinishReason | None = None
    """why it ended, with the last delta of the choice"""
    prompt: Sequence[PromptLogprobs] = ()
    """of its prompt, where SamplingParams.prompt_logprobs asked for them: all of them come before its first token, or
    with it"""


class Generation:
    """The mailbox of all choices of one request. Filling it never blocks; a slow reader gets each choice's tokens
    merged.

    The choices are numbered from 0; their sequences have consecutive ids from `first_id` on.
    """

    def __init__(self, leave: Callable[[list[int]], None], first_id: int, num_choices: int, owner: bytes = b"") -> None:
        """`leave`: gives the places of these sequences back; `owner`: whose they are."""
        self.first_id, self.owner = first_id, owner
        self.num_cached_tokens = [0] * num_choices
        """by choice, prompt tokens that came from the prefix cache; known with the first token"""
        self.admitted_at: list[float | None] = [None] * num_choices
        """by choice, time.monotonic() when its first tokens began to be computed; known soon after"""
        self.drafted = [(0, 0)] * num_choices
        """by choice, (accepted, rejected) of the tokens that were drafted for it so far"""
        self.predicted = [(0, 0)] * num_choices
        """the same of those that its prediction suggested"""
        self._leave = leave
        self._news: dict[int, Delta] = {}  # by choice, in the order of arrival
        self._running = set(range(num_choices))  # choices of which more may come
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None  # who waits for news

    def close(self, choice: int) -> None:
        """Give the place of a choice back, while the others go on; nothing more comes of it."""
        self._running.discard(choice)
        self._news.pop(choice, None)
        self._leave([self.first_id + choice])

    def expire(self) -> list[int]:
        """No more time: choices of which more might have come end where they are, with reason "length", and give their
        places back. Which they are."""
        cut = sorted(self._running)
        self._running.clear()
        for choice in cut:
            self._news.setdefault(choice, Delta(choice)).finish_reason = "length"
        self._leave([self.first_id + choice for choice in cut])
        self._wake()
        return cut

    def admit(self, sequence_id: int, at: float) -> None:
        """Since when its first tokens are computed; said once more where it was preempted, which changes nothing."""
        choice = sequence_id - self.first_id
        if self.admitted_at[choice] is None:
            self.admitted_at[choice] = at

    def put(self, sequence_id: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """The next token of a sequence."""
        choice = sequence_id - self.first_id
        delta = self._news.get(choice)
        if delta is None:  # as for every token of a quick reader
            self._news[choice] = Delta(choice, [token], [] if logprobs is None else [logprobs])
            self._wake()
            return
        delta.tokens.append(token)
        if logprobs is not None:
            delta.logprobs.append(logprobs)

    def put_prompt(self, sequence_id: int, told: PromptLogprobs) -> None:
        """The next log-probabilities of a sequence's prompt."""
        choice = sequence_id - self.first_id
        delta = self._news.setdefault(choice, Delta(choice))
        delta.prompt = [*delta.prompt, told]
        self._wake()

    def finish(self, sequence_id: int, reason: FinishReason) -> None:
        """A sequence has ended; what it got before is still to be read."""
        choice = sequence_id - self.first_id
        self._running.discard(choice)
        self._news.setdefault(choice, Delta(choice)).finish_reason = reason
        self._wake()

    def fail(self, error: Exception) -> None:
        """The engine failed: told once, after all that came before."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """What has come, at most one delta of each choice at a time, until all choices are finished or closed.

        Raises EngineDead, EngineStalled when the engine fails first.
        """
        while True:
            if self._news:
                deltas = list(self._news.values())
                self._news.clear()
                yield deltas
            elif not self._running:
                return
            elif self._error is not None:
                raise self._error
            else:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
