"""Steps on CUDA: `launch` stages a batch and starts it, `collect` waits for the few bytes it sampled.

All work is on one stream, in the order of the launches, so a step finds in `history` and in the cache what the steps
before it left there, whether or not the host has seen it. The host's side of a step is arrays by slot, not a loop over
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptq_api.kernels import gptq, sampling
from gptq_api.kernels.prefill_attention import TILE_ROWS
from gptq_api.kernels.sampling import MAX_TOP_LOGPROBS, SamplingInputs, SamplingTable
from gptq_api.model.cuda_cache import CudaKVCache
from gptq_api.model.cuda_graphs import Buckets, Graphs
from gptq_api.model.cuda_inputs import Ints, SequenceTable, Step, StepInputs, StepShape, num_words, write_idle
from gptq_api.model.cuda_llama import CudaLlama
from gptq_api.sequence import Batch, DeviceMemoryError, Sampled
from gptq_api.types import TokenLogprobs

_NUM_STAGES = 3
"""a step's pinned memory is filled while the step before it waits and the one before that is not collected yet"""


class _Stage:
    """Pinned memory of one step: what the device reads, and what it answers."""

    def __init__(self, num_words: int, max_num_seqs: int) -> None:
        def pinned(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

        self.inputs, self.tokens = pinned(num_words), pinned(max_num_seqs)
        self.logprobs = pinned(max_num_seqs, 2, 1 + MAX_TOP_LOGPROBS)
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._views: dict[StepShape, tuple[StepInputs[Ints], Tensor]] = {}

    def views(self, shape: StepShape, keep: bool) -> tuple[StepInputs[Ints], Tensor]:
        """(the step's arrays, the sampler's among them as a tensor); `keep`: the shape will come again."""
        found = self._views.get(shape)
        if found is None:
            found = StepInputs.over(self.inputs.numpy(), shape), StepInputs.over(self.inputs, shape).sampling
            if keep:
                self._views[shape] = found
        return found


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    batch: Batch
    step: Step
    stage: _Stage
    block_tables: Ints
    """[S, blocks], the stage's"""
    has_logprobs: bool


def _largest_shape(max_num_seqs: int, max_num_batched_tokens: int, max_blocks: int) -> StepShape:
    rows = max(max_num_seqs, max_num_batched_tokens)
    return StepShape(rows, max_num_seqs, max_blocks, rows // TILE_ROWS + max_num_seqs)


def state_bytes(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int) -> int:
    """What a CudaRunner allocates on the device."""
    largest = _largest_shape(max_num_seqs, max_num_batched_tokens, -(-max_model_len // block_size))
    return 4 * (max_num_seqs * (max_model_len + 3 + 2 * MAX_TOP_LOGPROBS) + num_words(largest))


class CudaRunner:
    """A model on the device and its KV cache. Not thread-safe: one caller steps it."""

    lookahead = 1
    row_multiple = gptq.ROW_MULTIPLE

    def __init__(
        self,
        model: CudaLlama,
        cache: CudaKVCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        workspace_bytes: int,
    ) -> None:
        self._model, self._cache = model, cache
        self.max_model_len = max_model_len
        self.vocab_size = model.config.vocab_size
        self.block_size = cache.block_size
        self.num_blocks, self.cache_bytes = cache.num_blocks, cache.num_bytes
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.weight_bytes, self.workspace_bytes = model.num_bytes, workspace_bytes
        self.eos_token_ids = model.config.eos_token_ids
        self.description = ""
        device, max_blocks = model.device, -(-max_model_len // cache.block_size)
        largest = _largest_shape(max_num_seqs, max_num_batched_tokens, max_blocks)
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._history = torch.zeros(max_num_seqs, max_model_len, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(max_num_seqs, 2, 1 + MAX_TOP_LOGPROBS, dtype=torch.int32, device=device)
        self._inputs = torch.zeros(num_words(largest), dtype=torch.int32, device=device)
        self._stages = [_Stage(num_words(largest), max_num_seqs) for _ in range(_NUM_STAGES)]
        self._table = SequenceTable(max_num_seqs, max_blocks, cache.block_size)
        self._sampling = SamplingTable(max_num_seqs)
        self._buckets = Buckets(max_num_seqs, max_num_batched_tokens, max_blocks, TILE_ROWS)
        self._graphs = Graphs(self._forward_and_sample)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start the step behind those launched before. Blocks, slots and, of admitted sequences, tokens and parameters
        are read here. DeviceMemoryError where the device has no memory for it; nothing is sampled then."""
        slots = np.fromiter((sequence.slot for sequence in batch.sequences), np.int32, len(batch.sequences))
        with torch.cuda.stream(self._stream):
            try:
                self._admit(batch, slots, len(slots) - batch.num_admitted)
                return self._launch(batch, self._table.take_in(batch, slots))
            except torch.cuda.OutOfMemoryError as error:
                self._table.forget(slots)
                raise DeviceMemoryError(str(error).partition("\n")[0]) from None

    @torch.inference_mode()
    def collect(self, launched: Launched) -> Sampled:
        """Wait for the step; at most two may be uncollected. Sequences whose logits were not finite get -1, and what is
        not finite in their blocks becomes zeros."""
        batch, stage = launched.batch, launched.stage
        stage.done.synchronize()
        drawn = stage.tokens[: len(batch.sequences)].tolist()
        tokens = [token if wanted else None for token, wanted in zip(drawn, batch.samples, strict=True)]
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if launched.has_logprobs:
            for i, sequence in enumerate(batch.sequences):
                if batch.samples[i] and sequence.params.top_logprobs is not None:
                    logprobs[i] = sampling.read_logprobs(stage.logprobs[i], sequence.params.top_logprobs)
        for i, token in enumerate(tokens):
            if token is not None and token < 0:
                num = -(-int(launched.step.context[i]) // self._cache.block_size)
                self._scrub(launched.block_tables[i, :num])
        return Sampled(tokens, logprobs)

    @torch.inference_mode()
    def logits(self, batch: Batch, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the batch indices of the S sequences that would sample).

        With `every_row`, the rows of all new tokens in the batch's order. For evaluation: waits, and takes tokens,
        blocks and slots anew from every sequence (the place in the batch for one without a slot).
        """
        slots = np.array([i if s.slot < 0 else s.slot for i, s in enumerate(batch.sequences)], np.int32)
        with torch.cuda.stream(self._stream):
            self._upload(batch, slots, 0)
            self._table.forget(slots)
            step = self._table.take_in(batch, slots)
            shape, _ = self._shape(step, exact=True)
            stage = self._stages[0]
            stage.done.synchronize()
            host, _ = stage.views(shape, keep=False)
            self._table.write(step, TILE_ROWS, host)
            inputs = self._copy_in(stage, shape)
            logits = self._model.forward(inputs, self._history, self._cache.layers, step.decode, every_row)
            wanted = [i for i, samples in enumerate(batch.samples) if samples]
            result = logits if every_row else logits[wanted]
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

    @torch.inference_mode()
    def run_idle(self, shape: StepShape, capture: bool) -> None:
        """A step of padding, which leaves no trace."""
        with torch.cuda.stream(self._stream):
            stage = self._stages[0]
            stage.done.synchronize()
            host, packed = stage.views(shape, keep=False)
            write_idle(host)
            self._sampling.fill(packed, [-1] * shape.num_sequences, [0] * shape.num_sequences)
            self._copy_in(stage, shape)
            self._graphs.run(shape, capture)
            stage.done.record()

    def _launch(self, batch: Batch, step: Step) -> Launched:
        stage = self._stages[0]
        self._stages = [*self._stages[1:], stage]
        stage.done.synchronize()
        shape, recurs = self._shape(step, exact=False)
        host, packed = stage.views(shape, recurs)
        self._table.write(step, TILE_ROWS, host)
        padding = shape.num_sequences - len(step.slots)
        slots = np.where(batch.samples, step.slots, -1).tolist() + [-1] * padding
        lengths = step.context.tolist() + [0] * padding
        needs = self._sampling.fill(packed, slots, lengths)
        inputs = self._copy_in(stage, shape)
        logits = self._graphs.run(shape, recurs)
        tokens, columns = self._tokens[: shape.num_sequences], SamplingInputs(inputs.sampling)
        if needs.adjust:
            # The step has sampled from the raw logits: sample again, over it.
            entries = self._sampling.entries(slots, lengths).pin_memory().to(logits.device, non_blocking=True)
            adjusted = torch.empty_like(logits) if needs.logprobs else logits
            sampling.adjust(logits, columns, self._history, entries, adjusted)
            sampling.sample(adjusted, columns, self._history, tokens)
        if needs.logprobs:
            found = self._logprobs[: shape.num_sequences]
            sampling.logprobs(logits, columns, tokens, found)
            stage.logprobs[: len(step.slots)].copy_(found[: len(step.slots)], non_blocking=True)
        stage.tokens[: len(step.slots)].copy_(tokens[: len(step.slots)], non_blocking=True)
        stage.done.record()
        return Launched(batch, step, stage, host.block_tables, needs.logprobs)

    def _forward_and_sample(self, shape: StepShape) -> Tensor:
        inputs = StepInputs.over(self._inputs, shape)
        logits = self._model.forward(inputs, self._history, self._cache.layers, decode=not shape.num_tiles)
        sampling.sample(logits, SamplingInputs(inputs.sampling), self._history, self._tokens[: shape.num_sequences])
        return logits

    def _shape(self, step: Step, exact: bool) -> tuple[StepShape, bool]:
        """(shape, whether it is one of the few that steps are padded to)."""
        num_blocks, num = step.num_blocks(self._cache.block_size), len(step.slots)
        tiles = 0 if step.decode else max(1, step.num_tiles(TILE_ROWS))
        if not exact:
            if step.decode:
                return self._buckets.decode_shape(num, num_blocks), True
            shape = self._buckets.mixed_shape(step.num_rows, num, tiles, num_blocks)
            if shape is not None:
                return shape, True
        # As many sequences as a decode step may have: the head's product with other numbers of rows may be a cuBLAS
        # kernel never used before, which takes some 50 ms to load while the device waits.
        return StepShape(step.num_rows, num if exact else self._buckets.padded(num), num_blocks, tiles), False

    def _copy_in(self, stage: _Stage, shape: StepShape) -> StepInputs[Tensor]:
        words = num_words(shape)
        self._inputs[:words].copy_(stage.inputs[:words], non_blocking=True)
        return StepInputs.over(self._inputs, shape)

    def _admit(self, batch: Batch, slots: Ints, first: int) -> None:
        for i in range(first, len(slots)):
            sequence = batch.sequences[i]
            self._sampling.set(sequence.slot, sequence.params, sequence.num_prompt_tokens)
        self._upload(batch, slots, first)

    def _upload(self, batch: Batch, slots: Ints, first: int) -> None:
        """All tokens of the sequences from `first` on into `history`, by one pinned copy each."""
        if first == len(slots):
            return
        texts = [np.array(sequence.token_ids, np.int32) for sequence in batch.sequences[first:]]
        tokens, start = torch.from_numpy(np.concatenate(texts)).pin_memory(), 0
        for slot, text in zip(slots[first:].tolist(), texts, strict=True):
            self._history[slot, : len(text)].copy_(tokens[start : start + len(text)], non_blocking=True)
            start += len(text)

    def _scrub(self, blocks: Ints) -> None:
        with torch.cuda.stream(self._stream):
            self._cache.scrub(torch.from_numpy(blocks.astype(np.int64)).to(self._inputs.device))
