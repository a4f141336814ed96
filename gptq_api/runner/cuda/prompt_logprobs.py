"""From a step's hidden rows to the logprobs of its prompts' tokens, on CUDA: a slice of the rows at a time.

The step itself, graph or not, is the one without them: its rows stay where they are until the next step, and the head
runs over those that are wanted afterwards. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptq_api.kernels import sampling
from gptq_api.kernels.sampling import MAX_TOP_LOGPROBS, SamplingInputs
from gptq_api.runner.cuda.forward import CudaLlama
from gptq_api.runner.inputs import Columns
from gptq_api.step import PromptRows, Step
from gptq_api.types import PromptLogprobs

SLICE_ROWS = 64
"""Whose logits are there at a time. Always as many, since the head's product with another number of rows may be a
kernel never used before, which takes time to load."""


@dataclass(frozen=True)
class PromptScores:
    """What `score` has asked the device for; to be read when it is done."""

    rows: dict[int, PromptRows]
    ranks: Tensor
    """int32 [N], pinned: of all rows, entry by entry"""
    found: Tensor
    """int32 [N, 2, 1 + MAX_TOP_LOGPROBS], pinned: as `sampling.logprobs` leaves it"""
    vocab_size: int

    def read(self) -> dict[int, PromptLogprobs]:
        """By entry of the step."""
        ranks, found = self.ranks.numpy(), self.found.numpy()
        scores, start = dict[int, PromptLogprobs](), 0
        for entry, rows in self.rows.items():
            end, num_top = start + rows.num, min(rows.num_top, self.vocab_size)
            ids, values = found[start:end, 0], found[start:end, 1].view(np.float32)
            scores[entry] = PromptLogprobs(
                rows.first + 1,
                np.where(ids[:, 0] < 0, np.float32(np.nan), values[:, 0]).tobytes(),
                ranks[start:end].tobytes(),
                ids[:, 1 : 1 + num_top].tobytes(),
                values[:, 1 : 1 + num_top].tobytes(),
            )
            start = end
        return scores


def score(model: CudaLlama, history: Tensor, step: Step, columns: Columns) -> PromptScores:
    """Behind a step's forward pass and before the next one, on its stream. `history` is int32 [seats, tokens] and holds
    the whole prompts."""
    starts = np.cumsum(columns.new) - columns.new - columns.computed  # where row 0 of each sequence would stand
    num = sum(rows.num for rows in step.prompt_rows.values())
    padded = -(-num // SLICE_ROWS) * SLICE_ROWS
    which = np.zeros((2, padded), np.int64)  # rows of the model's, and where in history the token behind each is
    num_top, start = np.full(padded, -1, np.int32), 0
    for entry, rows in step.prompt_rows.items():
        end, inside = start + rows.num, np.arange(rows.first, rows.first + rows.num)
        which[0, start:end] = starts[entry] + inside
        which[1, start:end] = int(columns.seats[entry]) * history.shape[1] + inside + 1
        num_top[start:end] = rows.num_top
        start = end
    device = history.device
    chosen, places = torch.from_numpy(which).pin_memory().to(device, non_blocking=True)
    tokens = history.view(-1).index_select(0, places)
    packed = sampling.scored_columns(num_top).pin_memory().to(device, non_blocking=True)
    found = torch.zeros(padded, 2, 1 + MAX_TOP_LOGPROBS, dtype=torch.int32, device=device)
    ranks = torch.zeros(padded, dtype=torch.int32, device=device)
    for begin in range(0, padded, SLICE_ROWS):
        part = slice(begin, begin + SLICE_ROWS)
        logits = model.logits(chosen[part])
        finite = logits.sum(-1).isfinite()
        known = torch.where(finite, tokens[part], -1)
        sampling.logprobs(logits, SamplingInputs(packed[:, part]), known, found[part])
        own = logits.gather(1, tokens[part].long().unsqueeze(1))
        ranks[part] = (logits > own).sum(-1, dtype=torch.int32) + 1
    return PromptScores(step.prompt_rows, _to_host(ranks[:num]), _to_host(found[:num]), logits.shape[1])


def _to_host(tensor: Tensor) -> Tensor:
    pinned = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
