"""What an EAGLE-3 head reads of each token: the served model leaves it beside its keys and values.

A feature lies in the slot of its token, under the block tables that both share. So who finds a prefix in the cache
finds its features there too, whoever computed them, and a drafted token that was wrong is written over with its keys
and values. For a token that the head guessed it leaves its own output there, until the served model computes the
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.model.eagle import EagleWeights

NO_ROW = -1e20
"""the logit of a token that a head has no row for: no penalty and no bias makes it likely, or infinite"""


class Features:
    """[slots + 1, H], of the activations' type. The first row is nobody's: what is padding goes there."""

    def __init__(self, head: EagleWeights, dtype: torch.dtype, device: torch.device) -> None:
        self.taps, self._fc = head.config.taps, head.fc
        self.width, self.dtype = head.llama.config.hidden_size, dtype
        self.data = torch.zeros(1, self.width, dtype=dtype, device=device)

    @property
    def token_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def shape(self, num_slots: int) -> tuple[int, int]:
        """Of `data` for a cache of so many."""
        return num_slots + 1, self.width

    def put(self, tapped: Tensor, places: Tensor, out: Tensor | None = None) -> None:
        """`tapped` [M, taps * width of the served model], layer by layer; `places` int64 [M]: slot + 1, 0 for padding.
        `out` [M, H] of `dtype`: memory for the product."""
        self.data.index_copy_(0, places, self._fc.forward(tapped, out).to(self.dtype))
