"""Logits to tokens on a CUDA device: one launch for all rows, whatever their parameters, without host synchronisation.

Per sequence, on the host: `SamplingTable.set(seat, params, num_prompt_tokens)` when it is admitted. Per step:

1. `needs = table.fill(staging, seats, lengths)` writes the step's columns into pinned memory, numpy's int32 [FIELDS, S]
   (a view with any row stride, so that it can be a part of the step's one staging buffer); after the copy the same view
   of the device's buffer is `SamplingInputs(view)`.
2. Where `needs.adjust` or a grammar says what may be sampled: `table.entries(seats, lengths)` and `packed_masks(...)`,
   copied into int32 device tensors, and `adjust(...)`, which must come before `sample`. Write it to a second [S, V]
   tensor where `needs.logprobs` too, else in place.
3. `sample(...)`: everything else is decided on the device, row by row. Appends to `history` what it drew.
4. Where `needs.logprobs`: `logprobs(raw logits, ...)` after `sample`; `read_logprobs` on the host's copy of its output.

All three may be captured in CUDA graphs: they read nothing from the host but sizes and addresses. A row is a pure
function of its logits, parameters, seed and length: sums are of integers, so neither the other rows nor the order in
which threads arrive change a bit. `gptq_api/runner/cpu/sampler.py` computes the same on the CPU.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda
from gptq_api.types import SamplingParams, TokenLogprobs

_COLUMN = struct.Struct("<3i2I2i6f")
FIELDS = _COLUMN.size // 4
"""int32 or float32 words per row, in this order: seat, length, num_prompt_tokens, seed (2 words, low first), top_k,
top_logprobs (-1: none), 1 / temperature (0: greedy), top_p, min_p, repetition, presence, frequency penalty"""
MAX_TOP_LOGPROBS = 20
_LARGEST_INVERSE_TEMPERATURE = 1e30
_LARGEST_VOCABULARY = 1 << 20
_PADDING = _COLUMN.pack(-1, 0, 0, 0, 0, 0, -1, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def inverse_temperature(temperature: float) -> float:
    """1 / temperature, kept finite in float32; 0 for greedy."""
    return min(1 / temperature, _LARGEST_INVERSE_TEMPERATURE) if temperature > 0 else 0.0


@dataclass(slots=True, frozen=True)
class StepNeeds:
    """Which of the optional launches a step needs."""

    adjust: bool
    logprobs: bool


@dataclass(slots=True, frozen=True)
class SamplingInputs:
    """The rows' parameters on the device."""

    packed: Tensor
    """int32 [FIELDS, S], columns contiguous; column i is row i of the logits; seat -1: the row is skipped"""

    def __post_init__(self) -> None:
        p = self.packed
        if p.dtype != torch.int32 or p.dim() != 2 or p.shape[0] != FIELDS or (p.shape[1] > 1 and p.stride(1) != 1):
            raise ValueError(f"sampling inputs {tuple(p.shape)} {p.dtype}, expected int32 [{FIELDS}, S], last stride 1")


class SamplingTable:
    """The sampling parameters of the running sequences, on the host, by seat."""

    def __init__(self, max_num_seqs: int) -> None:
        self._columns = np.empty((FIELDS, max_num_seqs + 1), np.int32)
        self._columns[:] = np.frombuffer(_PADDING, np.int32)[:, None]  # the last column serves seat -1
        self._adjusted: set[int] = set()
        self._logged: set[int] = set()
        self._constrained: set[int] = set()
        self._bias: dict[int, dict[int, float]] = {}
        self._stops: dict[int, tuple[int, tuple[int, ...]]] = {}

    def set(self, seat: int, params: SamplingParams, num_prompt_tokens: int) -> None:
        """The sequence that has `seat` from now on. ValueError for more logprobs than the kernel keeps."""
        p = params
        if p.top_logprobs is not None and p.top_logprobs > MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs {p.top_logprobs}; at most {MAX_TOP_LOGPROBS} are kept")
        self._columns[:, seat] = np.frombuffer(
            _COLUMN.pack(
                seat,
                0,
                num_prompt_tokens,
                p.seed & 0xFFFFFFFF,
                p.seed >> 32 & 0xFFFFFFFF,
                max(p.top_k, 0),
                -1 if p.top_logprobs is None else p.top_logprobs,
                inverse_temperature(p.temperature),
                p.top_p,
                p.min_p,
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
            ),
            np.int32,
        )
        self._bias.pop(seat, None)
        self._stops.pop(seat, None)
        if p.logit_bias:
            self._bias[seat] = p.logit_bias
        if p.min_tokens > 0 and p.stop_token_ids and not p.grammar:  # a grammar's masks say when it may end
            self._stops[seat] = (num_prompt_tokens + p.min_tokens, p.stop_token_ids)
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        for seats, belongs in (
            (self._adjusted, penalised or bool(p.logit_bias)),
            (self._logged, p.top_logprobs is not None),
            (self._constrained, bool(p.grammar)),
        ):
            (seats.add if belongs else seats.discard)(seat)

    def fill(self, staging: NDArray[np.int32], seats: list[int], lengths: list[int]) -> StepNeeds:
        """The columns of the rows `seats` (-1: padding) into `staging`, int32 [FIELDS, S] on the host; `lengths[i]`
        tokens stand before the one that row i samples."""
        self._columns.take(seats, axis=1, out=staging, mode="wrap")
        staging[1] = lengths
        adjust = not self._adjusted.isdisjoint(seats)
        if not adjust and self._stops:
            adjust = any(self._waits(seat, length) for seat, length in zip(seats, lengths, strict=True))
        return StepNeeds(adjust, not self._logged.isdisjoint(seats))

    def entries(self, seats: list[int], lengths: list[int]) -> Tensor:
        """The sparse part of `adjust`, int32 [S + 1 + 2 N] on the host: where each row's entries start, then (token,
        float32 bits) of all N entries: a bias to add, or -inf for a stop token that min_tokens forbids."""
        starts, pairs = [0], bytearray()
        for seat, length in zip(seats, lengths, strict=True):
            for token, bias in self._bias.get(seat, {}).items():
                pairs += struct.pack("<if", token, bias)
            if self._waits(seat, length):
                for token in self._stops[seat][1]:
                    pairs += struct.pack("<if", token, -math.inf)
            starts.append(len(pairs) // 8)
        return _words(struct.pack(f"<{len(starts)}i", *starts) + bytes(pairs))

    def constrained(self, seats: list[int]) -> bool:
        """Whether a grammar says what one of these rows may sample."""
        return not self._constrained.isdisjoint(seats)

    def top_logprobs(self, seats: list[int]) -> list[int]:
        """How many each of these sequences asked for; -1: none."""
        found: list[int] = self._columns[6, seats].tolist()
        return found

    def _waits(self, seat: int, length: int) -> bool:
        return seat in self._stops and length < self._stops[seat][0]


def _words(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32)


def mask_words(vocab_size: int) -> int:
    """int32 words of one mask."""
    return -(-vocab_size // 32)


def packed_masks(num_rows: int, rows: Sequence[int], words: NDArray[np.int32]) -> Tensor:
    """What grammars allow in `rows` of the logits, int32 [num_rows + M * mask_words] on the host: for each row which
    mask is its own, -1: none; then the M masks, as in `step.Masks`."""
    which = np.full(num_rows, -1, np.int32)
    which[rows] = np.arange(len(rows), dtype=np.int32)
    return torch.from_numpy(np.concatenate([which, words.reshape(-1)]))


def scored_columns(num_top: NDArray[np.int32]) -> Tensor:
    """int32 [FIELDS, N] on the host, for rows of which `logprobs` alone is wanted: so many best tokens each, -1: none,
    the row is skipped."""
    columns = _words(_PADDING).unsqueeze(1).repeat(1, len(num_top))
    columns[0], columns[6] = 0, torch.from_numpy(num_top)
    return columns


def sample(logits: Tensor, inputs: SamplingInputs, history: Tensor, out_tokens: Tensor) -> None:
    """Logits float32 [S, V] -> out_tokens int32 [S], and history[seat, length] = token.

    `history` is int32 [max_num_seqs, max_model_len]. A row that holds NaN or an infinity gives -1 (and token 0 in
    history, which must stay a valid input id), a padding row -1. Greedy: the lowest of the best ids. Otherwise the
    order of `SamplingParams` from temperature on.
    """
    _check(logits, inputs, history)
    _check_tokens(out_tokens, logits)
    with torch.cuda.device(logits.device):
        _cuda.sample(*_row_sizes(logits, inputs), *_history(history), out_tokens.data_ptr(), _stream(logits))


def adjust(
    logits: Tensor,
    inputs: SamplingInputs,
    history: Tensor,
    entries: Tensor | None,
    out: Tensor | None = None,
    masks: Tensor | None = None,
) -> None:
    """logit_bias, penalties, forbidden stop tokens and grammars: logits float32 [S, V] -> `out` (None: in place).

    `entries`: `SamplingTable.entries` on the device, None where no row has any; it may be longer than they are. Rows
    without adjustments cost nothing in place and are copied otherwise. Repetition counts history[seat, :length],
    presence and frequency its part from num_prompt_tokens on. `masks`: `packed_masks` on the device, None where no row
    has one.
    """
    _check(logits, inputs, history)
    out = logits if out is None else out
    if out.shape != logits.shape or out.dtype != torch.float32 or out.stride(1) != 1 or out.device != logits.device:
        raise ValueError(f"adjusted logits {tuple(out.shape)} {out.dtype} on {out.device} for {tuple(logits.shape)}")
    if entries is not None and (entries.dtype != torch.int32 or entries.numel() <= logits.shape[0]):
        raise ValueError(f"entries {tuple(entries.shape)} {entries.dtype} for {logits.shape[0]} rows")
    if masks is not None and (
        masks.dtype != torch.int32 or (masks.numel() - logits.shape[0]) % mask_words(logits.shape[1])
    ):
        raise ValueError(f"masks {tuple(masks.shape)} {masks.dtype} for logits {tuple(logits.shape)}")
    with torch.cuda.device(logits.device):
        _cuda.sample_adjust(
            *_row_sizes(logits, inputs),
            *_history(history),
            0 if entries is None else entries.data_ptr(),
            0 if masks is None else masks.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            _stream(logits),
        )


def logprobs(logits: Tensor, inputs: SamplingInputs, tokens: Tensor, out: Tensor) -> None:
    """Raw logits float32 [S, V] and sampled tokens int32 [S] -> out int32 [S, 2, 1 + MAX_TOP_LOGPROBS]: ids, then the
    bits of their float32 log-probabilities; first the sampled token, then the best. Rows that do not ask keep what
    they had."""
    _check(logits, inputs, None)
    _check_tokens(tokens, logits)
    shape = (logits.shape[0], 2, 1 + MAX_TOP_LOGPROBS)
    if tuple(out.shape) != shape or out.dtype != torch.int32 or not out.is_contiguous():
        raise ValueError(f"logprobs {tuple(out.shape)} {out.dtype}, expected contiguous int32 {shape}")
    with torch.cuda.device(logits.device):
        _cuda.sample_logprobs(*_row_sizes(logits, inputs), tokens.data_ptr(), out.data_ptr(), _stream(logits))


def read_logprobs(row: Tensor, num_top: int) -> TokenLogprobs | None:
    """`row` int32 [2, 1 + MAX_TOP_LOGPROBS] on the host, `num_top` as the request has it; None for a row whose logits
    were not finite."""
    ids, values = row[0].tolist(), row[1].view(torch.float32).tolist()
    if ids[0] < 0:
        return None
    ranked = zip(ids[1 : num_top + 1], values[1 : num_top + 1], strict=True)
    return TokenLogprobs(values[0], [(token, value) for token, value in ranked if token >= 0])


def _check(logits: Tensor, inputs: SamplingInputs, history: Tensor | None) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1 or logits.device.type != "cuda":
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype} on {logits.device}, expected float32 [S, V] on a CUDA device"
        )
    if not 0 < logits.shape[1] <= _LARGEST_VOCABULARY or not len(logits):
        raise ValueError(f"logits {tuple(logits.shape)}: at least one row of 1 to {_LARGEST_VOCABULARY} tokens")
    if inputs.packed.shape[1] != logits.shape[0] or inputs.packed.device != logits.device:
        raise ValueError(f"{inputs.packed.shape[1]} columns on {inputs.packed.device} for {logits.shape[0]} rows")
    if history is not None and (history.dtype != torch.int32 or history.dim() != 2 or history.stride(1) != 1):
        raise ValueError(f"history {tuple(history.shape)} {history.dtype}, expected int32 [seats, tokens]")


def _check_tokens(tokens: Tensor, logits: Tensor) -> None:
    if tokens.shape != logits.shape[:1] or tokens.dtype != torch.int32 or tokens.stride(0) != 1:
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype} for {logits.shape[0]} rows")


def _row_sizes(logits: Tensor, inputs: SamplingInputs) -> tuple[int, ...]:
    """Addresses and sizes that every launch takes: logits, S, V, row stride, inputs, their row stride."""
    packed = inputs.packed
    return (logits.data_ptr(), *logits.shape, logits.stride(0), packed.data_ptr(), packed.stride(0))


def _history(history: Tensor) -> tuple[int, int, int]:
    return history.data_ptr(), history.stride(0), history.shape[1]


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
