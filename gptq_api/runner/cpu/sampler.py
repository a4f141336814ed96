"""From logits to tokens, for sequences with different parameters in one batch.

The order of the steps is that of `SamplingParams`. A token is a pure function of (seed, position, logits of its row):
nothing depends on who else is in the batch or in which order. Greedy rows cost one argmax.

Drawing is an exponential race, also known as Gumbel-max: every token id that the filters keep has a random number of
its own, made from (seed, position, id), and the highest of (logit - best) / temperature + Gumbel noise wins. A logit
that moves by a rounding changes the token only where the first two of the race are as close as that. (A number looked
up in the cumulative distribution meets another token as soon as the logits before it have moved.)

The arithmetic is that of ext/sampler/, so that a seed gives the same text on either device. top-k and top-p weigh a
token with exp((logit - best) / temperature) in 40-bit fixed point, whose sums are exact in any order; ranks are by
logit, then by the lower id.

This is for devices and installations without our kernels; `native_sampler` finds the same tokens with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptq_api.kernels.sampling import inverse_temperature
from gptq_api.runner.seats import Seat
from gptq_api.types import SamplingParams, TokenLogprobs

_CANDIDATES = 256
"""top-k and top-p look at so many most likely tokens first; a row that needs more is sorted whole"""
_WEIGHT_ONE = 2.0**40
_RACE_ELEMENTS = 1 << 16
"""logits whose random numbers are made at a time, so that they stay in the cache"""
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


def random_words(bits: list[int], vocab_size: int) -> npt.NDArray[np.uint32]:
    """The random numbers of all token ids in rows of these `random_bits`: uint32 [S, vocab_size].

    Two rounds of multiply and xor-shift, the second half of the row's bits between them, with the constants of
    lowbias32 (Wellons and others, "Prospecting for hash functions").
    """
    key1, key0 = np.array([divmod(b, 2**32) for b in bits], dtype=np.uint32).T[:, :, None]
    x: npt.NDArray[np.uint32] = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B9) + key0
    x ^= x >> 16
    x *= np.uint32(0x21F0AAAD)
    x += key1
    x ^= x >> 15
    x *= np.uint32(0xD35A2D97)
    x ^= x >> 15
    return x


def sample(
    logits: Tensor, seats: list[Seat], masks: Mapping[int, npt.NDArray[np.int32]] | None = None
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Logits float32 [S, V], overwritten; row i belongs to seats[i], whose next token it is. `masks`: by row, what a
    grammar allows, a bit for each token as in `step.Masks`; every seat with a grammar has one.

    Returns the tokens and, where asked for, their logprobs. A row that is not finite gives -1 and None.
    """
    # A sum is finite exactly when all terms are: logits are far from overflowing float32.
    finite = logits.sum(-1).isfinite()
    all_finite = bool(finite.all())
    if not all_finite:
        logits.masked_fill_(~finite.unsqueeze(1), 0.0)
    wants_logprobs = any(s.params.top_logprobs is not None for s in seats)
    raw = logits.clone() if wants_logprobs else logits
    for row, seat in enumerate(seats):
        if _adjusts(seat):
            _adjust(logits[row], seat)
            if not bool(logits[row].isfinite().all()):
                finite[row], all_finite = False, False
                logits[row] = 0.0
    for row, words in (masks or {}).items():
        allowed = np.unpackbits(words.view(np.uint8), count=logits.shape[1], bitorder="little")
        logits[row].masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), _LOWEST)
    drawn = [i for i, s in enumerate(seats) if s.params.temperature > 0]
    tokens: list[int] = logits.argmax(-1).tolist() if len(drawn) < len(seats) else [0] * len(seats)
    if drawn:
        rows = logits if len(drawn) == len(seats) else logits[drawn]
        for i, token in zip(drawn, _draw(rows, [seats[i] for i in drawn]), strict=True):
            tokens[i] = token
    logprobs: list[TokenLogprobs | None] = [None] * len(seats)
    if wants_logprobs:
        logprobs = _logprobs(raw, tokens, seats)
    if not all_finite:
        for i in (~finite).nonzero().flatten().tolist():
            tokens[i], logprobs[i] = -1, None
    return tokens, logprobs


def _adjusts(seat: Seat) -> bool:
    p = seat.params
    return (
        bool(p.logit_bias)
        or p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or _may_not_stop(seat)
    )


def _may_not_stop(seat: Seat) -> bool:
    """By min_tokens; where there is a grammar, its masks say so."""
    p = seat.params
    return seat.num_output_tokens < p.min_tokens and bool(p.stop_token_ids) and not p.grammar


def _adjust(logits: Tensor, seat: Seat) -> None:
    """Bias and penalties of one row [V], in place."""
    p, device = seat.params, logits.device
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), dtype=torch.int64, device=device)
        logits.index_add_(0, ids, torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=device))
    if p.repetition_penalty != 1.0:
        ids = torch.tensor(list(set(seat.token_ids)), dtype=torch.int64, device=device)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    output = seat.token_ids[seat.num_prompt_tokens :]
    if output and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(output)
        ids = torch.tensor(list(counts), dtype=torch.int64, device=device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=device)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * times
    if _may_not_stop(seat):
        logits[list(p.stop_token_ids)] = _LOWEST


def _draw(logits: Tensor, seats: list[Seat]) -> list[int]:
    """One token for each row [V] with temperature above 0."""
    params = [s.params for s in seats]
    bits = [random_bits(s.params.seed, len(s.token_ids)) for s in seats]
    inverse = _column([inverse_temperature(p.temperature) for p in params], logits)
    # Relative to the best first: the smallest temperatures must not overflow.
    share = logits.sub(logits.amax(-1, keepdim=True)).mul_(inverse).exp_()
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0]
    if filtered:
        whole = len(filtered) == len(params)
        rows, row_share = (logits, share) if whole else (logits[filtered], share[filtered])
        share[filtered] = row_share * _kept(rows, row_share, [params[i] for i in filtered])
    return _race(share, bits)


def _race(share: Tensor, bits: list[int]) -> list[int]:
    """Shares exp((logit - best) / temperature) float32 [S, V], 0 for what may not be drawn -> one token for each row.

    The highest share / E wins, E exponential: the logarithm of that is the scaled logit plus Gumbel noise.
    """
    tokens: list[int] = []
    step = max(1, _RACE_ELEMENTS // share.shape[1])
    for start in range(0, len(bits), step):
        uniform = random_words(bits[start : start + step], share.shape[1]) * 2.0**-32
        uniform += 2.0**-33
        exponential = torch.from_numpy(uniform).neg_().log1p_().neg_().to(share.device)
        tokens += share[start : start + step].div(exponential).argmax(-1).tolist()
    return tokens


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _kept(logits: Tensor, share: Tensor, params: list[SamplingParams]) -> Tensor:
    """What min_p, top-k and top-p leave of rows [V], bool [S, V]: at least the best token of each."""
    weights = (share * _WEIGHT_ONE).to(torch.int64)
    weights.masked_fill_(share < _column([p.min_p for p in params], logits), 0)
    kept = weights > 0
    ranked = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if ranked:
        whole = len(ranked) == len(params)
        rows, row_weights = (logits, weights) if whole else (logits[ranked], weights[ranked])
        kept[ranked] &= _head(rows, row_weights, [params[i] for i in ranked])
    return kept


def _head(logits: Tensor, weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """What top-k and top-p leave, bool [S, V]: found among the most likely candidates where they suffice, else among
    all."""
    mass, vocab_size = weights.sum(-1), logits.shape[1]
    head = torch.zeros_like(logits, dtype=torch.bool)
    rest = list(range(len(params)))
    if vocab_size > _CANDIDATES:
        values, ids = _ties_by_id(*logits.topk(_CANDIDATES, -1))
        kept = _nucleus(weights.gather(1, ids), mass, params)
        head.scatter_(1, ids, kept)
        # Of tokens as likely as the last candidate some may be missing: a cut among those is left to the sort.
        fits = (kept.sum(-1) <= (values > values[:, -1:]).sum(-1)).tolist()
        rest = [i for i, p in enumerate(params) if not fits[i] or p.top_k > _CANDIDATES]
    if rest:
        ids = logits[rest].sort(dim=-1, descending=True, stable=True)[1]
        kept = _nucleus(weights[rest].gather(1, ids), mass[rest], [params[i] for i in rest])
        head[rest] = torch.zeros_like(kept).scatter_(1, ids, kept)
    return head


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


def _logprobs(raw: Tensor, tokens: list[int], seats: list[Seat]) -> list[TokenLogprobs | None]:
    wanted = [i for i, s in enumerate(seats) if s.params.top_logprobs is not None]
    table = raw[wanted].log_softmax(-1)
    chosen = (
        table.gather(1, torch.tensor([tokens[i] for i in wanted], device=raw.device).unsqueeze(1)).flatten().tolist()
    )
    counts = [min(seats[i].params.top_logprobs or 0, raw.shape[1]) for i in wanted]
    values, ids = table.topk(max(counts), -1) if max(counts) else (table[:, :0], table[:, :0])
    result: list[TokenLogprobs | None] = [None] * len(seats)
    ranked = zip(wanted, counts, chosen, values.tolist(), ids.tolist(), strict=True)
    for i, count, logprob, row_values, row_ids in ranked:
        result[i] = TokenLogprobs(
            logprob, [(int(t), v) for t, v in zip(row_ids[:count], row_values[:count], strict=True)]
        )
    return result
