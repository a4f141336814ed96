"""A step in, sampled tokens out, in plain torch: on the CPU, and on CUDA what its kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptq_api.runner.cpu.attention import KVCache, Span, plan_attention
from gptq_api.runner.cpu.forward import PlainLlama
from gptq_api.runner.cpu.sampler import sample
from gptq_api.runner.seats import Seat, Seats
from gptq_api.step import Masks, Sampled, Step


@dataclass(slots=True)
class Computed:
    """A step whose logits are there, and with `sampled` what came of them."""

    step: Step
    logits: Tensor | None = None
    """float32 [S, V], until the step has sampled"""
    sampling: list[int] = field(default_factory=list)
    """the entries that sample"""
    seats: list[Seat] = field(default_factory=list)
    """theirs"""
    sampled: Sampled | None = None


class CpuRunner:
    """A loaded model and its KV cache. Not thread-safe: one caller steps it."""

    lookahead = 0
    row_multiple = 1

    def __init__(self, model: PlainLlama, cache: KVCache, max_model_len: int, dtype: torch.dtype) -> None:
        self._model, self._cache, self._seats = model, cache, Seats()
        self.max_model_len = max_model_len
        self.vocab_size = model.config.vocab_size
        self.block_size = cache.block_size
        self.num_blocks, self.cache_bytes = cache.num_blocks, cache.num_bytes
        self.device = str(model.embedding.device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.weight_bytes, self.workspace_bytes = model.num_bytes, 0
        self.eos_token_ids = model.config.eos_token_ids
        self.description = ""

    @torch.inference_mode()
    def launch(self, step: Step) -> Computed:
        """Compute the step's new tokens and sample where it says so. On the CPU all is done when it returns, but for
        what waits for masks.

        K and V of all new tokens are written in each layer before attention reads, so sequences of one step may share
        blocks that are filled in it. Token ids must be below vocab_size and block tables long enough.
        """
        seats = self._seats.take_in(step)
        if not any(step.num_sampled):
            if seats:
                self._forward(step, seats)
            return Computed(step, sampled=Sampled([0] * len(seats), []))
        logits, sampling = self._forward(step, seats)
        launched = Computed(step, logits, sampling, [seats[i] for i in sampling])
        if not any(seat.params.grammar for seat in launched.seats):
            self.draw(launched)
        return launched

    @torch.inference_mode()
    def draw(self, launched: Computed, masks: Masks | None = None) -> None:
        """Sample from a step's logits."""
        assert launched.logits is not None, "a step samples once"
        rows = {}
        if masks is not None:
            row_of = {entry: row for row, entry in enumerate(launched.sampling)}
            rows = {row_of[entry]: words for entry, words in zip(masks.entries, masks.words, strict=True)}
        tokens, logprobs = sample(launched.logits, launched.seats, rows)
        for seat, token in zip(launched.seats, tokens, strict=True):
            seat.token_ids.append(max(token, 0))
            if token < 0:
                self._cache.scrub(seat.block_table)
        found = {place: logprob for place, logprob in enumerate(logprobs) if logprob is not None}
        launched.logits, launched.sampled = None, Sampled(launched.step.num_sampled, tokens, found)

    def collect(self, launched: Computed) -> Sampled:
        """What a launched step sampled."""
        assert launched.sampled is not None, "it waits for its masks"
        return launched.sampled

    @torch.inference_mode()
    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the entries of the S sequences that would sample).

        With `every_row`, the rows of all new tokens in the step's order; for evaluation.
        """
        return self._forward(step, self._seats.take_in(step), every_row)

    def _forward(self, step: Step, seats: list[Seat], every_row: bool = False) -> tuple[Tensor, list[int]]:
        assert max(step.num_sampled) <= 1, "drafted tokens are for runners that draft"
        spans = [
            Span(start, n, seat.block_table)
            for seat, start, n in zip(seats, step.num_computed, step.num_new, strict=True)
        ]
        plan = plan_attention(spans, self._cache, self._model.queries_per_kv, self._model.windows)
        ids: list[int] = []
        last_row: dict[int, int] = {}
        first_row: dict[int, int] = {}
        for i in plan.order:
            start, n = spans[i].num_computed, spans[i].num_tokens
            first_row[i] = len(ids)
            ids.extend(seats[i].token_ids[start : start + n])
            if step.num_sampled[i]:
                last_row[i] = len(ids) - 1
        sampling = sorted(last_row)
        if every_row:
            wanted = [first_row[i] + k for i in range(len(spans)) for k in range(spans[i].num_tokens)]
        else:
            wanted = [last_row[i] for i in sampling]
        device = self._model.embedding.device
        rows = torch.tensor(wanted, dtype=torch.int64).to(device) if wanted else None
        token_ids_tensor = torch.tensor(ids, dtype=torch.int64).to(device)
        return self._model.forward(token_ids_tensor, self._cache, plan, rows), sampling
