"""How a checkpoint becomes packed weights: the orders of act-order end up in what comes before a product, and nothing
gathers. On the CPU the kernels are replaced by what `emulate` reads from the packed bytes."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gptq_api.checkpoint.device_reader import DeviceReader, Fetch
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.checkpoint.safetensors_file import Entry, SafetensorsFile
from gptq_api.errors import ConfigError
from gptq_api.kernels import gemm
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.order import of_kernel, of_producer
from gptq_api.kernels.planes import head_bytes
from gptq_api.kernels.probes import emulate
from gptq_api.model import loader, plan
from gptq_api.model.config import read_config
from gptq_api.model.layers.linear import Linear, SplitLinear
from gptq_api.model.modules import config_of
from gptq_api.model.progress import LoadProgress
from gptq_api.model.shard import Shard
from gptq_api.model.weights import LayerWeights
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.backend import CudaBackend
from gptq_api.runner.cuda.forward import of_cublas
from gptq_api.runner.cuda.linear import PackedGateUp, PackedGPTQLinear, PackedHead
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.cuda_weights import random_weight

CPU = torch.device("cpu")
# Every size a multiple of the strips, K of down with a part of a chunk.
RECIPE = Recipe(hidden_size=128, intermediate_size=208, num_heads=4, num_kv_heads=2, act_order=True, sym=False)


def emulated_gemm(
    x: Tensor,
    weight: PackedLinear,
    out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    silu_times: Tensor | None = None,
    same_bits: bool = False,
    one_order: bool = False,
) -> Tensor:
    assert weight.paired or not silu_mul
    y = x.double() @ emulate(weight)
    if bias is not None:
        y += bias
    if silu_mul:
        gate, up = y.chunk(2, 1)
        y = functional.silu(gate) * up
    if silu_times is not None:
        assert weight.planes
        y = functional.silu(y) * silu_times
    if residual is not None:
        y += residual
    return y if out is None else out.copy_(y)


class OnCpu(CudaBackend):
    """Packs on the CPU what CUDA would take."""

    def __init__(self, lm_head_bits: int = 16) -> None:
        super().__init__(CPU, torch.float32, lm_head_bits=lm_head_bits)

    def reading(self, checkpoint: Checkpoint) -> AbstractContextManager[Checkpoint]:
        return nullcontext(checkpoint)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "unavailable_reason", lambda: None)
    monkeypatch.setattr(gemm, "gemm", emulated_gemm)
    monkeypatch.setattr(gemm, "prepare_same_bits", lambda device: None)


def first_layer(folder: Path, model: RandomModel) -> LayerWeights:
    checkpoint = open_checkpoint(write_checkpoint(folder, model))
    weights, _ = loader.load_llama(checkpoint, read_config(folder), 64, OnCpu())
    return weights.layers[0]


def weight(model: RandomModel, *parts: str) -> Tensor:
    """float64 [K, N]"""
    return torch.cat([model.modules[f"model.layers.0.{p}_proj"].dequantized().t() for p in parts], 1).double()


def in_order(x: Tensor, linear: Linear) -> Tensor:
    index = of_producer(linear.order)
    return x if index is None else x[:, index.long()]


@pytest.mark.parametrize("bits", [4, 8])
def test_orders_are_folded_into_what_comes_before(packed: None, bits: int, tmp_path: Path) -> None:
    model = random_model(replace(RECIPE, attention_bias=True, mlp_bias=True, bits=bits))
    layer = first_layer(tmp_path, model)
    for linear, parts, folds in (
        (layer.qkv, ("self_attn.q", "self_attn.k", "self_attn.v"), True),
        (layer.o, ("self_attn.o",), False),
    ):
        assert isinstance(linear, PackedGPTQLinear)
        assert (of_producer(linear.order) is not None) is folds and (of_kernel(linear.order) is None) is folds
        w = weight(model, *parts)
        x = torch.randn(3, w.shape[0], dtype=torch.float64)
        bias = torch.cat([model.dense[f"model.layers.0.{p}_proj.bias"] for p in parts])
        assert torch.allclose(linear.forward(in_order(x, linear)), x @ w + bias)

    gate_up, down = layer.gate_up, layer.down
    assert isinstance(gate_up, PackedGPTQLinear if bits == 4 else PackedGateUp)
    assert of_producer(gate_up.order) is not None
    assert isinstance(down, PackedGPTQLinear) and down.order is None
    assert {linear.kernel for linear in (layer.qkv, layer.o, gate_up, down)} == {f"cuda int{bits}"}
    x = torch.randn(3, 128, dtype=torch.float64)
    biases = {p: model.dense[f"model.layers.0.mlp.{p}_proj.bias"].double() for p in ("gate", "up", "down")}
    inner = functional.silu(x @ weight(model, "mlp.gate") + biases["gate"])
    inner *= x @ weight(model, "mlp.up") + biases["up"]
    expected = inner @ weight(model, "mlp.down") + biases["down"] + x
    found = down.forward(gate_up.forward(in_order(x, gate_up), silu_mul=True), residual=x)
    assert torch.allclose(found, expected)


def test_gates_and_ups_that_cannot_be_merged_leave_the_gather_to_down(packed: None, tmp_path: Path) -> None:
    model = random_model(replace(RECIPE, own_order=("up_proj", "k_proj")))
    layer = first_layer(tmp_path, model)
    assert isinstance(layer.gate_up, SplitLinear) and layer.gate_up.order is None
    assert isinstance(layer.qkv, SplitLinear) and layer.qkv.order is None
    assert isinstance(layer.down, PackedGPTQLinear) and of_kernel(layer.down.order) is not None
    x = torch.randn(3, 128, dtype=torch.float64)
    inner = functional.silu(x @ weight(model, "mlp.gate")) * (x @ weight(model, "mlp.up"))
    found = layer.down.forward(layer.gate_up.forward(x, silu_mul=True))
    assert torch.allclose(found, inner @ weight(model, "mlp.down"))


def test_another_width_stays_with_the_reference_beside_packed_neighbours(packed: None, tmp_path: Path) -> None:
    model = random_model(replace(RECIPE, mixed_bits={"down_proj": 2}))
    layer = first_layer(tmp_path, model)
    assert layer.down.order is None and "2 bits" in layer.down.kernel
    x = torch.randn(3, 128)
    inner = functional.silu(x.double() @ weight(model, "mlp.gate")) * (x.double() @ weight(model, "mlp.up"))
    found = layer.down.forward(layer.gate_up.forward(in_order(x, layer.gate_up), silu_mul=True).float())
    assert torch.allclose(found.double(), inner @ weight(model, "mlp.down"), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_plan_foresees_the_memory_of_packed_weights(
    packed: None, act_order: bool, bits: int, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, act_order=act_order, bits=bits, quantize_head=act_order)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(recipe)))
    config = read_config(tmp_path)
    llama, report = loader.load_llama(checkpoint, config, 64, OnCpu())
    planned = plan.plan_serving(checkpoint, config, OnCpu())
    assert planned.kernels["q_proj"] == planned.kernels["down_proj"] == f"cuda int{bits}"
    assert planned.kernels.get("lm_head") == (f"cuda int{bits}" if act_order else None)
    assert report.kernels == {f"cuda int{bits}": 8 + act_order} and not report.warnings
    assert planned.weight_bytes == pytest.approx(llama.num_bytes, rel=0.05)


@pytest.mark.parametrize("vocab_size", [96, 99])
@pytest.mark.parametrize("tie", [False, True])
def test_a_head_is_rounded_to_8_bits_on_request(packed: None, tie: bool, vocab_size: int, tmp_path: Path) -> None:
    model = random_model(replace(RECIPE, tie=tie, vocab_size=vocab_size))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, model))
    config, backend = read_config(tmp_path), OnCpu(lm_head_bits=8)
    llama, report = loader.load_llama(checkpoint, config, 64, backend)
    planned, as_stored = (plan.plan_serving(checkpoint, config, each) for each in (backend, OnCpu()))
    size = head_bytes(vocab_size, 128)
    kernel = f"cuda int8 (head{', 0 MiB beside the tied embedding' if tie else ''})"
    assert report.kernels[kernel] == 1 and planned.kernels["lm_head"] == kernel and "lm_head" not in as_stored.kernels
    assert isinstance(llama.lm_head, PackedHead) and llama.lm_head.num_bytes == size
    saved = 0 if tie else vocab_size * 128 * 4
    assert planned.weight_bytes - as_stored.weight_bytes == size - saved
    weight = model.dense["model.embed_tokens.weight" if tie else "lm_head.weight"]
    assert torch.equal(llama.embedding, model.dense["model.embed_tokens.weight"])
    x = torch.randn(9, 128, dtype=torch.float64)
    logits, expected = torch.empty(9, vocab_size), x @ weight.double().t()
    assert llama.lm_head.logits(x, logits) is logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 1e-2


def test_a_quantized_head_stays_as_it_is(packed: None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(replace(RECIPE, quantize_head=True))))
    llama, report = loader.load_llama(checkpoint, read_config(tmp_path), 64, OnCpu(lm_head_bits=8))
    assert isinstance(llama.lm_head, PackedHead) and set(report.kernels) == {"cuda int4"}
    assert of_cublas(llama) == []


def test_what_cannot_be_rounded_is_refused_with_the_remedy(packed: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lm-head-bits 8: a scale of .* leave it out"):
        OnCpu(lm_head_bits=8).head(torch.full((8, 128), 2e6))


@pytest.mark.parametrize("paired", [False, True])
def test_outputs_are_packed_in_any_order(paired: bool) -> None:
    w = random_weight(136, 48, 32, asym=True, act_order=True)
    order = torch.randperm(48)
    packed = gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, 32, "cpu", paired=paired, out_order=order)
    assert torch.equal(emulate(packed), w.dense[:, order])


def test_the_kernel_of_a_module_on_cuda_is_told_with_its_reason() -> None:
    cuda = torch.device("cuda")
    assert CpuBackend(cuda, torch.float32).kernel(4, 4096, 4096, 128).kind == "reference (exact)"
    backend = CudaBackend(cuda, torch.float16)
    assert "3 bits" in str(backend.kernel(3, 4096, 4096, 128))
    choice = backend.kernel(4, 4096, 4096, 128)
    assert str(choice) == "cuda int4" if gemm.is_available() else choice.reason == gemm.unavailable_reason()
    assert backend.kernel(4, 4096, 4096, -1).num_bytes <= choice.num_bytes


def test_cublas_adds_up_in_float32() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    CudaBackend(torch.device("cuda"), torch.float16)
    assert not matmul.allow_fp16_reduced_precision_reduction and not matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "")
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize(("k", "n"), [(256, 48), (328, 32), (1024, 4096)])
@pytest.mark.parametrize("paired", [False, True], ids=["", "paired"])
def test_the_device_packs_the_same_bytes(
    k: int, n: int, group_size: int, asym: bool, act_order: bool, paired: bool
) -> None:
    w = random_weight(k, n, group_size, asym=asym, act_order=act_order)
    for order in (None, torch.randperm(n)):
        on_cpu, on_device = (
            gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, group_size, device, paired=paired, out_order=order)
            for device in ("cpu", "cuda")
        )
        assert torch.equal(on_cpu.data, on_device.data.cpu())
        assert (on_cpu.perm is None) == (on_device.perm is None)


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "")
@pytest.mark.parametrize("container", ["safetensors", "sharded", "pt"])
def test_tensors_read_to_the_device_are_those_of_the_file(container: str, tmp_path: Path) -> None:
    model = random_model(replace(RECIPE, attention_bias=True, dense=("o_proj",)))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, model, container=container))
    with DeviceReader(torch.device("cuda")) as reader:
        there = checkpoint.on(reader)
        there.store.prefetch(checkpoint.store.names, {})
        for module in checkpoint.modules:
            here, found = checkpoint.gptq(module), there.gptq(module)
            for part in ("qweight", "zeros", "scales", "g_idx"):
                tensor = getattr(found, part)
                assert tensor.is_cuda and torch.equal(tensor.cpu(), getattr(here, part))
            assert (here.act_order, here.group_size, here.sym) == (found.act_order, found.group_size, found.sym)
        name = "model.layers.0.self_attn.o_proj.weight"
        assert torch.equal(there.tensor(name, (128, 128)).cpu(), checkpoint.tensor(name, (128, 128)))


class HostReader(DeviceReader):
    """What is fetched comes to the CPU."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.fetched: list[tuple[str, TensorPart | None]] = []

    def fetch(self, file: Path, name: str, entry: Entry, part: TensorPart | None) -> Fetch:
        self.fetched.append((name, part))
        return Fetch(part, SafetensorsFile(file).read(name, part=part), [])


class ReadOnCpu(OnCpu):
    """As `OnCpu`, reading as for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = HostReader()

    def reading(self, checkpoint: Checkpoint) -> AbstractContextManager[Checkpoint]:
        return nullcontext(checkpoint.on(self.reader))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_ranks_pack_their_part_of_what_one_would(packed: None, act_order: bool, fused: bool, tmp_path: Path) -> None:
    """Of gate and up in the order in which down wants them. Nothing is fetched in vain, or as a whole where a part will
    do."""
    recipe = replace(RECIPE, act_order=act_order, family="phi3" if fused else "llama", num_layers=2)
    recipe = replace(recipe, more_config={"pad_token_id": 0} if fused else {})
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(recipe)))
    config = config_of(checkpoint)
    whole, _ = loader.load_llama(checkpoint, config, 64, OnCpu())
    for rank in range(2):
        backend, shard = ReadOnCpu(), Shard(rank, 2)
        part, _ = loader.load_llama(checkpoint, config, 64, backend, shard)
        heads, rows, inner = (shard.of(*sizes) for sizes in ((128, 32), (128,), (208,)))
        kv = shard.of(64, 32)
        columns = {
            "qkv": [*heads, *(128 + i for i in kv), *(192 + i for i in kv)],
            "o": list(rows),
            "gate_up": [*inner, *(208 + i for i in inner)],
            "down": list(rows),
        }
        for mine, all_of_it in zip(part.layers, whole.layers, strict=True):
            for name, chosen in columns.items():
                found, expected = getattr(mine, name), getattr(all_of_it, name)
                assert torch.equal(emulate(found._weight), emulate(expected._weight)[:, chosen]), name
        fetched = Counter(name for name, _ in backend.reader.fetched)
        twice = {name for name, count in fetched.items() if count > 1}
        assert twice == {f"model.layers.{i}.mlp.down_proj.g_idx" for i in range(2)}  # which tells of gate and up
        read_whole = {name for name, of_it in backend.reader.fetched if of_it is None and name.endswith("qweight")}
        gates = {name for name in fetched if name.endswith(("gate_proj.qweight", "up_proj.qweight"))}
        assert read_whole == (gates if act_order else set()) and gates


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "")
def test_parts_read_to_the_device_are_those_of_the_file(tmp_path: Path) -> None:
    """Rows of 64 KiB are read whole, those of 128 KiB in part."""
    recipe = replace(RECIPE, intermediate_size=32768, num_layers=1, mixed_bits={"up_proj": 8})
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(recipe)))
    ranges = (range(32, 4096), range(12000, 12008))
    with DeviceReader(torch.device("cuda")) as reader:
        there = checkpoint.on(reader)
        for name in ("gate_proj", "up_proj"):
            module = f"model.layers.0.mlp.{name}"
            there.store.prefetch([f"{module}.qweight"], {})  # something else than is asked for
            found, here = there.gptq(module, ranges), checkpoint.gptq(module, ranges)
            for part in ("qweight", "zeros", "scales", "g_idx"):
                assert torch.equal(getattr(found, part).cpu(), getattr(here, part))


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "")
def test_a_file_that_shrinks_under_the_device_reader_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(RECIPE))
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    with DeviceReader(torch.device("cuda")) as reader, pytest.raises(CheckpointError, match="become shorter"):
        for module in checkpoint.modules:
            checkpoint.on(reader).gptq(module)


def test_progress_is_silent_when_quick_and_a_line_now_and_then_when_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoadProgress("loading layers", 3) as progress:
        for _ in range(3):
            progress.advance()
    assert capsys.readouterr().err == ""
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0, 30.0, 30.0])
    monkeypatch.setattr("gptq_api.model.progress.time.monotonic", lambda: next(clock))
    with LoadProgress("loading layers", 5) as progress:
        for _ in range(4):
            progress.advance()
    assert capsys.readouterr().err == "loading layers: 2 of 5\nloading layers: 4 of 5\n"
