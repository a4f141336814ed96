"""From logits to tokens, for sequences with different parameters in one batch.

The order of the steps is that of `SamplingParams`. A token is a pure function of (seed, position, logits of its row):
one random number is made from (seed, position) and looked up in the row's cumulative distribution, so nothing depends
on who else is in the batch or in which order. Greedy rows cost one argmax.

The arithmetic is that of ext/sampler.cu, so that a seed gives the same text on either device: a token's weight is
exp((logit - best) / temperature) in 40-bit fixed point, whose sums are exact in any order; ranks are by logit, then by
the lower id; the draw is looked up in the order of ids.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from gptq_api.kernels.sampling import inverse_temperature
from gptq_api.sequence import Sequence
from gptq_api.types import SamplingParams, TokenLogprobs

_CANDIDATES = 256
"""top-k and top-p look at so many most likely tokens first; a row that needs more is sorted whole"""
_WEIGHT_ONE = 2.0**40
_LOWEST = torch.finfo(torch.float32).min
"""the logit of a forbidden token: not -inf, which would be a broken row"""


def random_bits(seed: int, position: int) -> int:
    """64 bits of Philox4x32-10 with `seed` as key and `position` as counter: independent for every pair.

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    word = 0xFFFFFFFF
    key0, key1 = seed & word, seed >> 32 & word
    c0, c1, c2, c3 = position & word, 0, 0, 0
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ key0, product1 & word, product0 >> 32 ^ c3 ^ key1, product0 & word
        key0, key1 = key0 + 0x9E3779B9 & word, key1 + 0xBB67AE85 & word
    return c1 << 32 | c0


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
            if not bool(logits[row].isfinite().all()):
                finite[row], all_finite = False, False
                logits[row] = 0.0
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
        logits[list(p.stop_token_ids)] = _LOWEST


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token for each row [V] with temperature above 0."""
    params = [s.params for s in sequences]
    bits = [random_bits(s.params.seed, len(s.token_ids)) for s in sequences]
    inverse = _column([inverse_temperature(p.temperature) for p in params], logits)
    # Relative to the best first: the smallest temperatures must not overflow.
    share = logits.sub(logits.amax(-1, keepdim=True)).mul_(inverse).exp_()
    weights = (share * _WEIGHT_ONE).to(torch.int64)
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(share < _column([p.min_p for p in params], logits), 0)
    tokens = [0] * len(sequences)
    plain = [i for i, p in enumerate(params) if not _filters(p)]
    if plain:
        rows = weights if len(plain) == len(params) else weights[plain]
        for i, token in zip(plain, _look_up(rows, [bits[i] for i in plain]), strict=True):
            tokens[i] = token
    filtered = [i for i, p in enumerate(params) if _filters(p)]
    if filtered:
        whole = len(filtered) == len(params)
        rows, row_weights = (logits, weights) if whole else (logits[filtered], weights[filtered])
        drawn = _draw_filtered(rows, row_weights, [params[i] for i in filtered], [bits[i] for i in filtered])
        for i, token in zip(filtered, drawn, strict=True):
            tokens[i] = token
    return tokens


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _filters(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1.0


def _draw_filtered(logits: Tensor, weights: Tensor, params: list[SamplingParams], bits: list[int]) -> list[int]:
    """Rows [V] with top-k or top-p: among the most likely candidates where they suffice, else among all."""
    mass = weights.sum(-1)
    tokens = [0] * len(params)
    rest = list(range(len(params)))
    if logits.shape[1] > _CANDIDATES:
        values, ids = _ties_by_id(*logits.topk(_CANDIDATES, -1))
        values_weights = weights.gather(1, ids)
        kept = _nucleus(values_weights, mass, params)
        # Of tokens as likely as the last candidate some may be missing: a cut among those is left to the sort.
        fits = (kept.sum(-1) <= (values > values[:, -1:]).sum(-1)).tolist()
        enough = [p.top_k <= _CANDIDATES and e for p, e in zip(params, fits, strict=True)]
        inside = [i for i in rest if enough[i]]
        rest = [i for i in rest if not enough[i]]
        if inside:
            drawn = _draw_kept(ids[inside], (values_weights * kept)[inside], [bits[i] for i in inside])
            for i, token in zip(inside, drawn, strict=True):
                tokens[i] = token
    if rest:
        ids = logits[rest].sort(dim=-1, descending=True, stable=True)[1]
        ranked = weights[rest].gather(1, ids)
        kept = _nucleus(ranked, mass[rest], [params[i] for i in rest])
        for i, token in zip(rest, _draw_kept(ids, ranked * kept, [bits[i] for i in rest]), strict=True):
            tokens[i] = token
    return tokens


def _ties_by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of [S, C], values descending -> the same, ids ascending among equal values."""
    if not bool((values[:, 1:] == values[:, :-1]).any()):
        return values, ids
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _nucleus(weights: Tensor, mass: Tensor, params: list[SamplingParams]) -> Tensor:
    """Weights [S, C], best first -> which of them stay, bool [S, C]; `mass` [S] is what the whole row weighs.

    top-k first, then the smallest head that holds top_p of what top-k left; its last token is the one that reaches it.
    """
    device, width = weights.device, weights.shape[1]
    top_k = torch.tensor([min(p.top_k, width) if p.top_k > 0 else width for p in params], device=device).unsqueeze(1)
    cumulative = weights.cumsum(-1)
    limited = torch.tensor([p.top_k > 0 for p in params], device=device)
    total = torch.where(limited, cumulative.gather(1, top_k - 1).squeeze(1), mass)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device).double()
    # The first token always stays, whatever top_p.
    need = (top_p * total.double()).ceil().to(torch.int64).clamp(min=1)
    need = torch.where(top_p < 1.0, need, torch.iinfo(torch.int64).max)
    return (torch.arange(width, device=device) < top_k) & (cumulative - weights < need.unsqueeze(1))


def _draw_kept(ids: Tensor, weights: Tensor, bits: list[int]) -> list[int]:
    """One of the ids [S, C] by weights [S, C], looked up in the order of ids."""
    ids, order = ids.sort(-1)
    picked = torch.tensor(_look_up(weights.gather(1, order), bits), device=ids.device)
    tokens: list[int] = ids.gather(1, picked.unsqueeze(1)).flatten().tolist()
    return tokens


def _look_up(weights: Tensor, bits: list[int]) -> list[int]:
    """The index at which the cumulative sum of each row [C] passes bits / 2**64 of the total: never one of weight 0."""
    cumulative = weights.cumsum(-1)
    targets = [(b * total) >> 64 for b, total in zip(bits, cumulative[:, -1].tolist(), strict=True)]
    wanted = torch.tensor(targets, dtype=torch.int64, device=weights.device).unsqueeze(1)
    index: list[int] = torch.searchsorted(cumulative, wanted, right=True).flatten().tolist()
    return index


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
