"""Log-probabilities of the prompts of a request: gathered as the engine tells them, spelled once all of a prompt are
there, and until then nothing is said of its choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gptq_api.api.answers.logprobs import TokenEntry, completion_logprobs, shown_logprob, token_text
from gptq_api.api.service import Service
from gptq_api.engine.client import Prompt
from gptq_api.engine.generation import Delta
from gptq_api.text.stream import TextStream
from gptq_api.text.tokens import Tokens
from gptq_api.types import PromptLogprobs, TokenLogprobs

Columns = dict[str, list[Any] | None]
Told = list[tuple[TokenLogprobs, int]]
"""log-probabilities and rank of each token of a prompt but the first"""


@dataclass(slots=True)
class ScoredPrompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str
    """as the answer begins with it, where it does"""
    choices: range
    """which choices follow it; the engine tells its log-probabilities with the first of them"""
    echo: Columns | None = None
    """OpenAI's columns, as `completion_logprobs` has them; for an answer that begins with the prompt"""
    listed: list[Any] | None = None
    """vLLM's `prompt_logprobs`: null, then {token id: {logprob, rank, decoded_token}} of each token, its own first"""
    is_spelled: bool = False
    told: list[PromptLogprobs] = field(default_factory=list)
    num_told: int = 1
    """tokens; nothing is told of the first"""
    held: dict[int, Delta] = field(default_factory=dict)
    """by choice, what came of it meanwhile"""


class Scoring:
    """All prompts of a request. `num_echoed`, `num_listed`: how many most likely tokens of each are told in `echo` and
    `listed`; None: there is no such thing to tell."""

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        num_echoed: int | None,
        num_listed: int | None,
    ) -> None:
        self._service, self.num_echoed, self.num_listed = service, num_echoed, num_listed
        self.prompts: list[ScoredPrompt] = []
        self.of_choice: list[ScoredPrompt] = []
        for prompt, text in zip(prompts, texts, strict=True):
            first = len(self.of_choice)
            choices = range(first, first + len(prompt.params))
            self.prompts.append(ScoredPrompt(prompt.token_ids, text, choices))
            self.of_choice += [self.prompts[-1]] * len(choices)

    @property
    def is_waiting(self) -> bool:
        """Whether something is still to be told of a prompt."""
        return not all(prompt.is_spelled for prompt in self.prompts)

    async def take(self, deltas: list[Delta]) -> list[Delta]:
        """What may be told now: of choices whose prompt is. A choice of a prompt whose logits were not finite ends with
        "error"."""
        released: list[Delta] = []
        for delta in deltas:
            prompt = self.of_choice[delta.choice]
            for part in delta.prompt:
                prompt.told.append(part)
                prompt.num_told += len(part.ranks) // 4
            if prompt.num_told == len(prompt.token_ids) and not prompt.is_spelled:
                await self._service.in_text_thread(partial(self._spell, prompt))
                released += prompt.held.values()
                prompt.held.clear()
                if _is_sick(prompt):
                    delta = Delta(delta.choice, finish_reason="error")
            if prompt.is_spelled or delta.finish_reason in ("error", "too_complex"):
                released.append(delta)
            elif delta.choice in prompt.held:
                _merge(prompt.held[delta.choice], delta)
            else:
                prompt.held[delta.choice] = delta
        return released

    def _spell(self, prompt: ScoredPrompt) -> None:
        told = [entry for part in prompt.told for entry in part.unpacked()]
        if self.num_echoed is not None:
            prompt.echo = echoed(self._service.tokenizer, prompt.token_ids, prompt.text, told, self.num_echoed)
        if self.num_listed is not None:
            prompt.listed = listed(self._service.tokenizer, prompt.token_ids, told, self.num_listed)
        prompt.is_spelled = True


def _is_sick(prompt: ScoredPrompt) -> bool:
    return any(math.isnan(value) for part in prompt.told for value in memoryview(part.logprobs).cast("f"))


def _merge(held: Delta, delta: Delta) -> None:
    held.tokens += delta.tokens
    held.logprobs += delta.logprobs
    held.finish_reason = delta.finish_reason


def echoed(tokenizer: Tokens, ids: list[int], text: str, told: Told, num_top: int) -> Columns:
    """The columns of a prompt that stands at the head of an answer as `text`."""
    offsets = text_offsets(tokenizer, ids, text)
    entries = [
        TokenEntry(token, offset, logprobs)
        for token, offset, (logprobs, _) in zip(ids[1:], offsets[1:], told, strict=True)
    ]
    columns = completion_logprobs(tokenizer, entries, num_top)
    first = {"tokens": token_text(tokenizer, ids[0]), "text_offset": offsets[0]}
    return {name: None if column is None else [first.get(name), *column] for name, column in columns.items()}


def text_offsets(tokenizer: Tokens, ids: list[int], text: str) -> list[int]:
    """Where in `text` each token of a prompt begins. A BOS that we put before the text has no place of its own."""
    first = ids[0]
    hidden = first == tokenizer.bos_token_id and not text.startswith(token_text(tokenizer, first))
    stream = TextStream(tokenizer, skip_special=False)
    starts = [stream.push_token(token)[1] for token in ids[hidden:]]
    return [min(start, len(text)) for start in [0] * hidden + starts]


def listed(tokenizer: Tokens, ids: list[int], told: Told, num_top: int) -> list[Any]:
    """The prompt's tokens in vLLM's shape."""
    found: list[Any] = [None]
    for token, (logprobs, rank) in zip(ids[1:], told, strict=True):
        entry = {str(token): _listed(tokenizer, token, logprobs.logprob, rank)}
        for place, (likely, logprob) in enumerate(logprobs.top[:num_top], 1):
            entry.setdefault(str(likely), _listed(tokenizer, likely, logprob, place))
        found.append(entry)
    return found


def _listed(tokenizer: Tokens, token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": shown_logprob(logprob), "rank": rank, "decoded_token": token_text(tokenizer, token)}
