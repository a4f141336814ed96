"""From the engine's tokens to pieces of text: the one generator behind streams and whole answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from gptq_api.api.answers.choice import Choice, Piece
from gptq_api.api.answers.prompt_logprobs import Scoring
from gptq_api.api.errors import ApiError, deadline_exceeded, unavailable
from gptq_api.api.metrics import Phases
from gptq_api.api.service import Service
from gptq_api.api.terms import Terms
from gptq_api.api.traces import TracedAnswer
from gptq_api.edge.limits import Account, LimitReached
from gptq_api.edge.request_log import RequestRecord
from gptq_api.engine.client import EngineDead, EngineStalled, Prompt
from gptq_api.engine.generation import Delta, Generation
from gptq_api.engine.places import PlacesTaken
from gptq_api.text.parts import StoppedReader
from gptq_api.text.stream import TextStream

_GIVEN_UP = {
    "error": "The model produced numbers that are not finite; the answer was given up.",
    "too_complex": "The grammar of the answer became too complex to be followed; the answer was given up.",
}


@dataclass(slots=True)
class Work:
    """All choices of one request."""

    choices: list[Choice]
    prompts: list[Prompt]
    generation: Generation | None
    """None where max_tokens is 0 and there is nothing to run"""
    service: Service
    record: RequestRecord
    scoring: Scoring | None = None
    """where logprobs of the prompts were asked for"""
    operation: Literal["chat", "text_completion"] = "chat"
    submitted_at: float = field(default_factory=time.monotonic)
    """to the engine"""
    num_open: int = field(init=False)
    """choices whose last piece is still to come"""
    tells_ids: bool = False
    """whether the answer tells ids of tokens beside their text"""
    parent: object = None
    """of its spans, where it is traced"""
    outcome: str = "disconnect"
    """how it ended, seen from the engine; a client that leaves says nothing"""

    def __post_init__(self) -> None:
        self.num_open = len(self.choices)

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the first sample of each prompt found in the prefix cache."""
        if self.generation is None:
            return 0
        return sum(self.generation.num_cached_tokens[choice.index] for choice in self.choices if choice.sample == 0)

    def _drafted(self, *, predicted: bool) -> tuple[int, int]:
        """(accepted, rejected) tokens that were drafted for all choices, or of these what the prediction suggested."""
        if self.generation is None:
            return 0, 0
        counts = self.generation.predicted if predicted else self.generation.drafted
        accepted = 0
        for choice in self.choices:
            # what is behind a stop string is nobody's: drafted tokens, and the one behind them that was not
            num_surplus = max(choice.num_received - choice.num_tokens - 1, 0)
            accepted += max(counts[choice.index][0] - num_surplus, 0)
        return accepted, sum(rejected for _, rejected in counts)

    def usage(self) -> dict[str, object]:
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        accepted, rejected = self._drafted(predicted=True)  # all that was drafted stands in the log and in the metrics
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.num_reasoning_tokens for choice in self.choices),
                "audio_tokens": 0,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            },
        }

    def tell_ids(self) -> None:
        """Called before the first piece is read."""
        self.tells_ids = True
        for choice in self.choices:
            choice.token_ids = []

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // len(self.prompts[0].params)]

    def best(self, num_choices: int) -> list[Choice]:
        """So many samples of each prompt: all of them, or those that the model itself finds likeliest per token, the
        best first."""
        if num_choices == len(self.prompts[0].params):
            return self.choices
        best: list[Choice] = []
        rest = iter(self.choices)
        for prompt in self.prompts:
            samples = list(islice(rest, len(prompt.params)))
            best += sorted(samples, key=lambda choice: -choice.mean_logprob)[:num_choices]
        return best

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces of all choices as they come, those of one moment together, at least one. Raises ApiError where the
        engine failed, behind what came before."""
        try:
            if self.generation is None:
                yield self._taken([Delta(choice.index, finish_reason="length") for choice in self.choices])
            else:
                async for deltas in self.generation:
                    if self.outcome == "deadline" and not self._has_tokens(deltas):
                        raise deadline_exceeded()
                    if self.scoring is not None:
                        deltas = await self.scoring.take(deltas)
                        if self.outcome == "deadline" and self.scoring.is_waiting:
                            raise deadline_exceeded()
                    if pieces := self._taken(deltas):
                        yield pieces
                    if self.outcome in _GIVEN_UP:
                        message = _GIVEN_UP[self.outcome]
                        raise ApiError(500, message, code="generation_failed", headers={"x-should-retry": "false"})
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
        if self.outcome != "deadline":
            self.outcome = "done"

    def expire(self) -> None:
        """No more time: what is not complete ends where it is."""
        assert self.generation is not None
        for index in self.generation.expire():
            self.choices[index].expired = True
            self.outcome = "deadline"

    def _has_tokens(self, deltas: list[Delta]) -> bool:
        """Whether there is anything of an answer by now, with these."""
        return bool(self.num_completion_tokens) or any(delta.tokens for delta in deltas)

    def _taken(self, deltas: list[Delta]) -> list[Piece]:
        """What the choices make of it. Those that have ended are counted and give their places back."""
        pieces = list[Piece]()
        for delta in deltas:
            choice = self.choices[delta.choice]
            pieces += choice.take(delta)
            if (reason := choice.finish_reason) is not None:
                self.num_open -= 1
                self.service.metrics.success[reason].inc()
                if self.generation is not None:
                    self.generation.close(choice.index)
                if reason in ("error", "too_complex"):
                    self.outcome = reason
        return pieces

    def finish(self) -> None:
        """Once, however it ended: metrics and the log record."""
        metrics, record = self.service.metrics, self.record
        now = time.monotonic()
        record.notes |= {
            "tokens_in": sum(len(prompt.token_ids) for prompt in self.prompts),
            "tokens_cached": self.num_cached_tokens,
            "tokens_out": self.num_completion_tokens,
        }
        accepted, rejected = self._drafted(predicted=False)
        if accepted or rejected:
            record.notes |= {"tokens_drafted": accepted + rejected, "tokens_accepted": accepted}
        record.outcome = None if self.outcome == "done" else self.outcome
        metrics.prompt_tokens_cached.inc(self.num_cached_tokens)
        firsts = [choice.first_token_at for choice in self.choices if choice.first_token_at is not None]
        if firsts:
            ttft_s = min(firsts) - record.started
            record.notes["ttft_ms"] = round(ttft_s * 1000, 1)
            metrics.ttft.observe(ttft_s)
        metrics.request_most_generated.observe(max(choice.num_tokens for choice in self.choices))
        for choice in self.choices:
            metrics.generation_tokens.inc(choice.num_tokens)
            metrics.request_generation_tokens.observe(choice.num_tokens)
            if choice.gaps:
                metrics.inter_token.observe_all(choice.gaps)
                metrics.per_token.observe(sum(choice.gaps) / len(choice.gaps))
        phases = self.phases()
        if phases.admitted is not None:
            record.notes["queue_ms"] = round((phases.admitted - phases.submitted) * 1000, 1)
        if self.outcome in metrics.cancelled:
            metrics.cancelled[self.outcome].inc()
            metrics.cancelled_in[phases.last].inc()
        elif self.outcome == "done":
            metrics.e2e.observe(now - record.started)
            metrics.on_phases(phases)
        if self.service.traces is not None:
            self.service.traces.answered(self.parent, self._told(), phases, now)

    def phases(self) -> Phases:
        """How far it is."""
        admitted = [] if self.generation is None else [at for at in self.generation.admitted_at if at is not None]
        firsts = [choice.first_token_at for choice in self.choices if choice.first_token_at is not None]
        lasts = [choice.last_token_at for choice in self.choices if choice.last_token_at is not None]
        return Phases(
            self.submitted_at, min(admitted, default=None), min(firsts, default=None), max(lasts, default=None)
        )

    def _told(self) -> TracedAnswer:
        """What a trace says of it."""
        return TracedAnswer(
            operation=self.operation,
            model=self.service.model_name,
            params=self.prompts[0].params[0],
            num_choices=len(self.prompts[0].params),
            num_input_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_completion_tokens,
            finish_reasons=[choice.finish_reason for choice in self.choices if choice.finish_reason is not None],
            outcome=self.outcome,
        )


@contextmanager
def admitted(
    service: Service,
    record: RequestRecord,
    prompts: list[Prompt],
    new_text: Callable[[], TextStream],
    terms: Terms,
    new_reader: Callable[[], StoppedReader] | None = None,
    scoring: Scoring | None = None,
    operation: Literal["chat", "text_completion"] = "chat",
) -> Iterator[Work]:
    """All sequences of a request admitted, or none of them. Raises ApiError 429, 503. Leaving the block ends them.

    `new_text`: makes the text of each choice; `new_reader`: what finds thoughts and calls of tools in it.
    """
    caller = record.caller
    salt = caller.salt + (b"" if terms.cache_salt is None else b"/" + terms.cache_salt.encode())
    left_s = None if terms.timeout_s is None else record.started + terms.timeout_s - time.monotonic()
    if left_s is not None and left_s <= 0:
        record.outcome = "deadline"
        service.metrics.cancelled["deadline"].inc()
        raise deadline_exceeded()
    with ExitStack() as stack:
        spent = stack.enter_context(_reserved(service, caller.account, prompts))
        generation, submitted_at = None, time.monotonic()
        if prompts[0].params[0].max_tokens or scoring is not None:
            try:
                submission = service.engine.submit(
                    prompts,
                    salt,
                    terms.priority,
                    owner=caller.owner,
                    level=caller.level + max(terms.priority, 0),
                )
                generation = stack.enter_context(submission)
            except PlacesTaken as taken:
                raise service.full(taken) from None
            except (EngineDead, EngineStalled):
                refusal = service.refusal()
                assert refusal is not None
                raise refusal from None
        samples = [(sample, params) for prompt in prompts for sample, params in enumerate(prompt.params)]
        choices = [
            Choice(index, *sample, new_text(), None if new_reader is None else new_reader())
            for index, sample in enumerate(samples)
        ]
        work = Work(choices, prompts, generation, service, record, scoring, operation, submitted_at)
        if service.traces is not None:
            work.parent = service.traces.current()
        if left_s is not None and generation is not None:
            stack.callback(asyncio.get_running_loop().call_later(left_s, work.expire).cancel)
        _count(service, prompts)
        spent.prompt = sum(len(prompt.token_ids) for prompt in prompts)
        try:
            yield work
        finally:
            spent.generation = work.num_completion_tokens
            work.finish()


@dataclass(slots=True)
class _Spent:
    """Tokens."""

    prompt: int = 0
    generation: int = 0


@contextmanager
def _reserved(service: Service, account: Account | None, prompts: list[Prompt]) -> Iterator[_Spent]:
    """The most tokens that a request of a named key may use, given back but for those that are spent by the end. Raises
    ApiError 429."""
    spent = _Spent()
    if account is None:
        yield spent
        return
    most = sum(len(prompt.token_ids) + sum(params.max_tokens for params in prompt.params) for prompt in prompts)
    try:
        reserved = account.reserve(most, time.monotonic())
    except LimitReached as reached:
        raise service.limited(reached) from None
    try:
        yield spent
    finally:
        account.settle(reserved, spent.prompt, spent.generation, time.monotonic())


def _count(service: Service, prompts: list[Prompt]) -> None:
    metrics = service.metrics
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    metrics.prompt_tokens.inc(num_prompt)
    metrics.request_prompt_tokens.observe(num_prompt)
    metrics.request_n.observe(len(prompts[0].params))
    metrics.request_max_tokens.observe(prompts[0].params[0].max_tokens)
