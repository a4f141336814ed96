"""All layers of one sequence's decode step as one kernel, on Hopper GPUs: between the products nothing is launched and
nothing waits for the whole device, so weights arrive almost without a pause (ext/decode_layers_kernel.h).

What it computes is what `ops.rms_norm`, `gptq.gemm` and `decode_attention` compute one after the other, rounded in the
same places; sums of a product are added in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_api.kernels.decode_attention import BLOCK_SIZES
from gptq_api.kernels.layout import PackedLinear

try:
    from gptq_api import _cuda  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # kernels.gptq.unavailable_reason() says so to people
    _cuda = None

__all__ = ["DecodeLayers", "LayerShape", "LayerWeights"]

ATTENTION_STEP = 128
"""tokens of a key head that a block attends to at a time"""
MAX_STEPS_EACH = 12
"""of a multiprocessor, up to which the kernel is the faster one: some 5,000 tokens with 40 key heads"""


@dataclass(frozen=True)
class LayerShape:
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.hidden, self.ffn, self.num_heads, self.num_kv_heads, self.head_dim


@dataclass(frozen=True)
class LayerWeights:
    """One layer; tensors on the device, floats in the activations' type."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    """paired"""
    down: PackedLinear
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    """[N] of qkv, o, gate_up and down"""
    input_norm: Tensor
    """[H], in the order of qkv's inputs"""
    post_attention_norm: Tensor
    """[H], in the order of gate_up's"""
    qkv_perm: Tensor | None
    """int32 [H]: input i of qkv is column qkv_perm[i] of the normalised stream"""
    gate_up_perm: Tensor | None
    o_perm: Tensor | None
    """int32 [num_heads * D]: input i of o is column o_perm[i] of the attention"""
    head_norms: tuple[Tensor, Tensor] | None
    """[D] of queries and of keys"""
    window: int | None

    @property
    def products(self) -> tuple[PackedLinear, PackedLinear, PackedLinear, PackedLinear]:
        return self.qkv, self.o, self.gate_up, self.down


class DecodeLayers:
    """For models that `takes` has nothing against. One launch at a time on a device: launches that overlap wait
    forever."""

    def __init__(
        self, layers: list[LayerWeights], shape: LayerShape, eps: float, cos_sin: Tensor, workspace: Tensor
    ) -> None:
        """`cos_sin` float32 [positions, D]; `workspace` of decode_attention."""
        self._shape, self._eps, self._cos_sin, self._workspace = shape, eps, cos_sin, workspace
        self._layers, first = layers, layers[0]
        self._format = first.qkv.groups_per_chunk, first.qkv.has_zeros
        device, self._dtype = first.qkv.data.device, first.input_norm.dtype
        self._num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._weights = _addresses([w.data for layer in layers for w in layer.products], device)
        self._norms = torch.stack(
            [norm for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]
        ).contiguous()
        perms = [perm for layer in layers for perm in (layer.qkv_perm, layer.gate_up_perm)]
        self._orders = _stacked_orders(perms, shape.hidden, device)
        self._bias = _stacked_biases(layers, self._dtype, device)
        self._o_orders = _stacked_orders([layer.o_perm for layer in layers], shape.num_heads * shape.head_dim, device)
        self._head_norms = None
        if first.head_norms is not None:
            self._head_norms = torch.stack([n for layer in layers for n in layer.head_norms or ()]).contiguous()
        self._windows = torch.tensor([layer.window or 0 for layer in layers], dtype=torch.int32, device=device)
        row = _cuda.decode_layers_exchange_row(*shape.sizes)
        # Bytes of 255 say "not yet there"; every launch leaves what it does not empty itself to the next one.
        self._exchange = torch.full((len(layers) * row,), -1, dtype=torch.int16, device=device)
        with torch.cuda.device(device):
            partials = _cuda.decode_layers_partials_bytes()
        self._partials = torch.full((partials,), 255, dtype=torch.uint8, device=device)
        self._caches: Tensor | None = None
        self._bound: list[Tensor] = []

    @staticmethod
    def takes(layers: list[LayerWeights], shape: LayerShape) -> bool:
        """Whether the kernel is there for such a model on the device of its weights."""
        if _cuda is None or not hasattr(_cuda, "decode_layers") or not layers:
            return False
        first = layers[0]
        for layer in layers:
            for weight, paired in zip(layer.products, (False, False, True, False), strict=True):
                same = (weight.groups_per_chunk, weight.has_zeros) == (first.qkv.groups_per_chunk, first.qkv.has_zeros)
                if not same or weight.perm is not None or weight.paired != paired:
                    return False
            if (layer.head_norms is None) != (first.head_norms is None):
                return False
        perms = [perm for layer in layers for perm in (layer.qkv_perm, layer.gate_up_perm, layer.o_perm)]
        ordered = any(perm is not None for perm in perms)
        weights = (first.qkv.groups_per_chunk, first.qkv.has_zeros, ordered)
        with torch.cuda.device(first.qkv.data.device):
            return bool(_cuda.decode_layers_takes(len(layers), *shape.sizes, *weights))

    def pays(self, cache: list[Tensor], max_context: int) -> bool:
        """Whether it beats one kernel after the other at contexts up to so many tokens; it needs a cache of 16-bit
        elements. Four warps of a multiprocessor attend here, where the kernel that does nothing else keeps twelve."""
        steps = self._shape.num_kv_heads * -(-max_context // ATTENTION_STEP)
        return cache[0].dtype == self._dtype and steps <= MAX_STEPS_EACH * self._num_blocks

    def bind(self, cache: list[Tensor]) -> None:
        """The cache of the launches from now on; not while a graph is captured."""
        self._caches, self._bound = _addresses(cache, cache[0].device), cache

    def run(
        self,
        x: Tensor,
        cache: list[Tensor],
        block_tables: Tensor,
        context_lens: Tensor,
        query_start: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """x [1, H], updated in place: the next token of a sequence, or padding (without a row in query_start or without
        a context). int32 tensors as in `decode_attention`; cache: of every layer."""
        shape, block_size = (1, self._shape.hidden), cache[0].shape[3]
        if tuple(x.shape) != shape or x.dtype != self._dtype or not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError(f"x {list(x.shape)} {x.dtype}, expected {list(shape)} {self._dtype}, 16-byte aligned")
        if cache[0].dtype != self._dtype or len(cache) != len(self._layers):
            raise ValueError(f"{len(cache)} caches of {cache[0].dtype}, expected {len(self._layers)} of {self._dtype}")
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"blocks of {block_size} tokens; attention takes {BLOCK_SIZES}")
        if block_tables.dim() != 2 or block_tables.dtype != torch.int32 or block_tables.stride(-1) != 1:
            raise ValueError(
                f"block_tables {list(block_tables.shape)} {block_tables.dtype}, expected int32 [1, blocks]"
            )
        for name, tensor, least in (
            ("context_lens", context_lens, 1),
            ("query_start", query_start, 2),
            ("positions", positions, 1),
            ("slot_mapping", slot_mapping, 1),
        ):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous() or tensor.numel() < least:
                raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype}, expected int32 [{least}]")
        if self._caches is None or cache is not self._bound:
            self.bind(cache)
        assert self._caches is not None
        s = self._shape
        with torch.cuda.device(x.device):
            _cuda.decode_layers(
                *(self._weights.data_ptr(), self._caches.data_ptr(), self._norms.data_ptr(), _address(self._orders)),
                *(
                    _address(self._bias),
                    _address(self._o_orders),
                    _address(self._head_norms),
                    self._windows.data_ptr(),
                ),
                *(x.data_ptr(), self._exchange.data_ptr(), self._partials.data_ptr(), block_tables.data_ptr()),
                *(context_lens.data_ptr(), query_start.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr()),
                *(self._cos_sin.data_ptr(), self._workspace.data_ptr(), self._eps, s.head_dim**-0.5),
                *(len(self._layers), *s.sizes),
                *(block_tables.stride(0), block_size, *self._format, x.dtype == torch.bfloat16),
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        return x


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=device)


def _stacked_biases(layers: list[LayerWeights], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if all(bias is None for layer in layers for bias in layer.biases):
        return None
    rows = [
        torch.zeros(weight.out_features, dtype=dtype, device=device) if bias is None else bias.to(dtype)
        for layer in layers
        for bias, weight in zip(layer.biases, layer.products, strict=True)
    ]
    return torch.cat(rows)


def _stacked_orders(perms: list[Tensor | None], width: int, device: torch.device) -> Tensor | None:
    """16 bits each: widths are at most 16384."""
    if all(perm is None for perm in perms):
        return None
    straight = torch.arange(width, device=device)
    return torch.stack([(straight if perm is None else perm).to(torch.int16) for perm in perms])
