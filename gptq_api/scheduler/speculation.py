"""How many drafted tokens of whom a step computes: as many as pay.

Nothing that is drafted changes a token (`step.Step`), it only costs rows. So what counts is how often a guess is right,
and that is known without computing anything: each sequence that could draft is guessed for in every step, and when its
tokens come they are compared with the guess, whether it was tried or not. A text that repeats nothing costs some
microseconds a step and no row.

A draft model (`model_drafts.py`) costs more than a guess from texts: it is asked only where it pays by how often it has
been right at each place of a draft, and where it did not, again once in a while, when asking costs little beside what
the sequence has cost since.

Only few sequences draft: where many decode, their rows are worth more than guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gptq_api.scheduler.drafts import DraftSource, Guess, PastAnswers, TextDrafts
from gptq_api.scheduler.judgement import MODEL, Judgement, drafting_of
from gptq_api.scheduler.model_drafts import ModelDrafts
from gptq_api.scheduler.sequence import Sequence
from gptq_api.step import Drafter, Launched, Runner

_MARGIN = 1.03
"""what a step with drafts has to bring more than one without, by the estimate"""
_PROBES = 0.03
"""of the time that a sequence takes: for asking a draft model that has not been worth it"""
_MOST_TO_COME = 256
"""tokens that a sequence is taken to get still, at most, where a draft model has to read its prompt first"""


def speculation_of(
    mode: Literal["off", "auto", "ngram"], runner: Runner[Launched], drafter: Drafter | None = None, block_size: int = 1
) -> Speculation | None:
    """What the setting says, for a runner; `block_size`: of its cache and the drafter's."""
    if mode == "off" or not runner.max_draft_rows:
        return None
    source = TextDrafts(PastAnswers() if mode == "auto" else None)
    model = None if drafter is None else ModelDrafts(drafter, runner.vocab_size, block_size)
    return Speculation(source, runner.max_draft_rows, runner.row_cost, runner.wait_cost, runner.context_cost, model)


@dataclass(slots=True, eq=False)
class _Candidate:
    seq: Sequence
    guess: Guess | None
    """None: the draft model has to be asked"""
    chances: list[float]
    """that the tokens up to this one are all right; as many as may be drafted"""

    @property
    def skipped(self) -> int:
        """How many of them are in flight. The draft model is asked when these are known."""
        return 0 if self.guess is None else self.seq.num_tokens_in_flight


class Speculation:
    """max_rows, row_cost, wait_cost: the runner's max_draft_rows and the like (step.py)."""

    def __init__(
        self,
        source: DraftSource,
        max_rows: int,
        row_cost: float,
        wait_cost: float = 0.0,
        context_cost: float = 0.0,
        model: ModelDrafts | None = None,
    ) -> None:
        self.source, self._max_rows, self._model = source, max_rows, model
        self._row_cost, self._wait_cost, self._context_cost = row_cost, wait_cost, context_cost
        self._judgement = Judgement(max_rows)

    def takes(self, num_decoding: int) -> bool:
        """Whether so many sequences may draft. Of many a row is worth more than a guess."""
        return 0 < num_decoding <= self._max_rows // 2

    def drafts(
        self, decoding: list[Sequence], most_rows: int, grow: Callable[[Sequence, int], bool] = lambda seq, num: True
    ) -> dict[Sequence, list[int]]:
        """What is drafted in a step of at most `most_rows`, in which these sequences decode: as few as `takes` allows,
        whose tokens are all known. `grow`: makes a sequence's block table long enough for so many tokens, or says no;
        a draft model writes there."""
        found, wanted = dict[Sequence, list[int]](), dict[Sequence, int]()
        for one, num in self._plan(decoding, min(most_rows, self._max_rows)).items():
            if one.guess is not None:
                found[one.seq] = one.guess.tokens[:num]
                drafting_of(one.seq).drafted_by = one.guess.source
            elif grow(one.seq, len(one.seq.token_ids) + num):
                wanted[one.seq] = num
        if wanted:
            assert self._model is not None
            for seq, tokens in self._model.draft(wanted).items():
                drafting, found[seq] = drafting_of(seq), tokens
                drafting.of_model, drafting.place_of_model, drafting.drafted_by = tokens, len(seq.token_ids), MODEL
        return found

    def had_better_wait(self, decoding: list[Sequence]) -> bool:
        """Whether the next step of these sequences, some of which have a token in flight, is better chosen when that is
        known: it will probably be what is guessed, and more behind it."""
        return bool(self._plan(decoding, self._max_rows))

    def _plan(self, decoding: list[Sequence], most_rows: int) -> dict[_Candidate, int]:
        """How many tokens of whom pay; none where a step follows a grammar, whose masks are for one row."""
        if any(seq.params.grammar for seq in decoding):
            return {}
        chosen, gain, texts = dict[_Candidate, int](), 1.0, self._candidates(decoding)
        if texts:
            chosen, gain = self._chosen(texts, len(decoding), most_rows)
        if self._model is not None and (mixed := self._with_model(decoding, texts)):
            others, better = self._chosen(mixed, len(decoding), most_rows)
            if better > gain:
                chosen, gain = others, better
        if gain > _MARGIN:
            return chosen
        return {} if self._model is None else self._probes(decoding, most_rows)

    def _candidates(self, decoding: list[Sequence]) -> list[_Candidate]:
        """Of those that something is guessed for from texts."""
        found: list[_Candidate] = []
        for seq in decoding:
            drafting = drafting_of(seq)
            place = len(seq.token_ids)
            if drafting.place != place:
                drafting.guess, drafting.place = self.source.guess(seq, self._max_rows), place
            guess = drafting.guess
            if guess is None:
                continue
            in_flight = seq.num_tokens_in_flight
            left = seq.params.max_tokens - seq.num_output_tokens  # a step with k drafts may bring k + 1
            most = min(left - 1, self._max_rows - len(decoding) + in_flight)
            if most > in_flight:
                found.append(_Candidate(seq, guess, self._judgement.chances(drafting, guess, most)))
        return found

    def _with_model(self, decoding: list[Sequence], texts: list[_Candidate]) -> list[_Candidate]:
        """Those for whom the draft model is better asked, and the texts' of the others; none where nobody is."""
        of_texts, found, asks = {one.seq: one for one in texts}, list[_Candidate](), False
        for seq in decoding:
            text, model = of_texts.get(seq), self._of_model(seq, len(decoding))
            if model is not None:
                gain, debt = self._gain(model), self._debt(seq)
                to_come = min(_MOST_TO_COME, seq.params.max_tokens - seq.num_output_tokens)
                if to_come * (1 - 1 / gain) > debt and (text is None or gain > self._gain(text)):
                    found.append(model)
                    asks = True
                    continue
            if text is not None:
                found.append(text)
        return found if asks else []

    def _of_model(self, seq: Sequence, num_decoding: int) -> _Candidate | None:
        """What the draft model would probably bring when the sequence's tokens are all known."""
        assert self._model is not None
        in_flight = seq.num_tokens_in_flight
        left = seq.params.max_tokens - seq.num_output_tokens - in_flight
        most = min(left - 1, self._max_rows - num_decoding, self._model.most(seq, len(seq.token_ids) + in_flight))
        if most < 1:
            return None
        return _Candidate(seq, None, self._judgement.chances_of_model(drafting_of(seq), most))

    def _debt(self, seq: Sequence) -> float:
        """The cost of what the draft model has to compute before it can guess, beyond a row or two."""
        assert self._model is not None
        return self._model.drafter.row_cost * max(0, self._model.num_missing(seq) - 2)

    def _gain(self, one: _Candidate) -> float:
        return self._chosen([one], 1, self._max_rows)[1]

    def _probes(self, decoding: list[Sequence], most_rows: int) -> dict[_Candidate, int]:
        """Who is guessed for all the same, one token each: whether it is right tells how good the rest would be."""
        assert self._model is not None
        drafter, found = self._model.drafter, dict[_Candidate, int]()
        once = self._wait_cost + drafter.call_cost + drafter.step_cost
        for seq in decoding:
            num_since = len(seq.token_ids) - max(seq.num_prompt_tokens, drafting_of(seq).place_of_model)
            if num_since * _PROBES <= once + self._row_cost or len(decoding) + len(found) >= most_rows:
                continue
            one = self._of_model(seq, len(decoding))
            if one is not None and num_since * _PROBES > once + self._row_cost + self._debt(seq):
                found[one] = 1
        return found

    def _chosen(
        self, candidates: list[_Candidate], num_decoding: int, most_rows: int
    ) -> tuple[dict[_Candidate, int], float]:
        """(how many tokens of whom pay most, how many times as many tokens they bring in the same time).

        Row by row the likeliest goes first, as long as it raises tokens over cost. Of a sequence with a token in flight
        the first token guessed from texts is that; its drafts stand behind it, and take rows only where it is right.
        The draft model takes a step for each token of the longest draft.
        """
        plain_cost = 1 + self._row_cost * (num_decoding - 1)
        tokens, cost, left = float(num_decoding), plain_cost + self._wait_cost, max(0, most_rows - num_decoding)
        rows = []
        for one in candidates:
            taken_with = one.chances[one.skipped - 1] if one.skipped else 1.0
            rows += [(chance / taken_with, chance, taken_with, one) for chance in one.chances[one.skipped :]]
        rows.sort(key=lambda row: -row[0])
        chosen, deepest = dict[_Candidate, int](), 0
        for _, chance, taken_with, one in rows:
            num = chosen.get(one, 0)
            row_cost = (self._row_cost + self._context_cost * len(one.seq.token_ids)) * taken_with
            if one.guess is None and num == deepest:
                assert self._model is not None
                row_cost += self._model.drafter.step_cost + (0 if deepest else self._model.drafter.call_cost)
            if not left or chance * cost <= tokens * row_cost:
                break
            tokens, cost, left = tokens + chance, cost + row_cost, left - 1
            chosen[one] = num + 1
            if one.guess is None:
                deepest = max(deepest, num + 1)
        return chosen, tokens / cost / (num_decoding / plain_cost)

    def learn(self, seq: Sequence, num_before: int, num_drafted: int, num_accepted: int) -> None:
        """The sequence has got tokens, from place `num_before` on: was the guess right? `num_accepted` of them had been
        drafted, among `num_drafted`."""
        self._judgement.learn(seq, num_before, num_drafted, num_accepted)

    def ended(self, seq: Sequence) -> None:
        """A sequence has finished, or was aborted."""
        self.source.ended(seq)
        seq.drafting = None
