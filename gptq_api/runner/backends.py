"""The devices a model may run on: what each brings, and which one takes a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.errors import ConfigError
from gptq_api.model.backend import Backend
from gptq_api.model.config import LlamaConfig
from gptq_api.model.eagle import EagleWeights
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.backend import CudaBackend, refusal
from gptq_api.runner.drafter import DraftRunner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.memory import NOTHING_BESIDE, Beside, CacheOwner, host_memory
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.ranks import Rank

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RunnerBackend(Backend, CacheOwner, Protocol):
    """A Backend that also runs what was loaded."""

    kind: str
    """of device; what it stands for in BACKENDS"""
    default_batched_tokens: int
    """computed in one step where nobody says how many"""
    draft_rows: int
    """of a prompt that a draft model computes between two steps of the served one, whose readers wait meanwhile"""
    draft_call_ms: float
    """from the last token of a draft model to the launch of the step that checks them"""

    @staticmethod
    def device_name(device: torch.device) -> str:
        """For tables of results: "cpu", or which GPU it is."""

    @staticmethod
    def memory_in_use(device: torch.device) -> tuple[int, int]:
        """Bytes (now, at most until now) of this process where the model is."""

    def packed_file(self, checkpoint: Checkpoint) -> tuple[Path, bool] | None:
        """Where its packed weights are kept from one start to the next, and whether they are; None where they are not
        to be."""

    def keep(self) -> None:
        """All has been loaded, and the next start may find it packed; nothing waits for that."""

    def runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int, beside: Beside = NOTHING_BESIDE
    ) -> LoadedRunner:
        """Ready to step. ConfigError where the memory does not suffice."""

    def draft_runner(
        self, weights: LlamaWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], DraftRunner]]:
        """(what a draft model will take beside the served one's runner, how it becomes a runner when that is there)."""

    def head_runner(
        self, head: EagleWeights, options: LoadOptions, max_model_len: int
    ) -> tuple[Beside, Callable[[LoadedRunner], DraftRunner]]:
        """The same for an EAGLE-3 head, with the features that the served model's runner has to write."""


BACKENDS: dict[str, type[CpuBackend] | type[CudaBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend}
"""by the type of device; what the second does not take runs on its device by the first, in float32"""


def backend_of(device: torch.device) -> type[CpuBackend] | type[CudaBackend]:
    """The one that knows the device, whichever runs the model there."""
    return BACKENDS[device.type]


def set_threads(device: torch.device, num_threads: int | None) -> None:
    """CPU threads of the products, where products are the CPU's; None: torch's own number."""
    if device.type == "cpu" and num_threads is not None:
        torch.set_num_threads(num_threads)


def choose_backend(
    options: LoadOptions,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    device: torch.device,
    *,
    drafts: bool = False,
    rank: Rank | None = None,
) -> RunnerBackend:
    """For this model on this device. ConfigError for a type that it does not compute in. `drafts`: it is a draft
    model, with whose bits nobody has an answer. `rank`: of several, which have a shard each."""
    dtype = resolve_dtype(options.dtype, device, checkpoint)
    if device.type == "cpu":
        if options.lm_head_bits != 16:
            raise ConfigError(f"--lm-head-bits {options.lm_head_bits} is for CUDA; leave it out on the CPU")
        room, needed = host_memory(), CpuBackend.dequantized_bytes(checkpoint.modules.values())
        # As much again for what comes after: the cache, and a tensor on its way.
        enough = room is None or 2 * needed < room
        return CpuBackend(
            device,
            dtype,
            rounds=options.dtype == "auto",
            dequantizes=enough,
            packed_cache="off" if options.tensor_parallel_size > 1 else options.packed_cache,
            drafts=drafts,
            rank=rank,
        )
    reason = "it computes in float32" if dtype == torch.float32 else refusal(config, options.block_size)
    if reason is not None and options.batch_invariant:
        raise ConfigError(
            f"--batch-invariant: the CUDA kernels do not serve this model ({reason}), and cuBLAS adds up in an "
            "order that depends on the batch; leave it out, or use --device cpu"
        )
    if reason is not None and options.lm_head_bits != 16:
        raise ConfigError(
            f"--lm-head-bits {options.lm_head_bits}: the CUDA kernels do not serve this model ({reason}); leave it out"
        )
    if reason is not None and options.tensor_parallel_size > 1:
        raise ConfigError(
            f"--tensor-parallel-size {options.tensor_parallel_size}: the CUDA kernels do not serve this model "
            f"({reason}), and only they work on several GPUs; leave it out"
        )
    if dtype == torch.float32:
        return BACKENDS["cpu"](device, dtype)
    if reason is not None:
        _log.warning("the CUDA kernels do not serve this: %s. It runs slowly, in float32", reason)
        return BACKENDS["cpu"](device, torch.float32)
    return CudaBackend(
        device, dtype, batch_invariant=options.batch_invariant, lm_head_bits=options.lm_head_bits, rank=rank
    )


def token_budget(options: LoadOptions, device: torch.device) -> int:
    """Tokens computed in one step."""
    return options.max_num_batched_tokens or backend_of(device).default_batched_tokens


def resolve_dtype(asked: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is bfloat16 on the CPU and the checkpoint's own half type on CUDA. float16 is refused on the CPU."""
    if device.type == "cpu" and asked == "float16":
        raise ConfigError("--dtype float16 has no fast product on the CPU; use bfloat16 (fast) or float32 (exact)")
    if asked != "auto":
        return _DTYPES[asked]
    if device.type == "cpu":
        return torch.bfloat16
    return checkpoint.float_dtype if checkpoint.float_dtype != torch.float32 else torch.float16


def resolve_device(asked: str) -> torch.device:
    """`auto` is the first CUDA device where there is one. ConfigError where CUDA was asked for and is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is available to torch; use --device cpu")
    wants_cuda = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if wants_cuda else torch.device("cpu")
