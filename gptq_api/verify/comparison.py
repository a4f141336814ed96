"""Where two models' logits for the same tokens part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {"float32": 2e-3, "float16": 0.03, "bfloat16": 0.06, "int8": 0.12}
"""the largest error of one row of logits, as a share of its norm, that rounding the activations to a type explains"""
_MARGIN = 4.0
"""largest errors of a text's logits within which two tokens are as good as equal"""


@dataclass(frozen=True)
class Parting:
    """A greedy token of ours that is not the reference's."""

    position: int
    """in the text, prompt included"""
    ours: int
    theirs: int
    margin: float
    """by how much the reference prefers its own, in logits"""
    is_tie: bool
    """the margin is as small as the rounding that there is"""


@dataclass(frozen=True)
class Comparison:
    """One text: a prompt, and what we answered greedily."""

    rows: int
    largest_error: float
    """of a row's logits less their mean, as a share of the norm of the reference's"""
    worst_position: int
    mean_divergence: float
    """Kullback-Leibler, nats per token, of our probabilities from the reference's"""
    same_best: int
    """rows whose best token is the same"""
    greedy_tokens: int
    partings: tuple[Parting, ...]


def compare(ours: Tensor, theirs: Tensor, token_ids: list[int], num_prompt_tokens: int) -> Comparison:
    """`ours`, `theirs`: float32 [T, V], the logits after each of the T `token_ids`, of which those behind the prompt
    are our greedy answer. Not finite: the errors are infinite from there on."""
    centred, reference = (logits - logits.mean(1, keepdim=True) for logits in (ours, theirs))
    error = (centred - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-9)
    error = error.nan_to_num(nan=torch.inf)
    worst = int(error.argmax())
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True
    )
    # Rounding moves a difference of two logits by no more than twice the largest error of one.
    rounding = _MARGIN * float((centred - reference).abs().max().nan_to_num(nan=0.0))
    partings = []
    for position in range(num_prompt_tokens, len(token_ids)):
        row, token = theirs[position - 1], token_ids[position]
        best = int(row.argmax())
        if best != token:
            margin = float(row[best] - row[token])
            partings.append(Parting(position, token, best, margin, margin <= rounding))
    return Comparison(
        rows=len(error),
        largest_error=float(error[worst]),
        worst_position=worst,
        mean_divergence=float(divergence.sum(1).mean()),
        same_best=int((ours.argmax(1) == theirs.argmax(1)).sum()),
        greedy_tokens=len(token_ids) - num_prompt_tokens,
        partings=tuple(partings),
    )


def limit_of(dtype: str, has_int8_activations: bool) -> float:
    return LIMITS["int8" if has_int8_activations else dtype]
