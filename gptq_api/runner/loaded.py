"""What a loaded model is to those who step it, on whatever device it is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gptq_api.step import Drafter, Runner, Step
from gptq_api.types import ModelFacts


class LoadedRunner(Runner[Any], Protocol):
    """Not thread-safe: one caller steps it."""

    row_multiple: int
    """what the number of tokens in one step is best a multiple of, where they are many"""
    shared_rows: int | None
    """how many sequences of several owners decode in one step, at most: more take too long for what they bring. None:
    as many as there are"""
    max_model_len: int
    block_size: int
    num_blocks: int
    cache_bytes: int
    weight_bytes: int
    workspace_bytes: int
    """activations and what else a step needs; 0 where it comes and goes"""
    device: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    description: str
    """one line for the log"""
    facts: ModelFacts | None
    """the same by itself, once it is loaded"""
    drafter: Drafter | None
    """a draft model beside it, whose cache has the same blocks"""

    @property
    def missing_rank(self) -> int | None:
        """That this one, of several, has waited for in vain."""

    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the entries of the S sequences that would sample).

        With `every_row`, the rows of all new tokens in the step's order; for evaluation.
        """
