"""From logits to the logprobs of a prompt's own tokens: a slice of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_api.types import PromptLogprobs

SLICE_ROWS = 64
"""whose logits are there at a time: 8 MB for 32,000 tokens, and a table of log-probabilities as large beside them"""


class Scored(NamedTuple):
    """A slice of N rows, on the host."""

    logprobs: Tensor
    """float32 [N], NaN where the logits were not finite"""
    ranks: Tensor
    """int32 [N]"""
    top_ids: Tensor
    """int32 [N, n]"""
    top_logprobs: Tensor
    """float32 [N, n]"""


def in_torch(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def scored(
    logits: Tensor, token_ids: list[int], num_top: int, log_softmax: Callable[[Tensor], Tensor] = in_torch
) -> Scored:
    """Logits float32 [N, V], and the token that follows each of the rows. `log_softmax`: the sampler's, so that a token
    is as likely as if it were sampled; it may overwrite the logits."""
    finite = logits.sum(-1).isfinite()
    chosen = torch.tensor(token_ids, dtype=torch.int64).to(logits.device).unsqueeze(1)
    ranks = 1 + (logits > logits.gather(1, chosen)).sum(-1, dtype=torch.int32)
    table = log_softmax(logits)
    logprobs = table.gather(1, chosen).squeeze(1).masked_fill_(~finite, torch.nan)
    values, ids = table.topk(min(num_top, table.shape[1]), -1)
    return Scored(logprobs.cpu(), ranks.cpu(), ids.to(torch.int32).cpu(), values.cpu())


def packed(first: int, parts: list[Scored]) -> PromptLogprobs:
    """Slices that follow each other, the first token of the first of them at `first` of its prompt."""
    columns = zip(*parts, strict=True)
    return PromptLogprobs(first, *(b"".join(part.numpy().tobytes() for part in column) for column in columns))
