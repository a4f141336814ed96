"""From the engine's tokens to pieces of text: the one generator behind streams and whole answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from gptq_api.api.errors import ApiError, too_many, unavailable
from gptq_api.api.logprobs import Ledger, TokenEntry
from gptq_api.api.middleware import RequestRecord
from gptq_api.api.prepare import Prompt
from gptq_api.api.service import Service
from gptq_api.engine.client import EngineDead, EngineFull, EngineStalled, Generation
from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer
from gptq_api.types import FinishReason, SamplingParams


class GenerationFailed(RuntimeError):
    """The engine gave up on one sequence (its logits were not finite)."""


@dataclass(slots=True, frozen=True)
class TextOptions:
    """How tokens become text."""

    stop: list[str]
    include_stop: bool
    skip_special: bool
    continues: bool


@dataclass(slots=True)
class Piece:
    """News of one choice: text that may be shown, and with the last piece why it ended."""

    choice: Choice
    text: str
    entries: list[TokenEntry]
    """log-probabilities of the tokens whose text is shown by now; empty unless asked for"""
    finish_reason: FinishReason | None = None


class Choice:
    """One sample of one prompt. `close()` gives the engine its place back."""

    def __init__(
        self,
        index: int,
        sample: int,
        generation: Generation | None,
        params: SamplingParams,
        options: TextOptions,
        tokenizer: Tokenizer,
        place: ExitStack,
    ) -> None:
        self.index = index
        self.sample = sample
        """0 for the first of a prompt's samples"""
        self.generation = generation
        """None where max_tokens is 0"""
        self.num_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.gaps: list[float] = []
        """seconds between tokens; as many as tokens after the first"""
        self._params = params
        self._hide_stop_token = not options.include_stop
        self._text = TextStream(
            tokenizer,
            stop=options.stop,
            include_stop=options.include_stop,
            skip_special=options.skip_special,
            continues=options.continues,
        )
        self._ledger: Ledger | None = None
        if params.top_logprobs is not None:
            self._ledger = Ledger(tokenizer, skip_special=options.skip_special, continues=options.continues)
        self._place = place

    def close(self) -> None:
        self._place.close()

    @property
    def mean_logprob(self) -> float:
        return 0.0 if self._ledger is None else self._ledger.mean

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self.generation is None else self.generation.num_cached_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it may be shown; the last piece, and only that one, has a finish_reason.

        Raises EngineDead, EngineStalled, GenerationFailed.
        """
        if self.generation is None:
            yield Piece(self, "", [], "length")
            return
        async for delta in self.generation:
            self._clock(len(delta.tokens))
            text = ""
            for i, token in enumerate(delta.tokens):
                self.num_tokens += 1
                if self._hide_stop_token and token in self._params.stop_token_ids:
                    break  # always the last one; its text is not part of the answer
                if self._ledger is not None:
                    self._ledger.add(token, delta.logprobs[i])
                text += self._text.push((token,))
                if self._text.stopped:
                    break
            if self._text.stopped:
                self.close()
                yield Piece(self, text, self._shown(text, last=True), "stop")
                return
            if text:
                yield Piece(self, text, self._shown(text))
        reason = self.generation.finish_reason
        if reason == "error" or reason is None:
            raise GenerationFailed("The model produced numbers that are not finite; the answer was given up.")
        text = self._text.finish()
        self.close()
        yield Piece(self, text, self._shown(text, last=True), reason)

    def _shown(self, text: str, last: bool = False) -> list[TokenEntry]:
        return [] if self._ledger is None else self._ledger.shown(len(text), last, self._text.stopped)

    def _clock(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at = now
            num_tokens -= 1
        if num_tokens > 0 and self.last_token_at is not None:
            # tokens that a slow reader gets together: the time is shared among them
            self.gaps += [(now - self.last_token_at) / num_tokens] * num_tokens
        self.last_token_at = now


@dataclass(slots=True)
class Work:
    """All choices of one request."""

    choices: list[Choice]
    prompts: list[Prompt]
    service: Service
    record: RequestRecord
    outcome: str = "disconnect"
    """how it ended, seen from the engine; a client that leaves says nothing"""

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> dict[str, object]:
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_cached = sum(choice.num_cached_tokens for choice in self.choices if choice.sample == 0)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come. Raises ApiError where the engine failed."""
        try:
            async for piece in self.choices[0].pieces() if len(self.choices) == 1 else _merged(self.choices):
                if piece.finish_reason is not None:
                    self.service.metrics.success[piece.finish_reason].inc()
                yield piece
        except GenerationFailed as error:
            self.outcome = "error"
            self.service.metrics.success["error"].inc()
            raise ApiError(500, str(error), code="generation_failed", headers={"x-should-retry": "false"}) from None
        except EngineStalled:
            self.outcome = "engine_stalled"
            raise unavailable(
                "The engine fell silent while the answer was being generated.", "engine_stalled"
            ) from None
        except EngineDead:
            if self.service.draining:
                self.outcome = "shutdown"
                raise unavailable("The server is shutting down.", "server_shutting_down") from None
            self.outcome = "engine_dead"
            raise unavailable("The engine stopped while the answer was being generated.", "engine_dead") from None
        self.outcome = "done"

    def finish(self) -> None:
        """Once, however it ended: metrics and the log record."""
        metrics, record = self.service.metrics, self.record
        now = time.monotonic()
        record.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        record.num_cached_tokens = sum(choice.num_cached_tokens for choice in self.choices if choice.sample == 0)
        record.num_completion_tokens = self.num_completion_tokens
        record.outcome = None if self.outcome == "done" else self.outcome
        metrics.prompt_tokens_cached.inc(record.num_cached_tokens)
        firsts = [choice.first_token_at for choice in self.choices if choice.first_token_at is not None]
        if firsts:
            record.ttft_s = min(firsts) - record.started
            metrics.ttft.observe(record.ttft_s)
        for choice in self.choices:
            metrics.generation_tokens.inc(choice.num_tokens)
            metrics.request_generation_tokens.observe(choice.num_tokens)
            for gap in choice.gaps:
                metrics.inter_token.observe(gap)
            if choice.gaps:
                metrics.per_token.observe(sum(choice.gaps) / len(choice.gaps))
        if self.outcome in metrics.cancelled:
            metrics.cancelled[self.outcome].inc()
        elif self.outcome == "done":
            metrics.e2e.observe(now - record.started)


@contextmanager
def admitted(
    service: Service, record: RequestRecord, prompts: list[Prompt], options: TextOptions, cache_salt: str | None
) -> Iterator[Work]:
    """All sequences of a request admitted, or none of them. Raises ApiError 429, 503. Leaving the block ends them."""
    salt = record.key_id + (b"" if cache_salt is None else b"/" + cache_salt.encode())
    with ExitStack() as stack:
        choices: list[Choice] = []
        try:
            for prompt in prompts:
                for sample, params in enumerate(prompt.params):
                    place = stack.enter_context(ExitStack())
                    generation = None
                    if params.max_tokens:
                        generation = place.enter_context(service.engine.submit(prompt.token_ids, params, salt))
                    choices.append(Choice(len(choices), sample, generation, params, options, service.tokenizer, place))
        except EngineFull as error:
            service.metrics.rejected["server_full"].inc()
            raise too_many(error.retry_after_s, f"The server is full: {error}.") from None
        except (EngineDead, EngineStalled):
            refusal = service.refusal()
            assert refusal is not None
            raise refusal from None
        work = Work(choices, prompts, service, record)
        _count(service, prompts)
        try:
            yield work
        finally:
            work.finish()


def _count(service: Service, prompts: list[Prompt]) -> None:
    metrics = service.metrics
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    metrics.prompt_tokens.inc(num_prompt)
    metrics.request_prompt_tokens.observe(num_prompt)
    metrics.request_n.observe(len(prompts[0].params))
    metrics.request_max_tokens.observe(prompts[0].params[0].max_tokens)


async def _merged(choices: list[Choice]) -> AsyncIterator[Piece]:
    """Pieces of several choices in the order they come. At most one waits per choice, so that a slow reader's tokens
    merge in their mailboxes and not here."""
    iterators = {choice.index: choice.pieces() for choice in choices}
    waiting = {asyncio.ensure_future(_next(it)): index for index, it in iterators.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                news = task.result()
                index = waiting.pop(task)
                if news is not None:
                    waiting[asyncio.ensure_future(_next(iterators[index]))] = index
                    yield news
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)  # one failure is told, its twins are not


async def _next(iterator: AsyncIterator[Piece]) -> Piece | None:
    return await anext(iterator, None)
