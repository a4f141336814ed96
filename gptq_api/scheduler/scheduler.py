"""Continuous batching: which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase: a step moves num_computed_tokens towards len(token_ids). A sequence one
token behind is decoding, one further behind is being prefilled, a preempted one is far behind again.
Membership in `waiting` or `running` is the status. Pure Python; knows neither tensors nor text nor clocks.

A step may be scheduled before the tokens of the one before it are known. Then a sequence has a token in flight: one
more to compute, without a value here. It costs one surplus step where that token turns out to be a stop token; a
sequence that reaches max_tokens is known beforehand. Blocks and seats are given back at once, whatever is in flight:
steps run in the order in which they are scheduled, so the next owner writes after the last one read.

With a `Speculation` a sequence that decodes may get rows more, for tokens that are guessed behind its last one. How
many of them count is known with the result of the step, and so is how many tokens of the sequence have been computed.
Guessing takes known tokens: while it pays, nothing is scheduled as long as a step is in flight.

Where a runner wants prompts apart, a step has rows of prompts or of answers, in turn, and no others. What a sequence
had answered before it was preempted is computed once more as an answer. Only blocks of prompts are found by others
then, for what an answer left in the cache is not to the last bit what a prompt with the same tokens leaves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from gptq_api.scheduler.blocks import BlockManager, CacheListener, block_hash
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.shared_steps import SharedSteps
from gptq_api.scheduler.shares import in_background, who_leaves_a_seat, who_leaves_blocks, who_loses_its_blocks
from gptq_api.scheduler.speculation import Speculation
from gptq_api.scheduler.step_budget import StepBudget
from gptq_api.scheduler.waiting import WaitingQueue
from gptq_api.step import MAX_ROWS_AGAIN, Admission, NewBlocks, PromptCosts, PromptRows, Sampled, Step
from gptq_api.types import FinishReason, PromptLogprobs, SamplingParams


@dataclass(slots=True)
class Counters:
    """Running totals since start."""

    preemptions: int = 0
    prefix_queries: int = 0
    """prompt tokens looked up in the prefix cache"""
    prefix_hits: int = 0
    """prompt tokens found there"""
    drafts: int = 0
    """times that tokens were drafted for a sequence"""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    """drafted tokens that sequences got"""


@dataclass(slots=True)
class Progress:
    """What a step brought: columns of one entry per token, in order."""

    sequence_ids: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """where each token stands in Sampled.tokens"""
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """sequence id -> prompt tokens found in the prefix cache, of those that got their first token"""
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    """by sequence id"""
    drafted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """sequence id -> (accepted, rejected) drafted tokens by now, of those that had any in this step"""
    predicted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """the same of those that its prediction suggested"""
    finished: dict[int, FinishReason] = field(default_factory=dict)
    """by sequence id; these hold no memory any more"""


class _Kind(Enum):
    """What a step has rows of."""

    ANY = auto()
    PROMPTS = auto()
    ANSWERS = auto()


_Pending = list[tuple[Sequence, int]]
"""with the tokens that each has to compute"""


class Scheduler:
    """`add`, `abort`, and per step `schedule` (decide) and `update` (digest). Sequences stay in here.

    max_num_seqs: sequences in one step; max_num_batched_tokens: tokens in one step; row_multiple: what their number is
    best a multiple of, where they are many; shared_rows: sequences that decode in one step while several owners share
    it, which is also small (None: all); speculation: what is drafted (None: nothing); prompt_costs: what the runner
    says of them; prompts_apart: whether a step has either prompts or answers.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        row_multiple: int = 1,
        shared_rows: int | None = None,
        speculation: Speculation | None = None,
        prompt_costs: PromptCosts | None = None,
        prompts_apart: bool = False,
    ) -> None:
        self.blocks, self._speculation = blocks, speculation
        self._step_budget = StepBudget(max_num_batched_tokens, row_multiple, prompt_costs)
        self._prompts_apart, self._last_kind = prompts_apart, _Kind.ANSWERS
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting = WaitingQueue()
        self._shared_steps = SharedSteps(shared_rows)
        self.running: list[Sequence] = []  # in the order of their admission
        self._num_added = 0
        self._live: dict[int, Sequence] = {}
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))
        self._in_flight: deque[list[Sequence]] = deque()  # those of each scheduled step, in its order
        self._num_drafted_steps = 0  # of them
        # who was not admitted for lack of blocks, and how many have to be free for it
        self._short: tuple[Sequence, int] | None = None
        self._budget = max_num_batched_tokens  # less for a while after the device had no memory for a step
        self.counters = Counters()

    def add(
        self,
        first_id: int,
        token_ids: list[int],
        params: tuple[SamplingParams, ...],
        cache_salt: bytes = b"",
        priority: int = 0,
        *,
        owner: bytes = b"",
        level: int = 0,
        prediction: list[int] | None = None,
    ) -> bool:
        """Queue a sequence for each of `params`, with the ids from `first_id` on. False, and none is queued, where one
        could never finish, even alone in the cache: admission should have refused them.

        The lowest `level` comes first; within it owners take turns, and of an owner the lowest `priority` comes first.
        `prediction`: what the answers may look like.
        """
        longest = len(token_ids) + max(one.max_tokens for one in params)
        if not token_ids or longest > self.blocks.num_blocks * self.blocks.block_size:
            return False
        hashes: list[bytes] = []
        for sequence_id, one in enumerate(params, first_id):
            place = (level, priority, self._num_added)
            seq = Sequence(sequence_id, token_ids, one, cache_salt, owner, place, hashes, shares_prompt=len(params) > 1)
            seq.prediction = prediction or []
            self.waiting.add(seq)
            self._num_added += 1
            self._live[sequence_id] = seq
        return True

    def _is_live(self, seq: Sequence) -> bool:
        """Whether it is waiting or running still, and not finished or aborted while its token was in flight."""
        return self._live.get(seq.sequence_id) is seq

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is; unknown ids (already finished) are ignored."""
        seq = self._live.pop(sequence_id, None)
        if seq is not None:
            (self.waiting if seq.seat < 0 else self.running).remove(seq)
            self._give_back(seq)
            if self._speculation is not None:
                self._speculation.ended(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Step:
        """Choose the tokens of one step, which counts as computed from here on; at least one whenever there is work
        and no token in flight."""
        if self._num_drafted_steps:  # how far its sequences are is not known, and without them a step would be small
            return _nothing()
        if not self._prompts_apart:
            return self._choose(_Kind.ANY)
        kinds = [_Kind.PROMPTS, _Kind.ANSWERS]
        for kind in kinds if self._last_kind is _Kind.ANSWERS else reversed(kinds):
            step = self._choose(kind)
            if step.seats:
                self._last_kind = kind
                break
        return step

    def _choose(self, kind: _Kind) -> Step:
        taken: dict[Sequence, int] = {}
        has_room = kind is not _Kind.ANSWERS and self._make_room()
        decoding, all_prompts = self._pending(kind)
        prompts = [pair for pair in all_prompts if not in_background(pair[0])] or all_prompts
        self._shared_steps.begin_step(self.waiting.num_owners)
        decoding = self._shared_steps.chosen(decoding, beside_prompts=has_room or bool(prompts))
        drafts: dict[Sequence, list[int]] = {}
        speculation = None if kind is _Kind.ANSWERS and self._last_kind is _Kind.PROMPTS else self._speculation
        if speculation is not None and not prompts and not has_room and speculation.takes(len(decoding)):
            alone = [seq for seq, _ in decoding]
            if not self._in_flight:
                drafts = speculation.drafts(alone, self._budget, self._grow_for_drafts)
            elif speculation.had_better_wait(alone):
                return _nothing()
        budget = min(self._num_rows(kind, len(decoding), prompts), self._budget)
        budget = min(budget, len(decoding) + self._shared_steps.most_prompt_tokens(budget))
        if drafts:
            budget = self._budget
        kept = self._kept_for_a_newcomer(budget - len(decoding), prompts) if has_room and prompts else 0
        preempted: set[Sequence] = set()
        # Running before waiting: a token owed beats a token promised, and one of an answer one of a prompt. A prompt in
        # chunks takes whatever budget it finds, so none of its owner's is admitted behind it until it is done.
        num_left = len(prompts)
        for seq, num_pending in decoding + prompts:
            most = budget
            if num_pending > 1:
                most = min(budget, max(1, (budget - kept) // num_left))  # each has the same part
                num_left -= 1
            if budget == 0:
                break
            if seq in preempted:
                continue
            n = min(num_pending, most) + len(drafts.get(seq, ()))
            while not self.blocks.grow(seq.block_table, seq.num_computed_tokens + n):
                if drafts.pop(seq, None):  # a guess is worth nobody's memory
                    n = num_pending
                    continue
                victim = who_loses_its_blocks(self.running, self.waiting.num_owners, self.blocks)
                self.preempt(victim)
                preempted.add(victim)
                budget += taken.pop(victim, 0)
                if victim is seq:
                    break
            else:
                taken[seq] = n
                budget -= n
        step = _nothing()
        self._in_flight.append([])
        for seq, n in taken.items():
            if seq in drafts:
                step.drafts[len(step.seats)] = drafts[seq]
            self._commit(step, seq, n)  # only now: until here any of them could still be preempted
        self._num_drafted_steps += bool(step.drafts)

        unfinished = {seq.owner for seq, num in all_prompts if taken.get(seq, 0) < num}
        open_to_all = kind is not _Kind.ANSWERS and not preempted and not step.drafts
        while open_to_all and budget and len(self.running) < self.max_num_seqs:
            first = self.waiting.first()
            # a preempted one is admitted when all its tokens are known
            if first is None or first.num_tokens_in_flight or first.owner in unfinished:
                break
            seq = first
            num_cached = self._share_prefix(seq)
            n = min(self._num_in_steps_of_prompts(seq) - num_cached, budget)
            # One spare block per running sequence, or we would preempt in the very next steps.
            if not self.blocks.grow(seq.block_table, num_cached + n, keep_free=len(self.running)):
                needed = self.blocks.num_needed(seq.block_table, num_cached + n)
                self._short = seq, needed + len(self.running)
                self.blocks.release(seq.block_table)
                break
            self._short = None
            self.waiting.take()
            self.running.append(seq)
            seq.seat = self._free_seats.pop()
            seq.num_computed_tokens = num_cached
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = num_cached
                self.counters.prefix_queries += seq.num_prompt_tokens
                self.counters.prefix_hits += num_cached
            step.admitted.append(Admission(seq.seat, list(seq.token_ids), seq.num_prompt_tokens, seq.params))
            self._commit(step, seq, n)
            budget -= n
        if not step.seats:
            self._in_flight.pop()
        return step

    def _pending(self, kind: _Kind) -> tuple[_Pending, _Pending]:
        """(who decodes, who has more than one token to compute); in a step of prompts all are of the second sort."""
        if kind is _Kind.PROMPTS:
            left = [(seq, seq.num_prompt_tokens - seq.num_computed_tokens) for seq in self.running]
            return [], [(seq, num) for seq, num in left if num > 0]
        pending = [(seq, seq.num_pending_tokens) for seq in self.running]
        if kind is _Kind.ANSWERS:
            pending = [(seq, num) for seq, num in pending if seq.num_computed_tokens >= seq.num_prompt_tokens]
        # of 0 the last token is in flight, or nobody knows
        return [(seq, num) for seq, num in pending if num == 1], [(seq, num) for seq, num in pending if num > 1]

    def _num_rows(self, kind: _Kind, num_decoding: int, prompts: _Pending) -> int:
        """At most, in a step of `num_decoding` and of these prompts, or parts of answers."""
        if kind is _Kind.ANSWERS:
            return num_decoding + MAX_ROWS_AGAIN
        beside = num_decoding
        if kind is _Kind.PROMPTS:  # who decodes has the next step to itself, and waits for this one all the same
            beside = sum(seq.num_computed_tokens >= seq.num_prompt_tokens for seq in self.running)
        context = max((seq.num_computed_tokens for seq, _ in prompts), default=0)
        num_rows = self._step_budget.num_rows(beside, len(prompts) + len(self.waiting), context)
        return num_rows if kind is _Kind.ANY else max(1, num_rows - beside)

    def _note_time(self, step: Step, milliseconds: float) -> None:
        """What the step took, to those who say how large steps may be. Answers that are computed once more are not
        prompts: their rows take longer. Nor does a prompt alone tell what one takes beside others, where they share
        steps: a small one is over before the device is busy."""
        num_decoding, num_rows, context = 0, 0, 0
        if step.num_tokens == len(step.seats):
            self._step_budget.took(milliseconds, len(step.seats), 0, 0.0)
            return
        for seq, start, num in zip(self._in_flight[0], step.num_computed, step.num_new, strict=True):
            if num == 1:
                num_decoding += 1
            elif start + num > self._num_in_steps_of_prompts(seq):
                return
            else:
                num_rows, context = num_rows + num, context + num * (start + num // 2)
        if num_decoding or self._prompts_apart:
            self._step_budget.took(milliseconds, num_decoding, num_rows, context / num_rows)

    def _num_in_steps_of_prompts(self, seq: Sequence) -> int:
        """Of its known tokens: where prompts are apart, those of its prompt."""
        return seq.num_prompt_tokens if self._prompts_apart else len(seq.token_ids)

    def _make_room(self) -> bool:
        """Where the next to be admitted lacks a seat, or blocks as was found when it was tried, sequences of owners
        that hold more than their share go back to waiting: one for a seat, as many as it takes for blocks. False where
        it lacks them still, as far as is known."""
        seq = self.waiting.first()
        if seq is None:
            return False
        num_owners = self.waiting.num_owners
        if len(self.running) >= self.max_num_seqs:
            victim = who_leaves_a_seat(seq, self.running, num_owners, self.max_num_seqs)
            if victim is None:
                return False
            self.preempt(victim)
        if self._short is not None and self._short[0] is seq:
            while (missing := self._short[1] - self.blocks.num_free) > 0:
                victim = who_leaves_blocks(seq, self.running, num_owners, self.blocks, missing)
                if victim is None:
                    return False
                self.preempt(victim)
        return self.waiting.first() is seq

    def _kept_for_a_newcomer(self, budget: int, prompts: list[tuple[Sequence, int]]) -> int:
        """How many of the tokens that are left for prompts go to the next to be admitted, where it is of an owner none
        of whose prompts is being computed: its part, or as many as it has."""
        seq = self.waiting.first()
        if seq is None or seq.num_tokens_in_flight or len(self.running) >= self.max_num_seqs:
            return 0
        if any(prompt.owner == seq.owner or prompt.rank[0] < seq.rank[0] for prompt, _ in prompts):
            return 0
        behind = not in_background(seq) and in_background(prompts[0][0])  # where one is, all are
        part = budget - len(prompts) if behind else budget // (len(prompts) + 1)
        return max(0, min(len(seq.token_ids), part))

    def _grow_for_drafts(self, seq: Sequence, num_tokens: int) -> bool:
        """Where that takes no block that somebody who decodes might need in this step."""
        return self.blocks.grow(seq.block_table, num_tokens, keep_free=len(self.running))

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's memory; what it has so far becomes a longer prompt."""
        self.running.remove(seq)
        self.waiting.add(seq)
        self._give_back(seq)
        seq.num_computed_tokens = 0
        self.counters.preemptions += 1

    def withdraw(self, step: Step) -> list[int]:
        """Undo `schedule` for the step it chose last, which could not be launched, and choose half as many tokens from
        now on: one more with every step that succeeds. Returns the ids of the step's sequences."""
        size = self.blocks.block_size
        sequences = self._in_flight.pop()
        self._num_drafted_steps -= bool(step.drafts)
        for seq, start, num_sampled in zip(sequences, step.num_computed, step.num_sampled, strict=True):
            self.blocks.discard(seq.block_hashes[start // size : seq.num_known_computed_tokens // size])
            seq.num_computed_tokens = start
            seq.num_tokens_in_flight -= num_sampled
            seq.num_told_blocks = 0
        for entry, rows in step.prompt_rows.items():
            sequences[entry].num_scored_rows = rows.first
        for _ in step.admitted:  # they may share blocks that this step was to write
            self.preempt(self.running[-1])
        self._budget = max(1, step.num_tokens // 2)
        return [seq.sequence_id for seq in sequences]

    def update(self, step: Step, sampled: Sampled, seconds: float | None = None) -> Progress:
        """Take in the result of the step scheduled longest ago. `seconds`: that the device had to do with it.

        Tokens of sequences that are gone are dropped; one that was preempted meanwhile gets its tokens.
        """
        if seconds is not None and self._step_budget.learns and not step.drafts:
            self._note_time(step, 1e3 * seconds)
        self._budget = min(self._budget + 1, self.max_num_batched_tokens)
        self._num_drafted_steps -= bool(step.drafts)
        progress, done, place = Progress(), set[Sequence](), 0
        sick = min(sampled.tokens, default=0) < 0
        columns = zip(self._in_flight.popleft(), step.num_sampled, sampled.num_tokens, strict=True)
        for entry, (seq, most, num) in enumerate(columns):
            seq.num_tokens_in_flight -= most
            places, place = range(place, place + num), place + num
            if sick and any(sampled.tokens[i] < 0 for i in places):
                self.blocks.discard(seq.block_hashes)
            if not self._is_live(seq):
                continue
            if seq.seat >= 0:
                seq.num_computed_tokens -= most - num
            if entry in sampled.prompt_logprobs:
                progress.prompt_logprobs[seq.sequence_id] = sampled.prompt_logprobs[entry]
            num_before = len(seq.token_ids)
            reason = self._take(seq, sampled.tokens, places, progress)
            if seq.drafting is not None and seq.drafting.is_guessed:
                self._learn(seq, num_before, len(step.drafts.get(entry, ())), num, progress)
            if reason is not None:
                progress.finished[seq.sequence_id] = reason
                done.add(seq)
                del self._live[seq.sequence_id]
        if done:
            self.running = [seq for seq in self.running if seq not in done]
            for seq in done:
                if seq.seat < 0:
                    self.waiting.remove(seq)
                self._give_back(seq)
                if self._speculation is not None:
                    self._speculation.ended(seq)
        return progress

    def _learn(self, seq: Sequence, num_before: int, num_drafted: int, num_sampled: int, progress: Progress) -> None:
        """What became of what was guessed for a sequence, which has got tokens behind the first `num_before`."""
        assert self._speculation is not None and seq.drafting is not None
        num_accepted = min(len(seq.token_ids) - num_before, max(0, num_sampled - 1))
        self._speculation.learn(seq, num_before, num_drafted, num_accepted)
        if num_drafted:
            self.counters.drafts += 1
            self.counters.draft_tokens += num_drafted
            self.counters.accepted_tokens += num_accepted
            progress.drafted[seq.sequence_id] = seq.drafting.drafted.told
            if seq.drafting.predicted.num:
                progress.predicted[seq.sequence_id] = seq.drafting.predicted.told

    def _take(self, seq: Sequence, tokens: list[int], places: range, progress: Progress) -> FinishReason | None:
        """Append tokens until one ends the sequence; those behind it are surplus."""
        if not places:
            return None
        place, token = places.start, tokens[places.start]
        if token < 0:
            return "error" if token == -1 else "too_complex"
        if seq.num_output_tokens == 0:
            progress.cached_tokens[seq.sequence_id] = seq.num_cached_tokens or 0
        if len(places) > 1:
            return self._take_many(seq, tokens, places, progress)
        if seq.params.max_tokens == 0:  # sampled to see that its logits are finite
            return "length"
        progress.sequence_ids.append(seq.sequence_id)
        progress.tokens.append(token)
        progress.places.append(place)
        num_known = seq.num_known_computed_tokens
        seq.append(token)
        self._register(seq, num_known)
        if token in seq.params.stop_token_ids:
            return "stop"
        return "length" if seq.num_output_tokens >= seq.params.max_tokens else None

    def _take_many(self, seq: Sequence, tokens: list[int], places: range, progress: Progress) -> FinishReason | None:
        """The same for several, of which the first is a token."""
        reason: FinishReason | None = None
        num_known, got = seq.num_known_computed_tokens, list[int]()
        left, stops = seq.params.max_tokens - seq.num_output_tokens, seq.params.stop_token_ids
        for token in tokens[places.start : places.stop]:
            if token < 0:
                reason = "error" if token == -1 else "too_complex"
                break
            got.append(token)
            if token in stops:
                reason = "stop"
                break
            if len(got) == left:
                reason = "length"
                break
        progress.sequence_ids += [seq.sequence_id] * len(got)
        progress.tokens += got
        progress.places += places[: len(got)]
        seq.extend(got)
        self._register(seq, num_known)
        return reason

    def _give_back(self, seq: Sequence) -> None:
        """Blocks and seat."""
        self.blocks.release(seq.block_table)
        seq.num_told_blocks, seq.draft_cache = 0, None
        if seq.seat >= 0:
            self._free_seats.append(seq.seat)
            self.waiting.seat_returned(seq.owner)
            seq.seat = -1

    def _commit(self, step: Step, seq: Sequence, num_new_tokens: int) -> None:
        """Enter a sequence into the step, and let others find its blocks that are full once the step has run."""
        num_sampled = max(0, 1 + num_new_tokens - seq.num_pending_tokens)
        self._in_flight[-1].append(seq)
        step.seats.append(seq.seat)
        step.num_computed.append(seq.num_computed_tokens)
        step.num_new.append(num_new_tokens)
        step.num_sampled.append(num_sampled)
        told = seq.num_told_blocks
        if told < len(seq.block_table):
            step.new_blocks.append(NewBlocks(seq.seat, told, seq.block_table[told:]))
            seq.num_told_blocks = len(seq.block_table)
        if seq.num_unscored_rows > 0:
            self._score(step, seq, num_new_tokens)
        num_known = seq.num_known_computed_tokens
        seq.num_computed_tokens += num_new_tokens
        seq.num_tokens_in_flight += num_sampled
        self._register(seq, num_known)

    def _score(self, step: Step, seq: Sequence, num_new_tokens: int) -> None:
        """Of the sequence that entered the step last: the rows whose logprobs nobody has been told."""
        assert seq.params.prompt_logprobs is not None
        first = max(seq.num_computed_tokens, seq.num_scored_rows)
        num = min(seq.num_computed_tokens + num_new_tokens, seq.num_prompt_tokens - 1) - first
        if num > 0:
            step.prompt_rows[len(step.seats) - 1] = PromptRows(first, num, seq.params.prompt_logprobs)
            seq.num_scored_rows += num

    def _share_prefix(self, seq: Sequence) -> int:
        """Give a sequence without blocks the longest prefix the cache holds; returns its length in tokens.

        At least one token is left to compute, because only computing it yields logits; and all rows whose logprobs are
        still to be told.
        """
        if not self.enable_prefix_caching:
            return 0
        known = seq.num_scored_rows if seq.num_unscored_rows > 0 else self._num_in_steps_of_prompts(seq) - 1
        num_usable = known // self.blocks.block_size
        self._hash_blocks(seq, num_usable)
        return self.blocks.share(seq.block_table, seq.block_hashes[:num_usable]) * self.blocks.block_size

    def _register(self, seq: Sequence, num_known_before: int) -> None:
        """Let others find the blocks that have become full of known tokens.

        A sequence scheduled later into the same step may already share them: in every layer the step writes all its
        K/V before attention reads any.
        """
        if not self.enable_prefix_caching:
            return
        size = self.blocks.block_size
        known = seq.num_known_computed_tokens
        if self._prompts_apart:
            known = min(known, seq.num_prompt_tokens)
        first, last = num_known_before // size, known // size
        if last > first:
            self._hash_blocks(seq, last)
            new = [i for i in range(first, last) if self.blocks.register(seq.block_table[i], seq.block_hashes[i])]
            if new and self.blocks.listener is not None:
                self._tell_stored(self.blocks.listener, seq, new)

    def _tell_stored(self, listener: CacheListener, seq: Sequence, new: list[int]) -> None:
        """`new`: places of its blocks that can be found from now on; between them may be some that others brought."""
        size, hashes = self.blocks.block_size, seq.block_hashes
        begin = 0
        for end in range(1, len(new) + 1):
            if end == len(new) or new[end] != new[end - 1] + 1:
                first, last = new[begin], new[end - 1] + 1
                parent = hashes[first - 1] if first else None
                listener.stored(hashes[first:last], parent, seq.token_ids[first * size : last * size])
                begin = end

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> None:
        """Extend seq.block_hashes to its first `num_blocks` blocks."""
        size, hashes = self.blocks.block_size, seq.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else seq.cache_salt
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))


def _nothing() -> Step:
    return Step([], [], [], [], [], [])
