"""From logits to tokens, for sequences with different parameters in one batch.

The order of the steps is that of `SamplingParams`. A token is a pure function of (seed, position, logits of its row):
one uniform number is made from (seed, position) and looked up in the row's cumulative distribution, so nothing
depends on who else is in the batch or in which order. Greedy rows cost one argmax.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor

from gptq_api.sequence import Sequence
from gptq_api.types import SamplingParams, TokenLogprobs

_CANDIDATES = 256
"""top-p looks at so many most likely tokens first; a row whose mass is not in them is sorted whole"""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from 53 bits of BLAKE2b(seed, position): independent for every pair."""
    message = (seed & (2**64 - 1)).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 11) / 2**53


def sample(logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Logits float32 [S, V], overwritten; row i belongs to sequences[i], whose next token it is.

    Returns the tokens and, where asked for, their logprobs. A row that is not finite gives -1 and None.
    """
    # A sum is finite exactly when all terms are: logits are far from overflowing float32.
    finite = logits.sum(-1).isfinite()
    all_finite = bool(finite.all())
    if not all_finite:
        logits.masked_fill_(~finite.unsqueeze(1), 0.0)
    wants_logprobs = any(s.params.top_logprobs is not None for s in sequences)
    raw = logits.clone() if wants_logprobs else logits
    for row, sequence in enumerate(sequences):
        if _adjusts(sequence):
            _adjust(logits[row], sequence)
    drawn = [i for i, s in enumerate(sequences) if s.params.temperature > 0]
    tokens: list[int] = logits.argmax(-1).tolist() if len(drawn) < len(sequences) else [0] * len(sequences)
    if drawn:
        rows = logits if len(drawn) == len(sequences) else logits[drawn]
        for i, token in zip(drawn, _draw(rows, [sequences[i] for i in drawn]), strict=True):
            tokens[i] = token
    logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
    if wants_logprobs:
        logprobs = _logprobs(raw, tokens, sequences)
    if not all_finite:
        for i in (~finite).nonzero().flatten().tolist():
            tokens[i], logprobs[i] = -1, None
    return tokens, logprobs


def _adjusts(sequence: Sequence) -> bool:
    p = sequence.params
    return (
        bool(p.logit_bias)
        or p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or (sequence.num_output_tokens < p.min_tokens and bool(p.stop_token_ids))
    )


def _adjust(logits: Tensor, sequence: Sequence) -> None:
    """Bias and penalties of one row [V], in place."""
    p, device = sequence.params, logits.device
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), dtype=torch.int64, device=device)
        logits.index_add_(0, ids, torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=device))
    if p.repetition_penalty != 1.0:
        ids = torch.tensor(list(set(sequence.token_ids)), dtype=torch.int64, device=device)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    output = sequence.token_ids[sequence.num_prompt_tokens :]
    if output and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(output)
        ids = torch.tensor(list(counts), dtype=torch.int64, device=device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=device)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * times
    if sequence.num_output_tokens < p.min_tokens and p.stop_token_ids:
        logits[list(p.stop_token_ids)] = -torch.inf


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token for each row [V] with temperature above 0."""
    params = [s.params for s in sequences]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits.device)
    # Relative to the best first: the smallest temperatures must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.unsqueeze(1)
    probabilities = scaled.softmax(-1)
    draws = [uniform(s.params.seed, len(s.token_ids)) for s in sequences]
    if any(p.min_p > 0 for p in params):
        min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=logits.device)
        best = probabilities.amax(-1, keepdim=True)
        probabilities.masked_fill_(probabilities < best * min_p.unsqueeze(1), 0.0)
    tokens = [0] * len(sequences)
    plain = [i for i, p in enumerate(params) if not _filters(p)]
    if plain:
        rows = probabilities if len(plain) == len(params) else probabilities[plain]
        for i, token in zip(plain, _look_up(rows, [draws[i] for i in plain]), strict=True):
            tokens[i] = token
    filtered = [i for i, p in enumerate(params) if _filters(p)]
    if filtered:
        rows = probabilities if len(filtered) == len(params) else probabilities[filtered]
        drawn = _draw_filtered(rows, [params[i] for i in filtered], [draws[i] for i in filtered])
        for i, token in zip(filtered, drawn, strict=True):
            tokens[i] = token
    return tokens


def _filters(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1.0


def _draw_filtered(probabilities: Tensor, params: list[SamplingParams], draws: list[float]) -> list[int]:
    """Rows [V] with top-k or top-p: among the most likely candidates where they suffice, else among all."""
    size = probabilities.shape[1]
    if size <= _CANDIDATES:
        return _nucleus(probabilities.sort(-1, descending=True), probabilities.sum(-1), params, draws)
    best = probabilities.topk(_CANDIDATES, -1)
    mass = probabilities.sum(-1)
    inside = best[0].sum(-1)
    enough = [
        0 < p.top_k <= _CANDIDATES or (p.top_k <= 0 and covered > p.top_p * total)
        for p, covered, total in zip(params, inside.tolist(), mass.tolist(), strict=True)
    ]
    tokens = [0] * len(params)
    for wanted in (True, False):
        rows = [i for i, e in enumerate(enough) if e is wanted]
        if not rows:
            continue
        ranked = (best[0][rows], best[1][rows]) if wanted else probabilities[rows].sort(-1, descending=True)
        drawn = _nucleus(ranked, mass[rows], [params[i] for i in rows], [draws[i] for i in rows])
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    return tokens


def _nucleus(
    ranked: tuple[Tensor, Tensor], mass: Tensor, params: list[SamplingParams], draws: list[float]
) -> list[int]:
    """Ranked (probabilities, ids), both [S, C], best first; `mass` [S] is what the whole row adds up to.

    top-k first, then the smallest head that holds top_p of what top-k left; its last token is the one that reaches it.
    """
    values, ids = ranked[0].to(torch.float64), ranked[1]
    device, width = values.device, values.shape[1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else width for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    values = values.masked_fill(torch.arange(width, device=device) >= top_k.unsqueeze(1), 0.0)
    cumulative = values.cumsum(-1)
    kept = torch.tensor([p.top_k > 0 for p in params], device=device)
    total = torch.where(kept, cumulative[:, -1], mass.to(torch.float64))
    before = cumulative - values
    # The first token always stays, whatever top_p.
    out = before >= (top_p * total).unsqueeze(1)
    out[:, 0] = False
    picked = _look_up(values.masked_fill(out, 0.0), draws)
    return ids.gather(1, torch.tensor(picked, device=device).unsqueeze(1)).flatten().tolist()


def _look_up(weights: Tensor, draws: list[float]) -> list[int]:
    """The index at which the cumulative sum of each row [C] passes draw * total: never one of weight 0."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    targets = torch.tensor(draws, dtype=torch.float64, device=weights.device).unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, targets, right=True).flatten()
    # draw * total can round up to the total: then it is the last token of weight above 0.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(index, last).tolist()


def _logprobs(raw: Tensor, tokens: list[int], sequences: list[Sequence]) -> list[TokenLogprobs | None]:
    wanted = [i for i, s in enumerate(sequences) if s.params.top_logprobs is not None]
    table = raw[wanted].log_softmax(-1)
    chosen = (
        table.gather(1, torch.tensor([tokens[i] for i in wanted], device=raw.device).unsqueeze(1)).flatten().tolist()
    )
    counts = [min(sequences[i].params.top_logprobs or 0, raw.shape[1]) for i in wanted]
    values, ids = table.topk(max(counts), -1) if max(counts) else (table[:, :0], table[:, :0])
    result: list[TokenLogprobs | None] = [None] * len(sequences)
    ranked = zip(wanted, counts, chosen, values.tolist(), ids.tolist(), strict=True)
    for i, count, logprob, row_values, row_ids in ranked:
        result[i] = TokenLogprobs(
            logprob, [(int(t), v) for t, v in zip(row_ids[:count], row_values[:count], strict=True)]
        )
    return result
