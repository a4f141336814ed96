"""Steps on CUDA: `launch` stages a step and starts it, `collect` waits for the few bytes it sampled.

All work is on one stream, in the order of the launches, so a step finds in `history` and in the cache what the steps
before it left there, whether or not the host has seen it. The host's side of a step is arrays by seat, not a loop over
sequences.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from gptq_api.kernels import gemm, sampling
from gptq_api.kernels.prefill_attention import TILE_ROWS
from gptq_api.kernels.sampling import MAX_TOP_LOGPROBS, SamplingInputs, SamplingTable
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.costs import draft_costs
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.graphs import MAX_MIXED_ROWS, Buckets, Graphs
from gptq_api.runner.cuda.prompt_logprobs import score
from gptq_api.runner.cuda.stages import Launched, OnDevice, Stage
from gptq_api.runner.inputs import (
    HISTORY_START,
    Columns,
    Ints,
    Rows,
    SequenceTable,
    StepInputs,
    StepShape,
    num_words,
    write_idle,
)
from gptq_api.step import Admission, DeviceMemoryError, Drafter, Masks, PromptCosts, Sampled, Step
from gptq_api.types import ModelFacts, TokenLogprobs

_log = logging.getLogger(__name__)
_NUM_STAGES = 3
"""a step's pinned memory is filled while the step before it waits and the one before that is not collected yet"""


def _largest_shape(max_num_seqs: int, max_num_batched_tokens: int, max_blocks: int) -> StepShape:
    """No step's arrays are larger in any part."""
    num_sampled = max(max_num_seqs, MAX_DRAFT_ROWS)
    rows = max(num_sampled, max_num_batched_tokens)
    return StepShape(rows, num_sampled, max_blocks, rows // TILE_ROWS + max_num_seqs, drafted=True)


def state_bytes(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int) -> int:
    """What a CudaRunner allocates on the device."""
    largest = _largest_shape(max_num_seqs, max_num_batched_tokens, -(-max_model_len // block_size))
    per_row = 3 + 2 * MAX_TOP_LOGPROBS
    return 4 * (HISTORY_START + max_num_seqs * max_model_len + largest.num_sequences * per_row + num_words(largest))


def _kept(step: Step, drawn: list[int]) -> tuple[list[int], list[int], list[int]]:
    """From the token that each row drew: (how many tokens each entry gets, the rows that these come from, all rows that
    count as drawn). A row counts as long as every row of its sequence before it drew the draft behind that."""
    if not step.drafts:
        rows = [i for i, num in enumerate(step.num_sampled) if num]
        return step.num_sampled, rows, rows
    num_tokens, rows, start = list[int](), list[int](), 0
    for entry, num in enumerate(step.num_sampled):
        kept = min(1, num)
        for i, draft in enumerate(step.drafts.get(entry, ())):
            if drawn[start + i] != draft:
                break
            kept += 1
        num_tokens.append(kept)
        rows += range(start, start + kept)
        start += step.num_new[entry]
    return num_tokens, rows, list(range(start))


class CudaRunner:
    """A model on the device and its KV cache. Not thread-safe: one caller steps it."""

    lookahead = 1
    row_multiple = gemm.ROW_MULTIPLE
    shared_rows: int | None = None  # a step of many rows takes little longer than one of few

    def __init__(
        self,
        model: CudaLlama,
        cache: CudaKVCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        workspace_bytes: int,
        drafts_for: CudaRunner | None = None,
    ) -> None:
        """`drafts_for`: whom it guesses tokens for, on whose stream: what both use of the device is used in turn, and
        as many steps may be uncollected as a draft has tokens."""
        self._model, self._cache = model, cache
        self.max_model_len, self.ahead = max_model_len, model.ahead
        self.vocab_size = model.config.vocab_size
        self.block_size = cache.block_size
        self.num_blocks, self.cache_bytes = cache.num_blocks, cache.num_bytes
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.weight_bytes, self.workspace_bytes = model.num_bytes, workspace_bytes
        self.eos_token_ids = model.config.eos_token_ids
        self.description = ""
        self.facts: ModelFacts | None = None
        device, max_blocks = model.device, -(-max_model_len // cache.block_size)
        self.max_draft_rows = model.max_draft_rows if drafts_for is None else 0
        self.drafter: Drafter | None = None
        self.prompt_costs: PromptCosts | None = None
        self.row_cost, self.wait_cost = 0.05, 0.2  # until they are measured
        # Each group of rows reads the context for itself, from the L2: twice as fast as weights are read (13B on an
        # H200).
        reading = cache.num_bytes / (cache.num_blocks * cache.block_size) / (2 * model.num_bytes)
        self.context_cost = reading / model.row_groups.most
        self._num_timed_rows = min(MAX_MIXED_ROWS, max_num_batched_tokens)
        largest = _largest_shape(max_num_seqs, max_num_batched_tokens, max_blocks)
        num_sampled, num_stages = largest.num_sequences, _NUM_STAGES if drafts_for is None else 1 + MAX_DRAFT_ROWS
        stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._stream = stream if drafts_for is None else drafts_for.stream
        history = torch.zeros(HISTORY_START + max_num_seqs * max_model_len, dtype=torch.int32, device=device)
        self._flat_history, self._history = history, history[HISTORY_START:].view(max_num_seqs, max_model_len)
        self._tokens = torch.zeros(num_sampled, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(num_sampled, 2, 1 + MAX_TOP_LOGPROBS, dtype=torch.int32, device=device)
        self._inputs = torch.zeros(num_words(largest), dtype=torch.int32, device=device)
        self._stages = [Stage(num_words(largest), num_sampled) for _ in range(num_stages)]
        self._on_device: dict[StepShape, OnDevice] = {}
        self.prompts_apart = model.batch_invariant
        self._table = SequenceTable(
            *(max_num_seqs, max_blocks, cache.block_size, self.prompts_apart, model.row_groups),
            looks_ahead=self.ahead > 0,
        )
        self._sampling = SamplingTable(max_num_seqs)
        limits = (max_num_seqs, max_num_batched_tokens, max_blocks, TILE_ROWS, self.max_draft_rows)
        self._buckets = Buckets(*limits, full_steps=model.has_ranks)
        self._graphs = Graphs(self._forward_and_sample, kept=self._buckets.start_shapes)

    @property
    def stream(self) -> torch.cuda.Stream:
        """On which all work is."""
        return self._stream

    @property
    def missing_rank(self) -> int | None:
        """That this one, of several, has waited for in vain."""
        return self._model.missing_rank

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def launch(self, step: Step) -> Launched:
        """Start the step behind those launched before."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            try:
                self._admit(step.admitted)
                return self._launch(step)
            except torch.cuda.OutOfMemoryError as error:
                raise DeviceMemoryError(str(error).partition("\n")[0]) from None

    @torch.inference_mode()
    def draw(self, launched: Launched, masks: Masks) -> None:
        """Sample a step over, from what its masks leave. Its logits and inputs are still where it left them, since no
        other step was launched."""
        assert launched.waits, "a step without grammars has sampled"
        with torch.cuda.stream(self._stream):
            self._put_drafts(launched.there.inputs)
            self._finish(launched, masks)

    def collect(self, launched: Launched) -> Sampled:
        """Wait for the step; at most two may be uncollected, or the steps of one draft. Sequences whose logits were not
        finite get -1, and what is not finite in their blocks becomes zeros."""
        step, stage = launched.step, launched.stage
        stage.done.synchronize()
        drawn: list[int] = stage.drawn[: launched.num_rows].tolist()
        num_tokens, rows, drawn_from = _kept(step, drawn)
        logprobs: dict[int, TokenLogprobs] = {}
        if launched.num_top is not None:
            for place, i in enumerate(rows):
                num_top = launched.num_top[i]
                found = sampling.read_logprobs(stage.logprobs[i], num_top) if num_top >= 0 else None
                if found is not None:
                    logprobs[place] = found
        for i in drawn_from:
            if drawn[i] < 0:
                num_blocks = -(-launched.lengths[i] // self._cache.block_size)
                self._scrub(launched.staged.inputs.block_tables[i, :num_blocks])
        scores = {} if launched.scores is None else launched.scores.read()
        return Sampled(num_tokens, [drawn[i] for i in rows], logprobs, scores)

    @torch.inference_mode()
    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the entries of the S sequences that would sample; in a step
        with drafts, rows of either).

        With `every_row`, the rows of all new tokens in the step's order. For evaluation: waits.
        """
        with torch.cuda.stream(self._stream):
            self._admit(step.admitted)
            stage = self._stages[0]
            stage.done.synchronize()
            if step.drafts:
                rows = self._table.take_in_rows(step, self.max_model_len)
                shape, wanted = self._draft_shape(rows), list(range(len(rows.seats)))
                staged = stage.views(shape, keep=False)
                self._table.write_rows(rows, staged.inputs)
            else:
                columns = self._table.take_in(step)
                shape, _ = self._shape(columns, exact=True)
                wanted = np.flatnonzero(columns.num_sampled).tolist()
                staged = stage.views(shape, keep=False)
                self._table.write(columns, TILE_ROWS, staged.inputs)
            there = self._views(shape, keep=False)
            there.words.copy_(staged.words, non_blocking=True)
            self._put_drafts(there.inputs)
            kinds = (not shape.num_tiles, every_row, shape.drafted, shape.prompts)
            logits = self._model.forward(there.inputs, self._history, self._cache.layers, *kinds)
            result = logits[: step.num_tokens] if every_row else logits[wanted]
            self._stream.synchronize()
            return result, wanted

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile, load and capture what the first requests would wait for otherwise."""
        with torch.cuda.stream(self._stream):
            for shape in self._buckets.start_shapes:
                for _ in range(2):
                    self.run_idle(shape, capture=True)
            self._stream.synchronize()
            self.prompt_costs = self._prompt_costs()
            if self.max_draft_rows:
                self.row_cost, self.wait_cost = draft_costs(self)
        _log.info("%s", self._graphs)

    def _prompt_costs(self) -> PromptCosts:
        """Measured with steps of padding, but for the attention of prompts, which does an operation in 1.7 times the
        time of the products (13B on an H200)."""
        config, rows = self._model.config, self._num_timed_rows
        decode_ms = self._median_ms(self._buckets.decode_shape(1, 1), capture=True)
        shape = StepShape(rows, 1, 1, 1, prompts=self.prompts_apart)
        row_ms = max(self._median_ms(shape, capture=False) - decode_ms, 0.0) / rows
        width = config.num_attention_heads * config.head_dim
        return PromptCosts(decode_ms, row_ms, 1.7 * row_ms * 2 * width / config.weights_per_layer)

    def _median_ms(self, shape: StepShape, capture: bool) -> float:
        times = []
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self.run_idle(shape, capture)
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        return sorted(times)[1]

    @torch.inference_mode()
    def run_idle(self, shape: StepShape, capture: bool) -> None:
        """A step of padding, which leaves no trace."""
        with torch.cuda.stream(self._stream):
            stage = self._stages[0]
            stage.done.synchronize()
            staged = stage.views(shape, keep=False)
            write_idle(staged.inputs)
            self._sampling.fill(staged.inputs.sampling, [-1] * shape.num_sequences, [0] * shape.num_sequences)
            self._views(shape, keep=False).words.copy_(staged.words, non_blocking=True)
            self._graphs.run(shape, capture)
            stage.done.record()

    def _launch(self, step: Step) -> Launched:
        stage = self._stages[0]
        self._stages = [*self._stages[1:], stage]
        stage.done.synchronize()
        columns: Columns | None = None
        if step.drafts:
            rows = self._table.take_in_rows(step, self.max_model_len)
            shape, recurs = self._draft_shape(rows), True
            staged = stage.views(shape, recurs)
            self._table.write_rows(rows, staged.inputs)
            seats, lengths = rows.seats, rows.context
        else:
            columns = self._table.take_in(step)
            shape, recurs = self._shape(columns, exact=False)
            staged = stage.views(shape, recurs)
            self._table.write(columns, TILE_ROWS, staged.inputs)
            seats = np.where(columns.num_sampled, columns.seats, -1).tolist()
            lengths = (columns.context + self.ahead).tolist() if self.ahead else columns.context.tolist()
        num, padding = len(seats), shape.num_sequences - len(seats)
        seats, lengths = seats + [-1] * padding, lengths + [0] * padding
        needs = self._sampling.fill(staged.inputs.sampling, seats, lengths)
        there = self._views(shape, recurs)
        there.words.copy_(staged.words, non_blocking=True)
        logits = self._graphs.run(shape, recurs)
        # From here on the device has its work.
        scores = score(self._model, self._history, step, columns) if columns is not None and step.prompt_rows else None
        num_top = self._sampling.top_logprobs(seats[:num]) if needs.logprobs else None
        waits = self._sampling.constrained(seats)
        launched = Launched(step, stage, staged, there, logits, seats, lengths, num, needs, num_top, scores, waits)
        if not waits:
            if needs.adjust:
                self._put_drafts(there.inputs)
            self._finish(launched, None)
        return launched

    def _finish(self, launched: Launched, masks: Masks | None) -> None:
        """From the logits of a step, which its graph has sampled from as they are, to what `collect` reads. Where it
        samples again, `history` has its drafts once more."""
        logits, needs, num, stage = launched.logits, launched.needs, launched.num_rows, launched.stage
        how, tokens = launched.there.how, launched.there.tokens
        if needs.adjust or masks is not None:
            # The step has sampled from the raw logits: sample again, over it.
            entries = self._sampling.entries(launched.seats, launched.lengths).pin_memory()
            adjusted = torch.empty_like(logits) if needs.logprobs else logits
            allowed = None
            if masks is not None:
                packed = sampling.packed_masks(len(logits), launched.rows_of(masks.entries), masks.words)
                allowed = packed.pin_memory().to(logits.device, non_blocking=True)
            entries = entries.to(logits.device, non_blocking=True)
            sampling.adjust(logits, how, self._history, entries, adjusted, allowed)
            sampling.sample(adjusted, how, self._history, tokens)
        if needs.logprobs:
            found = self._logprobs[: len(logits)]
            sampling.logprobs(logits, how, tokens, found)
            stage.logprobs[:num].copy_(found[:num], non_blocking=True)
        launched.staged.tokens.copy_(tokens, non_blocking=True)
        stage.done.record()

    def _forward_and_sample(self, shape: StepShape) -> Tensor:
        there, decode = self._views(shape, keep=False), not shape.num_tiles
        self._put_drafts(there.inputs)
        kinds = (decode, False, shape.drafted, shape.prompts)
        logits = self._model.forward(there.inputs, self._history, self._cache.layers, *kinds)
        sampling.sample(logits, there.how, self._history, there.tokens)
        return logits

    def _shape(self, step: Columns, exact: bool) -> tuple[StepShape, bool]:
        """(shape, whether it is one of the few that steps are padded to)."""
        num_blocks, num = step.num_blocks(self._cache.block_size), len(step.seats)
        tiles = 0 if step.decode else max(1, step.num_tiles(TILE_ROWS))
        if not exact:
            if step.decode:
                return self._buckets.decode_shape(num, num_blocks), True
            shape = self._buckets.mixed_shape(step.num_rows, num, tiles, num_blocks, step.prompts)
            if shape is not None:
                return shape, True
        # As many sequences as a decode step may have: a product with other numbers of rows may be a kernel never used
        # before, which takes time to load while the device waits (with a head by cuBLAS some 50 ms).
        sequences = num if exact else self._buckets.padded(num)
        return StepShape(step.num_rows, sequences, num_blocks, tiles, prompts=step.prompts), False

    def _draft_shape(self, rows: Rows) -> StepShape:
        return self._buckets.draft_shape(len(rows.seats), -(-max(rows.context) // self._cache.block_size))

    def _views(self, shape: StepShape, keep: bool) -> OnDevice:
        """`keep`: the shape will come again."""
        found = self._on_device.get(shape)
        if found is None:
            inputs = StepInputs.over(self._inputs, shape)
            words, tokens = self._inputs[: num_words(shape)], self._tokens[: shape.num_sequences]
            found = OnDevice(inputs, words, tokens, SamplingInputs(inputs.sampling))
            if keep:
                self._on_device[shape] = found
        return found

    def _admit(self, admitted: list[Admission]) -> None:
        """Their parameters into the sampler's table, all their tokens into `history`, by one pinned copy each."""
        if not admitted:
            return
        texts = [np.array(new.token_ids, np.int32) for new in admitted]
        tokens, start = torch.from_numpy(np.concatenate(texts)).pin_memory(), 0
        for new, text in zip(admitted, texts, strict=True):
            self._sampling.set(new.seat, new.params, new.num_prompt_tokens)
            self._history[new.seat, : len(text)].copy_(tokens[start : start + len(text)], non_blocking=True)
            start += len(text)

    def revise(self, seat: int, first: int, token_ids: list[int]) -> None:
        """The tokens of a sequence from place `first` on are these and not what steps have sampled."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            tokens = torch.tensor(token_ids, dtype=torch.int32).pin_memory()
            self._history[seat, first : first + len(token_ids)].copy_(tokens, non_blocking=True)

    def _put_drafts(self, inputs: StepInputs[Tensor]) -> None:
        """Into `history`: rows read their inputs there, and penalties what comes before them. What a row samples goes
        to the same places, so a step that samples again needs them again."""
        if len(inputs.draft_tokens):
            places = inputs.draft_places.view(torch.int64).flatten()
            self._flat_history.scatter_(0, places, inputs.draft_tokens)

    def _scrub(self, blocks: Ints) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._cache.scrub(torch.from_numpy(blocks.astype(np.int64)).to(self._inputs.device))
