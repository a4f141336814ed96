"""A step in, sampled tokens out: on the CPU, and on CUDA what its kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from gptq_api.runner.cpu import native, native_sampler, sampler
from gptq_api.runner.cpu.attention import Span
from gptq_api.runner.cpu.forward import PlainLlama
from gptq_api.runner.cpu.native_forward import NativeLlama
from gptq_api.runner.cpu.prompt_logprobs import SLICE_ROWS, in_torch, packed, scored
from gptq_api.runner.seats import Seat, Seats
from gptq_api.step import DeviceMemoryError, Drafter, Masks, PromptCosts, PromptRows, Sampled, Step
from gptq_api.types import ModelFacts, PromptLogprobs, TokenLogprobs

_NO_MEMORY = "DefaultCPUAllocator"
"""in what torch says where the system gives it no memory, as a plain RuntimeError"""


@dataclass(slots=True)
class Computed:
    """A step whose logits are there, and with `sampled` what came of them."""

    step: Step
    logits: Tensor | None = None
    """float32 [R, V], until the step has sampled: a row of each entry that samples, then those of the drafts, entry by
    entry"""
    sampling: list[int] = field(default_factory=list)
    """the entries that sample"""
    seats: list[Seat] = field(default_factory=list)
    """theirs"""
    scores: dict[int, PromptLogprobs] = field(default_factory=dict)
    """of the prompts' rows"""
    sampled: Sampled | None = None


SHARED_ROWS = 8
"""Of a 1.1B model on two cores so many rows take 2.2 times as long as one, and make three quarters of the tokens per
second that 16 rows make; of the demo more rows make no more of them."""


MAX_DRAFT_ROWS = 8
"""any number of rows have the bits that each has alone; more cost more than they bring"""


ROW_COST, SMALL_MODEL_ROW_COST = 0.12, 0.42
"""what a row more adds to a step of one, of weights that come from memory and of such that the caches hold, which take
their time to compute (`benchmarks/speculation.py`)"""
SMALL_MODEL_BYTES = 64 * 2**20


class CpuRunner:
    """A loaded model and its KV cache. Not thread-safe: one caller steps it."""

    lookahead = 0
    num_graphs = 0
    row_multiple = 1
    prompt_costs: PromptCosts | None = None  # steps are limited by their rows
    shared_rows: int | None = SHARED_ROWS
    prompts_apart = False
    wait_cost = 0.0
    missing_rank: int | None = None

    def __init__(self, model: PlainLlama | NativeLlama, max_model_len: int, dtype: torch.dtype) -> None:
        self._model, self._seats, cache = model, Seats(), model.cache
        self.max_model_len, self.ahead = max_model_len, model.ahead
        self.vocab_size = model.config.vocab_size
        self.block_size = cache.block_size
        self.num_blocks, self.cache_bytes = cache.num_blocks, cache.num_bytes
        self.device = str(model.embedding.device)
        self.max_draft_rows = MAX_DRAFT_ROWS if self.device == "cpu" else 0  # cuBLAS has other bits for other rows
        is_native = native.is_available() and self.device == "cpu"
        self._sample = native_sampler.sample if is_native else sampler.sample
        self._log_softmax = native_sampler.log_softmax if is_native else in_torch
        self.dtype = str(dtype).removeprefix("torch.")
        self.weight_bytes, self.workspace_bytes = model.num_bytes, 0
        # Each row reads the context for itself, about as fast as weights are read.
        self.context_cost = cache.num_bytes / (cache.num_blocks * cache.block_size) / model.num_bytes
        self.row_cost = ROW_COST if self.weight_bytes > SMALL_MODEL_BYTES else SMALL_MODEL_ROW_COST
        self.eos_token_ids = model.config.eos_token_ids
        self.description = ""
        self.facts: ModelFacts | None = None
        self.drafter: Drafter | None = None

    @torch.inference_mode()
    def launch(self, step: Step) -> Computed:
        """Compute the step's new tokens and sample where it says so. On the CPU all is done when it returns, but for
        what waits for masks. Raises DeviceMemoryError.

        K and V of all new tokens are written in each layer before attention reads, so sequences of one step may share
        blocks that are filled in it. Token ids must be below vocab_size and block tables long enough.
        """
        try:
            return self._launch(step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise DeviceMemoryError(str(error).partition("\n")[0]) from None
        except RuntimeError as error:
            if _NO_MEMORY not in str(error):
                raise
            raise DeviceMemoryError(str(error).partition("\n")[0]) from None

    def _launch(self, step: Step) -> Computed:
        seats = self._seats.take_in(step)
        if not seats:
            return Computed(step, sampled=Sampled([], []))
        x, first_rows = self._forward(step, seats)
        if step.drafts and not bool(x.sum().isfinite()):
            # Nobody sees K and V of a wrong draft, but zero times NaN is not zero: the step goes without.
            for i in step.drafts:
                self._model.cache.scrub(seats[i].block_table)
            step = _without_drafts(step)
            x, first_rows = self._forward(step, seats)
        scores = {
            i: self._score(x, first_rows[i] - step.num_computed[i], seats[i], rows)
            for i, rows in step.prompt_rows.items()
        }
        sampling = [i for i, num in enumerate(step.num_sampled) if num]
        if not sampling:
            return Computed(step, sampled=Sampled(step.num_sampled, [], {}, scores))
        rows = [first_rows[i] + step.num_new[i] - step.num_sampled[i] for i in sampling]
        behind = [first_rows[i] + k for i in sampling for k in range(1, step.num_sampled[i])]
        logits = self._model.logits(x, rows + behind)
        launched = Computed(step, logits, sampling, [seats[i] for i in sampling], scores)
        if not any(seat.params.grammar for seat in launched.seats):
            self._draw(launched, None)
        return launched

    @torch.inference_mode()
    def draw(self, launched: Computed, masks: Masks) -> None:
        """Sample from a step's logits."""
        self._draw(launched, masks)

    def _draw(self, launched: Computed, masks: Masks | None) -> None:
        assert launched.logits is not None, "a step samples once"
        rows = {}
        if masks is not None:
            row_of = {entry: row for row, entry in enumerate(launched.sampling)}
            rows = {row_of[entry]: words for entry, words in zip(masks.entries, masks.words, strict=True)}
        step, num_plain = launched.step, len(launched.sampling)
        tokens, logprobs = self._sample(launched.logits[:num_plain], launched.seats, rows)
        for seat, token in zip(launched.seats, tokens, strict=True):
            seat.token_ids.append(max(token, 0))
            if token < 0:
                self._model.cache.scrub(seat.block_table)
        counts = step.num_sampled
        if step.drafts:
            counts, tokens, logprobs = self._follow_drafts(launched, tokens, logprobs)
        found = {place: logprob for place, logprob in enumerate(logprobs) if logprob is not None}
        launched.logits = None
        launched.sampled = Sampled(counts, tokens, found, launched.scores)

    def _follow_drafts(
        self, launched: Computed, first: list[int], logprobs: list[TokenLogprobs | None]
    ) -> tuple[list[int], list[int], list[TokenLogprobs | None]]:
        """What each sampling entry got from its first row -> (how many tokens each entry gets, all tokens, theirs). A
        row behind is sampled where all before it were right, and sees their tokens."""
        assert launched.logits is not None
        step, row = launched.step, len(launched.sampling)
        counts = list(step.num_sampled)
        tokens, found = list[int](), list[TokenLogprobs | None]()
        for entry, seat, token, logprob in zip(launched.sampling, launched.seats, first, logprobs, strict=True):
            tokens.append(token)
            found.append(logprob)
            drafts = step.drafts.get(entry, [])
            counts[entry] = 1
            for drafted, behind in zip(drafts, range(row, row + len(drafts)), strict=True):
                if tokens[-1] != drafted:
                    break
                (token,), (logprob,) = self._sample(launched.logits[behind : behind + 1], [seat])
                seat.token_ids.append(max(token, 0))
                tokens.append(token)
                found.append(logprob)
                counts[entry] += 1
            row += len(drafts)
        return counts, tokens, found

    def revise(self, seat: int, first: int, token_ids: list[int]) -> None:
        """The tokens of a sequence from place `first` on are these and not what steps have sampled."""
        self._seats.revise(seat, first, token_ids)

    def collect(self, launched: Computed) -> Sampled:
        """What a launched step sampled."""
        assert launched.sampled is not None, "it waits for its masks"
        return launched.sampled

    @torch.inference_mode()
    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the entries of the S sequences that would sample).

        With `every_row`, the rows of all new tokens in the step's order; for evaluation.
        """
        x, first_rows = self._forward(step, self._seats.take_in(step))
        sampling = [i for i, num in enumerate(step.num_sampled) if num]
        assert not step.drafts
        counts = enumerate(step.num_new)
        if every_row:
            wanted = [first_rows[i] + k for i, num in counts for k in range(num)]
        else:
            wanted = [first_rows[i] + num - 1 for i, num in counts if step.num_sampled[i]]
        return self._model.logits(x, wanted), sampling

    def _score(self, x: Tensor, start: int, seat: Seat, rows: PromptRows) -> PromptLogprobs:
        """`start`: where in x row 0 of the sequence would stand. The head runs over a slice of the rows at a time."""
        first, end = rows.first, rows.first + rows.num
        parts = []
        for begin in range(first, end, SLICE_ROWS):
            chosen = range(begin, min(begin + SLICE_ROWS, end))
            logits = self._model.logits(x, [start + row for row in chosen])
            following = seat.token_ids[chosen.start + 1 : chosen.stop + 1]
            parts.append(scored(logits, following, rows.num_top, self._log_softmax))
        return packed(first + 1, parts)

    def _forward(self, step: Step, seats: list[Seat]) -> tuple[Tensor, list[int]]:
        """(what the model's `logits` takes, where in it the first row of each entry stands)."""
        spans = [
            Span(start, n, seat.block_table)
            for seat, start, n in zip(seats, step.num_computed, step.num_new, strict=True)
        ]
        columns = enumerate(zip(seats, step.num_computed, step.num_new, strict=True))
        ahead = self.ahead
        texts = [
            seat.token_ids[start + ahead : start + ahead + n] + step.drafts.get(i, [])
            for i, (seat, start, n) in columns
        ]
        return self._model.forward(texts, spans)


def _without_drafts(step: Step) -> Step:
    ones = [1 if i in step.drafts else num for i, num in enumerate(step.num_new)]
    sampled = [min(num, 1) for num in step.num_sampled]
    return msgspec.structs.replace(step, num_new=ones, num_sampled=sampled, drafts={})
