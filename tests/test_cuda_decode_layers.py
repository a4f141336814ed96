"""The kernel that takes all layers of a step, against float64: as near to it as the kernels that take them one after
the other. Layers of random weights can make much of a rounding error, of both alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda_weights import random_weight
from torch import Tensor

from gptq_api.kernels import gptq, ops
from gptq_api.kernels.decode_attention import RotaryInputs, decode_attention, decode_attention_workspace
from gptq_api.kernels.decode_layers import DecodeLayers, LayerShape, LayerWeights
from gptq_api.kernels.layout import PackedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gptq.is_available(), reason=gptq.unavailable_reason() or "available"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
HEAD_DIM, BLOCK_SIZE, EPS = 128, 16, 1e-5
MHA, GQA = LayerShape(1024, 2816, 8, 8, HEAD_DIM), LayerShape(2048, 5632, 16, 4, HEAD_DIM)
ODD = LayerShape(1088, 2880, 9, 9, HEAD_DIM)
"""K of the products ends inside a chunk"""
ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""of what the layers add to the stream, that is always granted"""


@dataclass(frozen=True)
class Format:
    group_size: int = 128
    asym: bool = False
    act_order: bool = False
    biased: bool = False
    head_norms: bool = False
    window: int | None = None


class Model:
    """Random layers, and a sequence of `context` tokens with the new one; 0: padding."""

    def __init__(self, shape: LayerShape, layers: int, context: int, dtype: torch.dtype, form: Format) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype, self.form, self.context = shape, dtype, form, context
        self.layers = [self._layer(i) for i in range(layers)]
        heads, kv = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
        self.heads, self.kv = heads, kv
        blocks = max(1, -(-context // BLOCK_SIZE))
        of_layer = (blocks, 2, shape.num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        self.caches = [torch.randn(of_layer, device="cuda").to(dtype) for _ in range(layers)]
        self.tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(1, -1)
        self.lens = self.ints(context)
        self.query_start = self.ints(0, int(context > 0))
        self.positions = self.ints(context - 1)
        last = context - 1
        self.slots = self.ints(
            int(self.tables[0, last // BLOCK_SIZE]) * BLOCK_SIZE + last % BLOCK_SIZE if context else -1
        )
        self.cos_sin = torch.rand(4096, HEAD_DIM, device="cuda")
        self.workspace = decode_attention_workspace(shape.num_heads, shape.num_kv_heads, HEAD_DIM, "cuda")
        self.x = torch.randn(1, shape.hidden, device="cuda").to(dtype) if context else self.zeros(shape.hidden)
        assert DecodeLayers.takes(self.layers, shape)
        self.whole = DecodeLayers(self.layers, shape, EPS, self.cos_sin, self.workspace)

    @staticmethod
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def zeros(self, width: int) -> Tensor:
        return torch.zeros(1, width, dtype=self.dtype, device="cuda")

    def _packed(self, k: int, n: int, seed: int, paired: bool = False) -> PackedLinear:
        w = random_weight(k, n, self.form.group_size, asym=self.form.asym, act_order=False, device="cuda", seed=seed)
        scales = w.scales / (0.05 * k**0.5)  # so that the stream grows slowly
        return gptq.pack(w.qweight, scales, w.zeros, None, w.group_size, "cuda", paired=paired)

    def _layer(self, index: int) -> LayerWeights:
        s, form = self.shape, self.form
        heads, kv = s.num_heads * HEAD_DIM, s.num_kv_heads * HEAD_DIM

        def order(width: int) -> Tensor | None:
            return torch.randperm(width, device="cuda").to(torch.int32) if form.act_order else None

        def vector(width: int, base: float = 0.5) -> Tensor:
            return (torch.rand(width, device="cuda") + base).to(self.dtype)

        return LayerWeights(
            qkv=self._packed(s.hidden, heads + 2 * kv, 4 * index),
            o=self._packed(heads, s.hidden, 4 * index + 1),
            gate_up=self._packed(s.hidden, 2 * s.ffn, 4 * index + 2, paired=True),
            down=self._packed(s.ffn, s.hidden, 4 * index + 3),
            biases=(
                (vector(heads + 2 * kv, -0.5), None, vector(2 * s.ffn, -0.5), vector(s.hidden, -0.5))
                if form.biased
                else (None, None, None, None)
            ),
            input_norm=vector(s.hidden),
            post_attention_norm=vector(s.hidden),
            qkv_perm=order(s.hidden),
            gate_up_perm=order(s.hidden),
            o_perm=order(heads),
            head_norms=(vector(HEAD_DIM), vector(HEAD_DIM)) if form.head_norms else None,
            window=form.window,
        )

    def one_after_the_other(self, x: Tensor, caches: list[Tensor]) -> Tensor:
        normed, attended = self.zeros(self.shape.hidden), self.zeros(self.heads)
        where = (self.tables, self.lens, self.query_start)
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv_bias, o_bias, gate_up_bias, down_bias = layer.biases
            ops.rms_norm(x, layer.input_norm, EPS, normed, layer.qkv_perm)
            qkv = gptq.gemm(normed, layer.qkv, bias=qkv_bias)
            rotary = RotaryInputs(self.positions, self.slots, self.cos_sin, *(layer.head_norms or (None, None)), EPS)
            how = (self.shape.num_heads, HEAD_DIM**-0.5, self.workspace, layer.window, rotary)
            decode_attention(qkv, cache, *where, attended, *how)
            gptq.gemm(_in_order(attended, layer.o_perm), layer.o, x, residual=x, bias=o_bias)
            ops.rms_norm(x, layer.post_attention_norm, EPS, normed, layer.gate_up_perm)
            gated = gptq.gemm(normed, layer.gate_up, silu_mul=True, bias=gate_up_bias)
            gptq.gemm(gated, layer.down, x, residual=x, bias=down_bias)
        return x

    def at_once(self, x: Tensor) -> Tensor:
        where = (self.tables, self.lens, self.query_start)
        return self.whole.run(x, self.caches, *where, self.positions, self.slots)

    def exact(self) -> Tensor:
        """The stream after all layers, in float64; the caches stay as they are."""
        x, s = self.x.double(), self.shape
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv, o, gate_up, down = (gptq.dequantise(weight, self.dtype).double().t() for weight in layer.products)
            qkv_bias, _, gate_up_bias, down_bias = (0 if bias is None else bias.double() for bias in layer.biases)
            normed = _norm(x, layer.input_norm, layer.qkv_perm)
            heads = (normed @ qkv + qkv_bias).view(-1, HEAD_DIM)
            query, key, value = heads.split([s.num_heads, s.num_kv_heads, s.num_kv_heads])
            if layer.head_norms is not None:
                query, key = _norm(query, layer.head_norms[0]), _norm(key, layer.head_norms[1])
            cos, sin = self.cos_sin[int(self.positions[0])].double().chunk(2)
            query, key = (_rotated(part, cos, sin) for part in (query, key))
            context = int(self.lens[0])
            keys, values = (
                cache[self.tables[0].long(), i].transpose(1, 2).reshape(-1, s.num_kv_heads, HEAD_DIM)[:context].double()
                for i in range(2)
            )
            keys, values = torch.cat((keys[:-1], key[None])), torch.cat((values[:-1], value[None]))
            seen, group = slice(-(layer.window or context), None), s.num_heads // s.num_kv_heads
            keys, values = (part[seen].repeat_interleave(group, 1) for part in (keys, values))
            weights = (torch.einsum("hd,thd->ht", query, keys) * HEAD_DIM**-0.5).softmax(-1)
            attended = torch.einsum("ht,thd->hd", weights, values).reshape(1, -1)
            x = x + _in_order(attended, layer.o_perm) @ o
            normed = _norm(x, layer.post_attention_norm, layer.gate_up_perm)
            gate, up = (normed @ gate_up + gate_up_bias).chunk(2, -1)
            x = x + torch.nn.functional.silu(gate) * up @ down + down_bias
        return x

    def check(self) -> None:
        caches, exact = [cache.clone() for cache in self.caches], self.exact()
        change = (exact - self.x.double()).norm()

        def error(x: Tensor) -> float:
            return float((x.double() - exact).norm() / change)

        usual = error(self.one_after_the_other(self.x.clone(), caches))
        found = self.at_once(self.x.clone())
        assert error(found) < ERROR[self.dtype] + 2 * usual
        # The first layer's new key and value have had no time to drift apart; the others' are read by the layers after.
        difference = (self.caches[0].double() - caches[0].double()).norm() / caches[0].double().norm()
        assert float(difference) < ERROR[self.dtype]
        assert all(torch.equal(found, self.at_once(self.x.clone())) for _ in range(20))


def _norm(x: Tensor, weight: Tensor, perm: Tensor | None = None) -> Tensor:
    return _in_order(x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS), perm) * weight.double()


def _in_order(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x[:, perm.long()]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@DTYPES
@pytest.mark.parametrize("shape", [MHA, GQA, ODD], ids=["mha", "gqa", "odd"])
@pytest.mark.parametrize("context", [1, 17, 130, 2000])
def test_it_is_the_kernels_one_after_the_other(shape: LayerShape, context: int, dtype: torch.dtype) -> None:
    Model(shape, 4, context, dtype, Format()).check()


@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
def test_every_format(act_order: bool, asym: bool, group_size: int, dtype: torch.dtype) -> None:
    Model(MHA, 3, 50, dtype, Format(group_size, asym, act_order)).check()


@DTYPES
def test_biases_norms_of_heads_and_a_window(dtype: torch.dtype) -> None:
    Model(GQA, 5, 300, dtype, Format(biased=True, head_norms=True, window=100)).check()


def test_graphs_and_other_streams_change_no_bit() -> None:
    model = Model(GQA, 6, 700, torch.float16, Format(act_order=True))
    expected = model.at_once(model.x.clone())
    x, stream = torch.empty_like(model.x), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        model.at_once(x.copy_(model.x))
        graph.capture_end()
        other, busy = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda")
        for _ in range(100):
            with torch.cuda.stream(other):
                busy @ busy
            x.fill_(torch.nan)
            graph.replay()
            stream.synchronize()
            assert torch.equal(x, expected)


def test_padding_and_numbers_that_are_not_finite_end_as_well() -> None:
    padding = Model(MHA, 3, 0, torch.float16, Format())
    assert bool((padding.at_once(padding.x.clone()) == 0).all())
    for act_order in (False, True):
        model = Model(MHA, 3, 20, torch.float16, Format(act_order=act_order))
        good = model.at_once(model.x.clone())
        caches = [cache.clone() for cache in model.caches]
        for bits in (0x7E00, 0x7C00, -1):  # NaN, infinity, and the NaN that says "not yet"
            x = model.x.clone()
            x.view(torch.int16)[0, 7] = bits
            assert not bool(model.at_once(x).isfinite().any())
        for cache, before in zip(model.caches, caches, strict=True):
            cache.copy_(before)
        assert torch.equal(model.at_once(model.x.clone()), good)


def test_lengths_may_change_from_launch_to_launch() -> None:
    model = Model(GQA, 3, 1500, torch.float16, Format())
    for context in (1500, 3, 130, 1500, 1):
        model.lens.fill_(context)
        model.positions.fill_(context - 1)
        block, offset = divmod(context - 1, BLOCK_SIZE)
        model.slots.fill_(int(model.tables[0, block]) * BLOCK_SIZE + offset)
        model.check()


def test_what_does_not_fit_is_refused() -> None:
    assert not DecodeLayers.takes(Model(MHA, 3, 5, torch.float16, Format()).layers[:2], MHA)
    model = Model(MHA, 3, 5, torch.float16, Format())
    where = (model.tables, model.lens, model.query_start, model.positions, model.slots)
    with pytest.raises(ValueError, match=r"expected \[1, 1024\]"):
        model.whole.run(torch.zeros(2, 1024, dtype=torch.float16, device="cuda"), model.caches, *where)
    with pytest.raises(ValueError, match=r"3 of torch\.float16"):
        model.whole.run(model.x, model.caches[:2], *where)
    with pytest.raises(ValueError, match="positions"):
        model.whole.run(model.x, model.caches, *where[:3], model.positions.long(), model.slots)
    assert model.whole.pays(model.caches, 2048) and not model.whole.pays([model.caches[0].float()], 2048)
