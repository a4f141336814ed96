"""The CPU products in torch against the float64 specification, and the specification against the definition."""

from __future__ import annotations

import pytest
import torch

from gptq_api.checkpoint.module import GPTQTensors
from gptq_api.checkpoint.packing import pack_qweight
from gptq_api.kernels.reference import ReferenceWeight, dequantize, unpack
from gptq_api.model.backend import Role
from gptq_api.model.layers.activation import silu_and_multiply
from gptq_api.model.layers.linear import DenseLinear
from gptq_api.runner.cpu import int4 as cpu
from gptq_api.runner.cpu.backend import CpuBackend

CPU = torch.device("cpu")


class Module:
    """Random quantized tensors."""

    def __init__(self, k: int, n: int, group_size: int, bits: int = 4, act_order: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = k if group_size < 0 else group_size
        groups = -(-k // size)
        self.k, self.n, self.group_size, self.bits = k, n, group_size, bits
        self.q = torch.randint(0, 1 << bits, (k, n), generator=generator, dtype=torch.uint8)
        self.zeros = torch.randint(0, 1 << bits, (groups, n), generator=generator, dtype=torch.uint8)
        self.scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.001).half()
        self.g_idx = torch.arange(k, dtype=torch.int32) // size
        if act_order:
            self.g_idx = self.g_idx[torch.randperm(k, generator=generator)]
        self.qweight = pack_qweight(self.q, bits)

    def exact(self) -> torch.Tensor:
        g = self.g_idx.long()
        return (self.q.double() - self.zeros[g].double()) * self.scales[g].double()

    def int4(self) -> cpu.Int4Weight:
        return cpu.Int4Weight(self.qweight, self.zeros, self.scales, self.g_idx, self.group_size, self.bits)

    def reference(self, dtype: torch.dtype = torch.float32) -> ReferenceWeight:
        return ReferenceWeight(self.qweight, self.zeros, self.scales, self.g_idx, self.bits, dtype)


def activations(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_specification_is_the_definition(bits: int, act_order: bool) -> None:
    m = Module(96, 64, 32, bits, act_order)
    assert torch.equal(unpack(m.qweight, bits), m.q.int())
    assert torch.equal(dequantize(m.qweight, m.zeros, m.scales, m.g_idx, bits, torch.float64), m.exact())
    x = activations(5, 96)
    assert relative(m.reference().matmul(x), x.double() @ m.exact()) < 1e-6
    assert relative(m.reference(torch.float64).matmul(x), x.double() @ m.exact()) < 1e-14


MODULES = {
    "group 32": Module(128, 96, 32),
    "group 128, act-order": Module(384, 160, 128, act_order=True),
    "one group": Module(160, 64, -1),
    "group 512": Module(1024, 48, 512),
    "last group partial": Module(352, 112, 64),
    "last group partial, act-order": Module(352, 16, 64, act_order=True),
    "2 bits": Module(128, 96, 32, bits=2),
    "3 bits, act-order": Module(384, 160, 128, bits=3, act_order=True),
    "8 bits": Module(384, 160, 128, bits=8),
    "8 bits, one group": Module(160, 64, -1, bits=8),
    "8 bits, act-order": Module(352, 16, 64, bits=8, act_order=True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("m", [1, 3, 17, 200])
def test_int4(name: str, m: int) -> None:
    module = MODULES[name]
    x = activations(m, module.k)
    exact = x.double() @ module.exact()
    assert relative(module.int4().matmul(x), exact) < 6e-3
    assert module.int4().matmul(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_many_rows_of_a_large_matrix_take_the_dense_product(bits: int) -> None:
    module = Module(1024, 2096, 128, bits, act_order=True)
    x = activations(130, 1024)
    weight = module.int4()
    many, few = weight.matmul(x), weight.matmul(x[:100])
    exact = x.double() @ module.exact()
    assert relative(many, exact) < 6e-3 and relative(few, exact[:100]) < 6e-3
    assert not torch.equal(many[:100], few)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["int4", "reference"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(name: str, kind: str) -> None:
    module = MODULES[name]
    weight = module.int4() if kind == "int4" else module.reference()
    x = activations(300, module.k)
    whole = weight.matmul(x)
    for start, count in [(0, 1), (7, 1), (3, 2), (1, 3), (5, 5), (0, 31), (100, 64), (11, 130)]:
        assert torch.equal(weight.matmul(x[start : start + count]), whole[start : start + count])


@pytest.mark.parametrize(("k", "n"), [(384, 640), (1024, 384), (4096, 64)])
@pytest.mark.parametrize("kind", ["dense", "reference"])
def test_products_in_float32_do_not_depend_on_company_either(kind: str, k: int, n: int) -> None:
    """Sizes at which BLAS takes other code by the number of rows, on some processors."""
    multiply = DenseLinear(activations(n, k)).forward if kind == "dense" else Module(k, n, 128).reference().matmul
    x = activations(300, k)
    whole = multiply(x)
    for start, count in [(0, 1), (3, 2), (5, 5), (40, 12), (0, 31), (11, 130), (50, 200)]:
        assert torch.equal(multiply(x[start : start + count]), whole[start : start + count])


@pytest.mark.parametrize("width", [48, 100, 160])
def test_the_activation_has_the_same_bits_whatever_is_beside_it(width: int) -> None:
    x = activations(1041, 2 * width) * 4
    whole = silu_and_multiply(x)
    expected = torch.nn.functional.silu(x[:, :width].double()) * x[:, width:]
    assert relative(whole, expected) < 1e-6
    for start, count in [(0, 1), (7, 3), (5, 300), (300, 512)]:
        assert torch.equal(silu_and_multiply(x[start : start + count]), whole[start : start + count])
    assert silu_and_multiply(torch.tensor([[-1e4, 1e4, 2.0, 2.0]])).tolist() == [[0.0, 2e4]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.usefixtures("no_compiler")
def test_weights_are_held_once_and_in_four_bits_or_eight(bits: int) -> None:
    elements = 1024 * 512
    held = Module(1024, 512, 128, bits).int4().num_bytes
    assert held == CpuBackend(CPU, torch.bfloat16).kernel(bits, 1024, 512, 128).num_bytes
    assert held == (elements // 2 + 8 * 512 * 4) * (2 if bits == 8 else 1)
    module = Module(1024, 512, 128)
    assert module.reference().num_bytes == elements // 2 + 8 * 512 * 3 + 1024 * 4


@pytest.mark.parametrize(
    ("bits", "k", "n", "group_size", "dtype", "kernel", "reason"),
    [
        (4, 4096, 4096, 128, torch.bfloat16, "int4", ""),
        (4, 4096, 4096, -1, torch.bfloat16, "int4", ""),
        (4, 4096, 4096, 16, torch.bfloat16, "reference", "groups of 16"),
        (4, 4096, 4104, 128, torch.bfloat16, "reference", "4104 outputs"),
        (2, 4096, 4096, 128, torch.bfloat16, "int4 (2 bits kept in 4)", ""),
        (3, 4096, 4096, 128, torch.bfloat16, "int4 (3 bits kept in 4)", ""),
        (8, 4096, 4096, 128, torch.bfloat16, "2 x int4", ""),
        (4, 4096, 4096, 128, torch.float32, "reference (exact)", ""),
    ],
)
@pytest.mark.usefixtures("no_compiler")
def test_which_kernel_takes_what(
    bits: int, k: int, n: int, group_size: int, dtype: torch.dtype, kernel: str, reason: str
) -> None:
    choice = CpuBackend(CPU, dtype, dequantizes=False).kernel(bits, k, n, group_size)
    assert choice.kind == kernel and reason in (choice.reason or "")
    choice = CpuBackend(CPU, dtype).kernel(bits, k, n, group_size)
    assert choice.reason is None and (choice.kind == kernel or choice.kind == "dequantized bfloat16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.usefixtures("no_compiler")
def test_what_the_operator_does_not_take_is_dequantized_once(bits: int) -> None:
    m = Module(96, 64, 24, bits, act_order=True)
    tensors = GPTQTensors(m.qweight, m.zeros, m.scales, m.g_idx, bits, 24, True, False, 1, torch.ones(64))
    linear = CpuBackend(CPU, torch.bfloat16).quantized(tensors, Role())
    assert linear.kernel == "dequantized bfloat16"
    assert linear.num_bytes - 64 * 2 == CpuBackend(CPU, torch.bfloat16).kernel(bits, 96, 64, 24).num_bytes
    x = activations(5, 96)
    assert relative(linear.forward(x), x.double() @ m.exact() + 1) < 6e-3


def test_int4_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="groups of 16"):
        Module(64, 32, 16).int4()
