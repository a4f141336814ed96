"""How large the KV cache is: arithmetic that loading and `inspect` share."""

from __future__ import annotations

import torch

from gptq_api.config import ConfigError, Settings
from gptq_api.model.config import LlamaConfig


def cache_dtype(settings: Settings, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of K and V; `auto` is that of the activations. ConfigError for fp8 where the CUDA kernels do not run."""
    if settings.kv_cache_dtype == "auto":
        return dtype
    if device.type != "cuda":
        raise ConfigError("--kv-cache-dtype fp8 needs a CUDA device; use auto")
    if dtype == torch.float32:
        raise ConfigError("--kv-cache-dtype fp8 is for float16 and bfloat16, and this runs in float32; use auto")
    return torch.float8_e4m3fn


def num_cache_blocks(settings: Settings, block_bytes: int, max_model_len: int, memory_bytes: int) -> int:
    """As many as asked for, or as fit the memory, but no more than max_num_seqs full sequences can use."""
    most = settings.max_num_seqs * -(-max_model_len // settings.block_size)
    return settings.num_blocks or min(most, memory_bytes // block_bytes)


def cache_memory(settings: Settings, device: torch.device, to_come: int) -> int:
    """Bytes the settings leave for the KV cache; `to_come` bytes of other things are not on the device yet."""
    if device.type == "cpu":
        return settings.kv_cache_mib * 2**20
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1 - settings.gpu_memory_utilization) * total) - to_come)


def memory_knob(settings: Settings, device: torch.device) -> str:
    """The setting to turn where memory does not suffice, as it stands."""
    if device.type == "cuda":
        return f"--gpu-memory-utilization {settings.gpu_memory_utilization:g}"
    return f"--kv-cache-mib {settings.kv_cache_mib}"


def plan_cache(
    settings: Settings, config: LlamaConfig, device: torch.device, dtype: torch.dtype, max_model_len: int, memory: int
) -> tuple[int, int]:
    """(number of blocks, max_model_len) for a cache of at most `memory` bytes with elements of `dtype`.

    The length is cut to what the cache holds, unless the user asked for it; ConfigError names the knob to turn.
    """
    block_bytes = config.kv_elements_per_token * settings.block_size * dtype.itemsize
    num_blocks, knob = num_cache_blocks(settings, block_bytes, max_model_len, memory), memory_knob(settings, device)
    if num_blocks < 1:
        raise ConfigError(f"{knob} does not hold one KV cache block of {block_bytes / 2**20:.1f} MiB; raise it")
    capacity = num_blocks * settings.block_size
    if capacity < max_model_len and settings.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {max_model_len} needs {-(-max_model_len // settings.block_size)} KV cache blocks, "
            f"{num_blocks} are there; lower it or raise {knob}"
        )
    return num_blocks, min(max_model_len, capacity)


def does_not_fit(settings: Settings, device: torch.device) -> ConfigError:
    """The memory that was planned with is not there."""
    return ConfigError(f"the KV cache does not fit in memory; lower {memory_knob(settings, device)}")
