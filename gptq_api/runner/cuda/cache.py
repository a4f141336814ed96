"""The KV cache on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.model.config import LlamaConfig


class CudaKVCache:
    """K and V of every layer: [num_blocks, 2, num_kv_heads, block_size, head_dim] each, zero until written.

    The tokens of one block and head are contiguous: attention reads them as one piece.
    """

    def __init__(
        self, config: LlamaConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros: masked tokens may be multiplied by zero, and what memory holds by chance may be NaN.
        shape = (num_blocks, 2, config.num_key_value_heads, block_size, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.num_blocks, self.block_size = num_blocks, block_size

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def scrub(self, blocks: Tensor) -> None:
        """Replace what is not finite in these blocks (int64, on the device) by zeros, for their next owner."""
        for layer in self.layers:
            data = layer.view(torch.uint8)
            content = data[blocks].view(layer.dtype).to(torch.float32)
            clean = torch.nan_to_num(content, nan=0.0, posinf=0.0, neginf=0.0)
            data[blocks] = clean.to(layer.dtype).view(torch.uint8)
