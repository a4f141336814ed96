"""CUDA: what its kernels take, how weights are packed for them, and who gets how much memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, GPTQTensors
from gptq_api.errors import ConfigError
from gptq_api.kernels import decode_attention, gemm, ops, prefill_attention
from gptq_api.kernels.exchange import Exchange, peer_refusal
from gptq_api.kernels.layout import CHUNK_K, STRIP_ROWS, PackedLinear, chunk_bytes
from gptq_api.kernels.planes import head_bytes, pack_bytes, pack_head
from gptq_api.kernels.reference import ReferenceWeight
from gptq_api.model.backend import KernelChoice, PackError, Role
from gptq_api.model.config import LlamaConfig
from gptq_api.model.eagle import EagleWeights
from gptq_api.model.layers.linear import Linear, PlainLinear
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.eagle import CudaEagle
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama, of_cublas
from gptq_api.runner.cuda.graphs import GRAPH_BYTES
from gptq_api.runner.cuda.linear import KERNELS, CudaDenseLinear, PackedGateUp, PackedGPTQLinear, PackedHead
from gptq_api.runner.cuda.runner import CudaRunner, state_bytes
from gptq_api.runner.features import Features
from gptq_api.runner.inputs import StepInputs, StepShape, num_words, write_idle
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
from gptq_api.step import MAX_ROWS_AGAIN

_log = logging.getLogger(__name__)
_DRAFT_GRAPH_BYTES = GRAPH_BYTES // 4
"""of a draft model, which has few shapes"""


def refusal(config: LlamaConfig, block_size: int) -> str | None:
    """Why the CUDA kernels do not serve such a model; None where they do."""
    for name, width in (
        ("hidden_size", config.hidden_size),
        ("width of all heads", config.num_attention_heads * config.head_dim),
    ):
        if width % 8 or width > ops.MAX_NORM_WIDTH:
            return f"{name} {width}; they take multiples of 8 up to {ops.MAX_NORM_WIDTH}"
    if config.head_dim not in decode_attention.HEAD_DIMS:
        return f"heads of {config.head_dim}; attention takes {', '.join(map(str, decode_attention.HEAD_DIMS))}"
    return gemm.unavailable_reason() or prefill_attention.refusal(config.head_dim, block_size)


class CudaBackend:
    """For what `refusal` has nothing against, in float16 or bfloat16."""

    kind = "cuda"
    default_batched_tokens = 2048
    draft_rows, draft_call_ms = 1024, 0.15

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_invariant: bool = False,
        lm_head_bits: int = 16,
        rank: Rank | None = None,
    ) -> None:
        """`batch_invariant`: products give a row the same bits however many there are. `lm_head_bits`: of a head that
        the checkpoint has in 16. `rank`: the model is one of several ranks' shards, and this is its thread."""
        self._rank = rank
        self.device, self.dtype, self.head_dtype = device, dtype, dtype
        self._same_bits, self._head_bits = batch_invariant, lm_head_bits
        # cuBLAS may add parts of a sum up in 16 bits where it cuts k: how exact a row is would depend on its company.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    @staticmethod
    def device_name(device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    @staticmethod
    def memory_in_use(device: torch.device) -> tuple[int, int]:
        """What torch has allocated on the device."""
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)

    def embedding_dtype(self, stored: torch.dtype, tied: bool) -> torch.dtype:
        return self.dtype

    def kernel(self, bits: int, in_features: int, out_features: int, group_size: int) -> KernelChoice:
        reason = gemm.refusal(bits, in_features, out_features, group_size) or gemm.unavailable_reason()
        if reason is not None:
            num_groups = 1 if group_size < 0 else -(-in_features // group_size)
            packed = in_features * out_features * bits // 8
            return KernelChoice("reference", packed + num_groups * out_features * 3 + in_features * 4, reason)
        # Zero points counted: the headers do not say whether there are any, and they are a hundredth of the weight.
        chunks = -(-in_features // CHUNK_K) * (out_features * bits // 4 // STRIP_ROWS)
        held = chunks * chunk_bytes(group_size, has_zeros=True) + in_features * 4
        return KernelChoice(KERNELS[bits], held, orders_outputs=True)

    def reading(self, checkpoint: Checkpoint) -> AbstractContextManager[Checkpoint]:
        return checkpoint.read_on(self.device)

    def kept(self, name: str) -> Linear | None:
        return None

    def packed_file(self, checkpoint: Checkpoint) -> tuple[Path, bool] | None:
        return None

    def keep(self) -> None:
        """Packing takes a fraction of a second here."""

    def quantized(self, tensors: GPTQTensors, role: Role, name: str = "") -> Linear:
        t = tensors
        choice = self.kernel(t.bits, t.in_features, t.out_features, t.group_size)
        bias = None if t.bias is None else t.bias.to(self.device, self.dtype)
        if choice.kind not in KERNELS.values():
            qweight, zeros, scales, g_idx = (x.to(self.device) for x in (t.qweight, t.zeros, t.scales, t.g_idx))
            return PlainLinear(ReferenceWeight(qweight, zeros, scales, g_idx, t.bits, self.dtype), bias, str(choice))
        try:
            if t.bits == 8:
                return self._of_bytes(t, role, bias)
            order = role.half_order
            if order is not None:
                order = torch.cat((order, order + t.out_features // 2))
            g_idx_or_none = t.g_idx if t.act_order else None
            weight = gemm.pack(
                *(t.qweight, t.scales, t.zeros, g_idx_or_none, t.group_size, self.device),
                paired=role.paired,
                out_order=order,
            )
        except ValueError as error:
            raise PackError(str(error)) from None
        if bias is not None and order is not None:
            bias = bias[order]
        return self._linear(weight, bias, role)

    def _of_bytes(self, t: GPTQTensors, role: Role, bias: Tensor | None) -> Linear:
        """A Linear of 8 bits; gate and up apart. ValueError for tensors that cannot be packed."""

        def part(outputs: slice, order: Tensor | None = None) -> PackedGPTQLinear:
            g_idx = t.g_idx if t.act_order else None
            of_outputs = (t.qweight[:, outputs], t.scales[:, outputs], t.zeros[:, outputs])
            weight = pack_bytes(*of_outputs, g_idx, t.group_size, self.device, out_order=order)
            its_bias = None if bias is None else bias[outputs]
            return self._linear(weight, its_bias if its_bias is None or order is None else its_bias[order], role)

        if not role.paired:
            return part(slice(None))
        half = t.out_features // 2
        return PackedGateUp(part(slice(half), role.half_order), part(slice(half, None), role.half_order))

    def _linear(self, weight: PackedLinear, bias: Tensor | None, role: Role) -> PackedGPTQLinear:
        if role.head:
            return PackedHead(weight, bias, weight.out_features)
        by_producer = role.sorted_by_producer
        return PackedGPTQLinear(weight, bias, sorted_by_producer=by_producer, same_bits=self._same_bits)

    def fed_by(self, gate_up: Linear, down: Linear) -> Linear:
        if isinstance(gate_up, PackedGPTQLinear | PackedGateUp) and isinstance(down, PackedGPTQLinear):
            return down.in_order()
        return down

    def dense(self, weight: Tensor, bias: Tensor | None) -> Linear:
        bias = None if bias is None else bias.to(self.device, self.dtype)
        return CudaDenseLinear(weight.to(self.device, self.dtype), bias)

    def head(self, weight: Tensor, *, tied: bool = False) -> Linear:
        if self._head_bits == 16:
            return CudaDenseLinear(weight.to(self.device, self.head_dtype))
        choice = self.head_kernel(*weight.shape, tied=tied)
        try:
            return PackedHead(pack_head(weight, self.device), None, len(weight), choice.kind)
        except ValueError as error:
            raise ConfigError(f"--lm-head-bits {self._head_bits}: {error}; leave it out") from None

    def head_kernel(self, size: int, width: int, *, tied: bool) -> KernelChoice:
        if self._head_bits == 16:
            kind = f"dense {str(self.head_dtype).removeprefix('torch.')}"
            return KernelChoice(kind, 0 if tied else size * width * self.head_dtype.itemsize)
        num_bytes = head_bytes(size, width)
        more = f", {num_bytes / 2**20:.0f} MiB beside the tied embedding" if tied else ""
        return KernelChoice(f"{KERNELS[8]} (head{more})", num_bytes)

    def cache_dtype(self, kv_cache_dtype: str) -> torch.dtype:
        return self.dtype if kv_cache_dtype == "auto" else torch.float8_e4m3fn

    def cache_memory(self, options: LoadOptions, to_come: int) -> int:
        return free_memory(self.device, options.gpu_memory_utilization, to_come)

    def blocks_of_ranks(self, ranks: list[tuple[int, int]]) -> int:
        """Where the fewest fit; a draft model is on one of them alone."""
        return min(memory // size for memory, size in ranks)

    def memory_knob(self, options: LoadOptions) -> str:
        return gpu_knob(options)

    def runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int, beside: Beside = NOTHING_BESIDE
    ) -> CudaRunner:
        """ConfigError where the memory does not suffice."""
        config, kv_dtype = weights.config, self.cache_dtype(options.kv_cache_dtype)
        if options.batch_invariant and (others := of_cublas(weights)):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ConfigError(
                f"--batch-invariant: cuBLAS multiplies by {others[0]}{more}, and adds up in an order that "
                "depends on the batch; leave it out, or serve a checkpoint whose Linears all have 4 or 8 bits"
            )
        try:
            exchange = None if self._rank is None else _exchange(self._rank)
            model, taken, to_come = self._forward(weights, options, max_model_len, beside.features, exchange)
            memory = self.cache_memory(options, GRAPH_BYTES + to_come + beside.to_come)
            if self._rank is not None:
                of_block = bytes_of_block(options, config, self, beside.token_bytes)
                memory = of_block * self.blocks_of_ranks(self._rank.each((memory, of_block)))
            plan = plan_cache(options, config, self, max_model_len, memory, beside.token_bytes)
            cache = CudaKVCache(config, plan.num_blocks, options.block_size, kv_dtype, self.device)
            if (features := beside.features) is not None:
                shape = features.shape(plan.num_blocks * options.block_size)
                features.data = torch.zeros(shape, dtype=self.dtype, device=self.device)
        except torch.cuda.OutOfMemoryError:
            raise does_not_fit(options, self) from None
        for note in plan.notes if self._rank is None or self._rank.shard.rank == 0 else ():
            _log.warning("%s", note)
        sizes = (options.max_num_seqs, self._num_rows(options), plan.max_model_len)
        runner = CudaRunner(model, cache, *sizes, taken + to_come)
        runner.warm_up()
        if exchange is not None:
            exchange.go_live()
        return runner

    def draft_runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], CudaRunner]]:
        """(what a draft model will take beside the served one's runner, how it becomes a runner when that is there)."""
        options = replace(options, batch_invariant=False)  # a guess is a guess
        try:
            made = self._forward(weights, options, max_model_len)
        except torch.cuda.OutOfMemoryError:
            raise does_not_fit(options, self) from None
        return self._beside(*made, options, max_model_len, None)

    def head_runner(
        self, head: EagleWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], CudaRunner]]:
        """The same for an EAGLE-3 head."""
        options, features = replace(options, batch_invariant=False), Features(head, self.dtype, self.device)

        def build(rows: int, sequences: int, length: int) -> CudaLlama:
            return CudaEagle(head, rows, sequences, length, self.dtype, features)

        try:
            made = self._sized(build, head.llama.config, options, max_model_len)
        except torch.cuda.OutOfMemoryError:
            raise does_not_fit(options, self) from None
        return self._beside(*made, options, max_model_len, features)

    def _beside(
        self,
        model: CudaLlama,
        taken: int,
        to_come: int,
        options: LoadOptions,
        max_model_len: int,
        features: Features | None,
    ) -> tuple[Beside, Callable[[LoadedRunner], CudaRunner]]:
        config, kv_dtype = model.config, self.cache_dtype(options.kv_cache_dtype)

        def made(served: LoadedRunner) -> CudaRunner:
            assert isinstance(served, CudaRunner)
            try:
                cache = CudaKVCache(config, served.num_blocks, options.block_size, kv_dtype, self.device)
            except torch.cuda.OutOfMemoryError:
                raise does_not_fit(options, self) from None
            sizes = (options.max_num_seqs, self._num_rows(options), min(max_model_len, served.max_model_len))
            runner = CudaRunner(model, cache, *sizes, taken + to_come, drafts_for=served)
            runner.warm_up()
            return runner

        of_features = 0 if features is None else features.token_bytes
        token_bytes = config.kv_elements_per_token * kv_dtype.itemsize + of_features
        return Beside(token_bytes, to_come + _DRAFT_GRAPH_BYTES, features), made

    def _num_rows(self, options: LoadOptions) -> int:
        return options.max_num_batched_tokens or self.default_batched_tokens

    def _forward(
        self,
        weights: LlamaWeights,
        options: LoadOptions,
        max_model_len: int,
        features: Features | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[CudaLlama, int, int]:
        """As `_sized`."""

        def build(rows: int, sequences: int, length: int) -> CudaLlama:
            return CudaLlama(weights, rows, sequences, length, self.dtype, options.batch_invariant, features, exchange)

        return self._sized(build, weights.config, options, max_model_len)

    def _sized(
        self,
        build: Callable[[int, int, int], CudaLlama],
        config: LlamaConfig,
        options: LoadOptions,
        max_model_len: int,
    ) -> tuple[CudaLlama, int, int]:
        """(the forward pass, bytes that it has taken on the device, bytes that its runner and its steps will take).
        `build`: for steps of so many rows and sequences, and texts of such a length."""
        num_rows, num_seqs = self._num_rows(options), options.max_num_seqs
        kv_dtype, before = self.cache_dtype(options.kv_cache_dtype), torch.cuda.memory_allocated(self.device)
        sampled = max(num_seqs, MAX_DRAFT_ROWS)
        model = build(max(num_rows, sampled), sampled, max_model_len)
        for turn in range(1 if self._rank is None else self._rank.shard.size):
            if self._rank is None or self._rank.shard.rank == turn:  # whoever comes later finds all compiled
                transient = _largest_step(model, config, options, num_rows, max_model_len, kv_dtype)
            if self._rank is not None:
                self._rank.meet()
        state = state_bytes(num_seqs, num_rows, max_model_len, options.block_size)
        return model, torch.cuda.memory_allocated(self.device) - before, transient + state


def _exchange(rank: Rank) -> Exchange:
    """By way of the host's memory where the devices cannot write each other's. All ranks call it."""
    reason = peer_refusal(rank.each(torch.cuda.current_device()))
    if reason is not None and rank.shard.rank == 0:
        _log.warning("%s: what they exchange goes through the host's memory, which is slower", reason)
    return Exchange(rank.shard.rank, rank.shard.size, rank.each, through_host=reason is not None)


@torch.inference_mode()
def _largest_step(
    model: CudaLlama,
    config: LlamaConfig,
    options: LoadOptions,
    num_rows: int,
    max_model_len: int,
    kv_dtype: torch.dtype,
) -> int:
    """Bytes that the largest step allocates while it runs. A small one follows: between them they compile all that is
    compiled at first use."""
    num_seqs, device = options.max_num_seqs, model.device
    history = torch.zeros(num_seqs, 1, dtype=torch.int32, device=device)
    cache = CudaKVCache(config, 1, options.block_size, kv_dtype, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    tiles = num_rows // prefill_attention.TILE_ROWS + num_seqs
    apart = options.batch_invariant
    shapes = [StepShape(num_rows, num_seqs, 1, tiles, prompts=apart), StepShape(1, 1, 1, 1, prompts=apart)]
    if apart:  # of answers that are computed once more, each row gets a table
        most, width = min(num_rows, num_seqs + MAX_ROWS_AGAIN), -(-max_model_len // options.block_size)
        shapes.insert(0, StepShape(most, num_seqs, width, 1))
    for shape in shapes:
        host = np.zeros(num_words(shape), np.int32)
        write_idle(StepInputs.over(host, shape))
        inputs = StepInputs.over(torch.from_numpy(host).to(device), shape)
        model.forward(inputs, history, cache.layers, decode=False, prompts=shape.prompts)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
