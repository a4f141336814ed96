"""The CPU, by kernels of ours (`ext/cpu`) or in plain torch; and in plain torch what the CUDA kernels do not take."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, GPTQTensors
from gptq_api.checkpoint.module import ModuleShape, group_size_of
from gptq_api.errors import ConfigError
from gptq_api.kernels.reference import ReferenceWeight, dequantize
from gptq_api.model.backend import KernelChoice, Role
from gptq_api.model.eagle import EagleWeights
from gptq_api.model.layers.linear import DenseLinear, Linear, PlainLinear, Weight
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.cpu import int4, native, native_forward
from gptq_api.runner.cpu.attention import KVCache, lazy_zeros
from gptq_api.runner.cpu.eagle import PlainEagle
from gptq_api.runner.cpu.forward import PlainLlama
from gptq_api.runner.cpu.native_forward import BlockCache, NativeLlama
from gptq_api.runner.cpu.packed_cache import PackedCache, open_cache
from gptq_api.runner.cpu.packed_file import Packed
from gptq_api.runner.cpu.runner import CpuRunner
from gptq_api.runner.features import Features
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.memory import (
    NOTHING_BESIDE,
    Beside,
    bytes_of_block,
    does_not_fit,
    free_memory,
    gpu_knob,
    plan_cache,
)
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.ranks import Rank

_log = logging.getLogger(__name__)
_EXACT = "reference (exact)"
_DEQUANTIZED = "dequantized bfloat16"


class CpuBackend:
    """Our kernels where they take a model, plain torch where not; a row's bits do not depend on the other rows."""

    kind = "cpu"
    default_batched_tokens = 512
    draft_rows, draft_call_ms = 128, 0.0

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rounds: bool = False,
        dequantizes: bool = True,
        packed_cache: str = "off",
        drafts: bool = False,
        rank: Rank | None = None,
    ) -> None:
        """`rounds`: quantized products may round their activations to int8, where our kernels are there. `dequantizes`:
        where they are not, there is memory for bfloat16 weights of the modules that torch's int4 operator does not
        take. `packed_cache`: the setting of that name. `drafts`: unquantized Linears may be computed as the head is,
        which for few rows is several times as fast as torch. `rank`: the model is one of several ranks' shards."""
        self.device, self.dtype = device, dtype
        self._on_cpu, self._dequantizes = device.type == "cpu", dequantizes
        self._native = self._on_cpu and native.is_available()
        self._rounds = rounds and self._native and dtype == torch.bfloat16
        self._packed_cache, self._drafts, self._rank = packed_cache, drafts, rank
        self._cache: PackedCache | None = None
        # bfloat16 logits have 8 bits, and the greedy token would be decided by rounding: sums are float32
        self.head_dtype = torch.float16 if self._native else torch.float32

    @staticmethod
    def dequantized_bytes(modules: Iterable[ModuleShape]) -> int:
        """Of those that the int4 operator does not take, once they are dequantized to bfloat16."""
        return sum(
            2 * m.in_features * m.out_features
            for m in modules
            if int4.refusal(m.in_features, m.out_features, group_size_of(m)) is not None
        )

    @staticmethod
    def device_name(device: torch.device) -> str:
        return "cpu"

    @staticmethod
    def memory_in_use(device: torch.device) -> tuple[int, int]:
        """Of the process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def embedding_dtype(self, stored: torch.dtype, tied: bool) -> torch.dtype:
        """One tensor serves both ends where they are tied."""
        if self._native:
            return native.held(stored)
        return self.head_dtype if tied else stored

    def kernel(self, bits: int, in_features: int, out_features: int, group_size: int) -> KernelChoice:
        packed = in_features * out_features * bits // 8
        num_groups = 1 if group_size < 0 else -(-in_features // group_size)
        plain = packed + num_groups * out_features * 3 + in_features * 4
        if self._native:
            held = native.num_bytes(bits, in_features, out_features, group_size)
            return KernelChoice(native.kind(exact=not self._rounds), held)
        if self.dtype != torch.bfloat16:
            return KernelChoice(_EXACT, plain)
        reason = int4.refusal(in_features, out_features, group_size)
        if reason is None:
            return KernelChoice(int4.kind(bits), int4.num_bytes(bits, in_features, out_features, group_size))
        if self._dequantizes:
            return KernelChoice(_DEQUANTIZED, in_features * out_features * self.dtype.itemsize)
        return KernelChoice("reference", plain, f"{reason}, and there is no memory to dequantize it once")

    def reading(self, checkpoint: Checkpoint) -> AbstractContextManager[Checkpoint]:
        if self._native:
            self._cache = open_cache(self._packed_cache, checkpoint, native.LAYOUT)
        return nullcontext(checkpoint) if self._on_cpu else checkpoint.read_on(self.device)

    def kept(self, name: str) -> Linear | None:
        packed = self._cache.take(name) if self._cache is not None else None
        if packed is None:
            return None
        weight = native.QuantizedWeight.of_packed(packed.tensors, packed.numbers, exact=not self._rounds)
        return PlainLinear(weight, packed.tensors.get("bias"), native.kind(exact=not self._rounds))

    def packed_file(self, checkpoint: Checkpoint) -> tuple[Path, bool] | None:
        cache = open_cache(self._packed_cache, checkpoint, native.LAYOUT) if self._native else None
        if cache is None:
            return None
        cache.close()
        return cache.path, cache.is_kept()

    def keep(self) -> None:
        if self._cache is not None:
            self._cache.keep()

    def quantized(self, tensors: GPTQTensors, role: Role, name: str = "") -> Linear:
        t, choice = tensors, self.kernel(tensors.bits, tensors.in_features, tensors.out_features, tensors.group_size)
        weight: Weight
        bias = None if t.bias is None else t.bias.to(self.device, torch.float32 if self._native else self.dtype)
        if self._native:
            weight = native.QuantizedWeight(t.qweight, t.zeros, t.scales, t.g_idx, t.bits, exact=not self._rounds)
            if self._cache is not None:
                held, numbers = weight.packed()
                self._cache.put(name, Packed(held if bias is None else {**held, "bias": bias}, numbers))
        elif choice.kind == int4.kind(t.bits):
            weight = int4.Int4Weight(t.qweight, t.zeros, t.scales, t.g_idx, t.group_size, t.bits)
        elif choice.kind == _DEQUANTIZED:
            dense = dequantize(t.qweight, t.zeros, t.scales, t.g_idx, t.bits, self.dtype)
            return DenseLinear(dense.t().contiguous(), bias, _DEQUANTIZED)
        else:
            qweight, zeros, scales, g_idx = (self._own(tensor) for tensor in (t.qweight, t.zeros, t.scales, t.g_idx))
            weight = ReferenceWeight(qweight, zeros, scales, g_idx, t.bits, self.dtype)
        return PlainLinear(weight, bias, str(choice))

    def _own(self, tensor: Tensor) -> Tensor:
        """Loading may map the file; what is kept is memory of our own."""
        return tensor.clone() if self._on_cpu else tensor.to(self.device)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self._on_cpu:
            return lazy_zeros(shape, self.dtype)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def fed_by(self, gate_up: Linear, down: Linear) -> Linear:
        return down

    def dense(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._native and self._drafts and bias is None:
            return native.DenseHead(weight)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        return DenseLinear(weight.to(self.device, self.dtype), bias)

    def head(self, weight: Tensor, *, tied: bool = False) -> Linear:
        if self._native:
            return native.DenseHead(weight)
        return DenseLinear(weight.to(self.device, self.head_dtype))

    def head_kernel(self, size: int, width: int, *, tied: bool) -> KernelChoice:
        kind = f"dense {str(self.head_dtype).removeprefix('torch.')}"
        return KernelChoice(kind, 0 if tied else size * width * self.head_dtype.itemsize)

    def cache_dtype(self, kv_cache_dtype: str) -> torch.dtype:
        """Of K and V. ConfigError for fp8."""
        if kv_cache_dtype == "auto":
            return self.dtype
        if self._on_cpu:
            raise ConfigError("--kv-cache-dtype fp8 needs a CUDA device; use auto")
        raise ConfigError("--kv-cache-dtype fp8 is for float16 and bfloat16, and this runs in float32; use auto")

    def cache_memory(self, options: LoadOptions, to_come: int) -> int:
        if self._on_cpu:
            return options.kv_cache_mib * 2**20 // options.tensor_parallel_size
        return free_memory(self.device, options.gpu_memory_utilization, to_come)

    def blocks_of_ranks(self, ranks: list[tuple[int, int]]) -> int:
        """They have their memory in common."""
        return sum(memory for memory, _ in ranks) // sum(size for _, size in ranks)

    def memory_knob(self, options: LoadOptions) -> str:
        return f"--kv-cache-mib {options.kv_cache_mib}" if self._on_cpu else gpu_knob(options)

    def runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int, beside: Beside = NOTHING_BESIDE
    ) -> CpuRunner:
        config, size, features = weights.config, options.block_size, beside.features
        memory = self.cache_memory(options, beside.to_come)
        if self._rank is not None:
            of_block = bytes_of_block(options, config, self, beside.token_bytes)
            memory = of_block * self.blocks_of_ranks(self._rank.each((memory, of_block)))
        plan = plan_cache(options, config, self, max_model_len, memory, beside.token_bytes)
        is_native = self._native and self._rank is None and native_forward.takes(weights, size)
        kv_heads, dim = config.num_key_value_heads, config.head_dim
        block = (kv_heads, 2, dim * size) if is_native else (size, 2, kv_heads, dim)
        try:
            data = self._zeros((config.num_hidden_layers, plan.num_blocks, *block))
            if features is not None:
                features.data = self._zeros(features.shape(plan.num_blocks * size))
        except (RuntimeError, OSError, MemoryError):
            raise does_not_fit(options, self) from None
        for note in plan.notes if self._rank is None or self._rank.shard.rank == 0 else ():
            _log.warning("%s", note)
        model = (
            NativeLlama(weights, BlockCache(data, size), features)
            if is_native
            else PlainLlama(
                weights,
                KVCache(data),
                shares_threads=self._native and native_forward.computes_all(weights),
                features=features,
                rank=self._rank,
            )
        )
        return CpuRunner(model, plan.max_model_len, self.dtype)

    def draft_runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], CpuRunner]]:
        """(what a draft model will take beside the served one's runner, how it becomes a runner when that is there)."""

        def made(served: LoadedRunner) -> CpuRunner:
            length = min(max_model_len, served.max_model_len)
            mib, share = LoadOptions.kv_cache_mib, LoadOptions.gpu_memory_utilization  # they have had their effect
            told = replace(options, num_blocks=served.num_blocks, kv_cache_mib=mib, gpu_memory_utilization=share)
            return self.runner(weights, told, length)

        return Beside(weights.config.kv_elements_per_token * self.dtype.itemsize), made

    def head_runner(
        self, head: EagleWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], CpuRunner]]:
        """The same for an EAGLE-3 head."""
        c, features = head.llama.config, Features(head, self.dtype, self.device)

        def made(served: LoadedRunner) -> CpuRunner:
            shape = (1, served.num_blocks, options.block_size, 2, c.num_key_value_heads, c.head_dim)
            try:
                cache = KVCache(self._zeros(shape))
            except (RuntimeError, OSError, MemoryError):
                raise does_not_fit(options, self) from None
            length = min(max_model_len, served.max_model_len)
            return CpuRunner(PlainEagle(head, cache, features), length, self.dtype)

        token_bytes = c.kv_elements_per_token * self.dtype.itemsize + features.token_bytes
        return Beside(token_bytes, features=features), made
