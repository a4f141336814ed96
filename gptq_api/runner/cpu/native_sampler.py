"""`sampler.sample` by our own kernels (ext/cpu/sampler.h): one call for all rows, which finds the same tokens.

Exponentials are its own, within a bit of torch's, and the same bits on every processor: a token is another one only
where the first two of a race, or a cut of top_p or min_p, are as close as that, once in some ten million draws.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gptq_api.kernels.sampling import inverse_temperature
from gptq_api.runner.cpu import native
from gptq_api.runner.seats import Seat
from gptq_api.types import SamplingParams, TokenLogprobs

_ROW = struct.Struct("=Q6f6i3Q")
"""RowParams of ext/cpu/sampler.h"""


class PackedSeat:
    """What a seat's parameters are to the kernels."""

    __slots__ = ("_bias", "_bias_ids", "_stops", "history", "params", "row")

    def __init__(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        p, self.params = params, params
        self._bias_ids, self._bias = array("i", p.logit_bias.keys()), array("f", p.logit_bias.values())
        waits = p.min_tokens > 0 and not p.grammar  # a grammar's masks say when it may end
        self._stops = array("i", p.stop_token_ids if waits else ())
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        self.history = array("i") if penalised else None
        """of the sequence's tokens, as many as it had"""
        self.row = _ROW.pack(
            p.seed & 0xFFFFFFFFFFFFFFFF,
            inverse_temperature(p.temperature),
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
            min(max(p.top_k, 0), 2**31 - 1),
            -1 if p.top_logprobs is None else p.top_logprobs,
            num_prompt_tokens,
            len(self._bias),
            len(self._stops),
            num_prompt_tokens + p.min_tokens if self._stops else 0,
            self._bias_ids.buffer_info()[0],
            self._bias.buffer_info()[0],
            self._stops.buffer_info()[0],
        )


def sample(
    logits: Tensor, seats: list[Seat], masks: Mapping[int, npt.NDArray[np.int32]] | None = None
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """As `sampler.sample`, for logits in the host's memory."""
    packed = [_packed(seat) for seat in seats]
    histories = []
    if any(one.history is not None for one in packed):
        histories = [_history(one.history, seat.token_ids) for one, seat in zip(packed, seats, strict=True)]
    allowed = [0] * len(seats) if masks else []
    held = {row: np.ascontiguousarray(words) for row, words in masks.items()} if masks else {}
    for row, words in held.items():
        allowed[row] = words.ctypes.data
    tokens, found = native.engine().sample(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        b"".join([one.row for one in packed]),
        [len(seat.token_ids) for seat in seats],
        histories,
        allowed,
    )
    if not found:
        return tokens, [None] * len(seats)
    return tokens, [entry and TokenLogprobs(*entry) for entry in found]


def log_softmax(logits: Tensor) -> Tensor:
    """float32 [N, V], overwritten by the logprobs that `sample` would tell; NaN in a row that is not finite."""
    native.engine().log_softmax(logits.data_ptr(), logits.stride(0), *logits.shape)
    return logits


def _packed(seat: Seat) -> PackedSeat:
    packed = seat.packed
    if packed is None or packed.params is not seat.params:
        packed = seat.packed = PackedSeat(seat.params, seat.num_prompt_tokens)
    return packed


def _history(history: array[int] | None, token_ids: list[int]) -> int:
    """Its address, with the tokens that have come."""
    if history is None:
        return 0
    if len(history) > len(token_ids):
        del history[len(token_ids) :]
    history.extend(token_ids[len(history) :])
    return history.buffer_info()[0]
