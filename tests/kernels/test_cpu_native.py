"""Our CPU kernels against float64: every layout, every instruction set that this processor has; a row's bits are its
own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptq_api.kernels.reference import dequantize
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.backend import CpuBackend
from tests.kernels.test_cpu import Module, activations, relative

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.MISSING)

MODULES = {
    "group 32": Module(128, 96, 32),
    "group 16": Module(80, 33, 16),
    "group 128, act-order": Module(384, 160, 128, act_order=True),
    "one group": Module(160, 64, -1),
    "group 512": Module(1024, 48, 512),
    "last group partial": Module(352, 112, 64),
    "last group partial, act-order": Module(352, 16, 64, act_order=True),
    "odd outputs": Module(64, 1, 32),
    "2 bits": Module(128, 40, 32, 2),
    "3 bits, act-order": Module(256, 72, 64, 3, act_order=True),
    "8 bits": Module(256, 100, 128, 8),
    "8 bits, act-order, one group": Module(96, 20, -1, 8, act_order=True),
}
SETS = native._cpu.instruction_sets() if native.is_available() else []


def weight(m: Module, exact: bool = False) -> native.QuantizedWeight:
    return native.QuantizedWeight(m.qweight, m.zeros, m.scales, m.g_idx, m.bits, exact=exact)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", request.param)
    assert native.engine().instruction_set == request.param
    yield request.param


def rounded(x: torch.Tensor, m: Module) -> torch.Tensor:
    """Activations as the kernel rounds them: bytes of each packed group, in its order, float64 [M, K]."""
    places, _, group = native._places(m.g_idx)
    padded = torch.cat((x, torch.zeros(x.shape[0], 1)), 1)[:, places].view(x.shape[0], -1, group)
    scale = padded.abs().amax(-1, keepdim=True) / 127
    values = torch.where(scale > 0, (padded * (127 / (scale * 127))).round() * scale, 0.0).double().view(x.shape[0], -1)
    out = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.float64)
    out[:, places] = values
    return out[:, :-1]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_quantized(name: str, num_rows: int, instruction_set: str) -> None:
    module = MODULES[name]
    x = activations(num_rows, module.k)
    found = weight(module).matmul(x)
    assert relative(found, rounded(x, module) @ module.exact()) < 1e-3  # a value at a half may go the other way
    assert relative(found, x.double() @ module.exact()) < 2e-2


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 17])
def test_exact(name: str, num_rows: int, instruction_set: str) -> None:
    module = MODULES[name]
    x = activations(num_rows, module.k)
    assert relative(weight(module, exact=True).matmul(x), x.double() @ module.exact()) < 5e-7


def test_exact_sums_lose_less_than_the_product_of_dequantized_weights(instruction_set: str) -> None:
    """Those round every weight to float32 before it is multiplied."""
    module = Module(4096, 64, 128, act_order=True)
    x = activations(4, 4096)
    exact = x.double() @ module.exact()
    assert relative(weight(module, exact=True).matmul(x), exact) < relative(module.reference().matmul(x), exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_row_s_bits_are_its_own(name: str, exact: bool, instruction_set: str) -> None:
    module = MODULES[name]
    x, packed = activations(29, module.k), weight(MODULES[name], exact)
    together = packed.matmul(x)
    for rows in (slice(0, 1), slice(3, 10), slice(13, 29)):
        assert torch.equal(packed.matmul(x[rows]), together[rows])


@pytest.mark.skipif("AMX" not in SETS, reason="this processor has no AMX, or the system does not let it be used")
@pytest.mark.parametrize("name", MODULES)
def test_tiles_give_the_bits_that_rows_have_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = weight(MODULES[name]), activations(150, MODULES[name].k)
    found = {}
    for instruction_set in ("AMX", "AVX-512 VNNI"):
        monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", instruction_set)
        found[instruction_set] = {m: packed.matmul(x[:m]) for m in (15, 16, 31, 48, 64, 65, 128, 150)}
    for m, y in found["AMX"].items():
        assert torch.equal(y, found["AVX-512 VNNI"][m]), m


@pytest.mark.parametrize("exact", [False, True])
def test_threads_change_no_bits(exact: bool) -> None:
    module = Module(1024, 4096, 128, act_order=True)
    x, packed = activations(9, 1024), weight(module, exact)
    before = native.num_threads()
    try:
        found = []
        for num_threads in (1, 2, 3, 8):
            native.use_threads(num_threads)
            found += [packed.matmul(x) for _ in range(20)]
    finally:
        native.use_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("exact", [False, True])
def test_a_product_of_no_rows_is_none(exact: bool, instruction_set: str) -> None:
    module = Module(128, 4096, 32)
    assert weight(module, exact).matmul(torch.empty(0, 128)).shape == (0, 4096)
    assert native.DenseHead(torch.ones(32, 64)).forward(torch.empty(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("exact", [False, True])
def test_a_row_that_is_no_number_is_alone(exact: bool, instruction_set: str) -> None:
    module = MODULES["group 32"]
    x = activations(5, module.k)
    expected = weight(module, exact).matmul(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[2, 77] = bad
        found = weight(module, exact).matmul(y)
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("exact", [False, True])
def test_zeros_and_tiny_and_huge_numbers(exact: bool, instruction_set: str) -> None:
    module = MODULES["group 32"]
    x = torch.stack([torch.zeros(module.k), torch.full((module.k,), 1e-30), torch.full((module.k,), 1e30)])
    found = weight(module, exact).matmul(x)
    assert (found[0] == 0).all()
    assert relative(found[1] * 1e30, torch.ones(1, module.k).double() @ module.exact()) < 1e-4
    assert relative(found[2] / 1e30, torch.ones(1, module.k).double() @ module.exact()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 96), (7, 50), (1, 15), (1000, 128)])
def test_dense(dtype: torch.dtype, shape: tuple[int, int], instruction_set: str) -> None:
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    head, x = native.DenseHead(stored), activations(11, shape[1])
    found = head.forward(x)
    assert relative(found, x.double() @ stored.double().T) < 1e-6
    for rows in (slice(0, 1), slice(2, 8)):
        assert torch.equal(head.forward(x[rows]), found[rows])
    assert head.num_bytes == stored.numel() * stored.element_size()


def test_scales_of_any_type() -> None:
    module = MODULES["group 32"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scales = module.scales.to(dtype)
        packed = native.QuantizedWeight(module.qweight, module.zeros, scales, module.g_idx, 4)
        dense = dequantize(module.qweight, module.zeros, scales, module.g_idx, 4, torch.float64)
        x = activations(2, module.k)
        assert relative(packed.matmul(x), rounded(x, module) @ dense) < 1e-3


def test_what_is_held_is_what_was_planned() -> None:
    for name, module in MODULES.items():
        planned = native.num_bytes(module.bits, module.k, module.n, module.group_size)
        held = weight(module).num_bytes
        assert held <= planned <= held + 4 * 2 * module.k, name


def test_types_decide() -> None:
    """auto rounds activations; who names a type gets none that are rounded."""
    cpu = torch.device("cpu")
    shape = (4, 4096, 4096, 128)
    assert CpuBackend(cpu, torch.bfloat16, rounds=True).kernel(*shape).kind == native.kind()
    assert CpuBackend(cpu, torch.bfloat16).kernel(*shape).kind == native.kind(exact=True)
    assert CpuBackend(cpu, torch.float32, rounds=True).kernel(*shape).kind == native.kind(exact=True)
    assert "float32 activations" in native.kind(exact=True) and "int8 activations" in native.kind()


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", "MMX")
    with pytest.raises(ValueError, match="MMX"):
        native.engine()
