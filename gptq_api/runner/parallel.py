"""Several ranks as one runner: each steps its shard of the model, all sample, and all sample the same.

Every rank has the whole logits of a step, the same bits, and draws by (seed, position, logits); so nothing of what is
sampled is sent. That they agree is looked at with every step all the same. A draft model is beside rank 0 alone: what
it guesses reaches all of them in the step that checks it, and nothing of theirs is under way while it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptq_api.errors import ConfigError
from gptq_api.model.config import LlamaConfig
from gptq_api.model.shard import refusal
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.ranks import RankError, RankGroup
from gptq_api.step import Drafter, Masks, Sampled, Step
from gptq_api.types import ModelFacts


class ParallelRunner:
    """Not thread-safe: one caller steps it, the thread that loaded it."""

    def __init__(self, group: RankGroup, runners: list[LoadedRunner]) -> None:
        self._group, self._runners = group, runners
        first = runners[0]
        self.vocab_size, self.lookahead = first.vocab_size, first.lookahead
        self.max_draft_rows = min(runner.max_draft_rows for runner in runners)
        self.row_cost, self.context_cost, self.wait_cost = first.row_cost, first.context_cost, first.wait_cost
        self.prompt_costs, self.prompts_apart = first.prompt_costs, first.prompts_apart
        self.row_multiple, self.shared_rows = first.row_multiple, first.shared_rows
        self.max_model_len, self.block_size, self.num_blocks = first.max_model_len, first.block_size, first.num_blocks
        self.device, self.dtype, self.eos_token_ids = first.device, first.dtype, first.eos_token_ids
        self.cache_bytes = sum(runner.cache_bytes for runner in runners)
        self.weight_bytes = sum(runner.weight_bytes for runner in runners)
        self.workspace_bytes = sum(runner.workspace_bytes for runner in runners)
        self.description = ""
        self.facts: ModelFacts | None = None
        self.drafter: Drafter | None = None
        self.missing_rank: int | None = None

    @property
    def ranks(self) -> list[LoadedRunner]:
        """Theirs, in order: for those who want to know what stands where."""
        return list(self._runners)

    @property
    def num_graphs(self) -> int:
        return self._runners[0].num_graphs

    def launch(self, step: Step) -> list[Any]:
        """Start the step on every rank. Raises DeviceMemoryError where one has no memory for it."""
        with self._who_is_missing():
            return self._group.run(lambda rank: self._runners[rank].launch(step))

    def draw(self, launched: list[Any], masks: Masks) -> None:
        """Sample a step whose entries have grammars."""
        self._group.run(lambda rank: self._runners[rank].draw(launched[rank], masks))

    def collect(self, launched: list[Any]) -> Sampled:
        """Wait for the step on every rank. RankError where they differ, or one has not come."""
        with self._who_is_missing():
            sampled = [runner.collect(one) for runner, one in zip(self._runners, launched, strict=True)]
        for rank, other in enumerate(sampled[1:], 1):
            if (other.tokens, other.num_tokens) != (sampled[0].tokens, sampled[0].num_tokens):
                raise RankError(f"rank {rank} sampled {other.tokens}, rank 0 {sampled[0].tokens}: their memory differs")
        return sampled[0]

    @contextmanager
    def _who_is_missing(self) -> Iterator[None]:
        """A rank that has waited in vain has ended everything on its device: told as what it is."""
        try:
            yield
        except RuntimeError as error:
            for rank, runner in enumerate(self._runners):
                if (missing := runner.missing_rank) is not None:
                    raise RankError(f"rank {missing} did not answer rank {rank} in time, and has stopped") from error
            raise

    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """As of any runner; rank 0's."""
        return self._group.run(lambda rank: self._runners[rank].logits(step, every_row))[0]


def rank_devices(options: LoadOptions, config: LlamaConfig, first: torch.device) -> list[torch.device]:
    """Where each rank is: GPUs one after another from `first` on, or threads of the CPU. ConfigError where the model or
    the machine does not have so many."""
    size = options.tensor_parallel_size
    asked = f"--tensor-parallel-size {size}"
    if (reason := refusal(config, size)) is not None:
        raise ConfigError(f"{asked}: {reason}")
    if first.type == "cpu":
        return [first] * size
    there = torch.cuda.device_count()
    begin = first.index or 0
    if begin + size > there:
        raise ConfigError(
            f"{asked}: torch finds {there} GPU{'s' if there != 1 else ''}"
            + (f", and the first to use is number {begin}" if begin else "")
            + "; lower it, or let this process see more (CUDA_VISIBLE_DEVICES)"
        )
    return [torch.device("cuda", begin + rank) for rank in range(size)]
