"""How large the KV cache is: arithmetic that loading and `inspect` share."""

from __future__ import annotations

from typing import Protocol

import torch

from gptq_api.config import ConfigError
from gptq_api.model.config import LlamaConfig
from gptq_api.runner.options import LoadOptions


class CacheOwner(Protocol):
    """What a backend says of its KV cache."""

    def cache_dtype(self, kv_cache_dtype: str) -> torch.dtype:
        """Of K and V; `auto` is that of the activations. ConfigError for what it does not hold."""

    def cache_memory(self, options: LoadOptions, to_come: int) -> int:
        """Bytes the options leave for the KV cache; `to_come` bytes of other things are not on the device yet."""

    def memory_knob(self, options: LoadOptions) -> str:
        """The setting to turn where memory does not suffice, as it stands."""


def num_cache_blocks(options: LoadOptions, block_bytes: int, max_model_len: int, memory_bytes: int) -> int:
    """As many as asked for, or as fit the memory, but no more than max_num_seqs full sequences can use."""
    most = options.max_num_seqs * -(-max_model_len // options.block_size)
    return options.num_blocks or min(most, memory_bytes // block_bytes)


def plan_cache(
    options: LoadOptions, config: LlamaConfig, owner: CacheOwner, max_model_len: int, memory: int
) -> tuple[int, int]:
    """(number of blocks, max_model_len) for a cache of at most `memory` bytes.

    The length is cut to what the cache holds, unless the user asked for it; ConfigError names the knob to turn.
    """
    dtype, knob = owner.cache_dtype(options.kv_cache_dtype), owner.memory_knob(options)
    block_bytes = config.kv_elements_per_token * options.block_size * dtype.itemsize
    num_blocks = num_cache_blocks(options, block_bytes, max_model_len, memory)
    if num_blocks < 1:
        raise ConfigError(f"{knob} does not hold one KV cache block of {block_bytes / 2**20:.1f} MiB; raise it")
    capacity = num_blocks * options.block_size
    if capacity < max_model_len and options.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {max_model_len} needs {-(-max_model_len // options.block_size)} KV cache blocks, "
            f"{num_blocks} are there; lower it or raise {knob}"
        )
    return num_blocks, min(max_model_len, capacity)


def does_not_fit(options: LoadOptions, owner: CacheOwner) -> ConfigError:
    """The memory that was planned with is not there."""
    return ConfigError(f"the KV cache does not fit in memory; lower {owner.memory_knob(options)}")


def free_memory(device: torch.device, utilization: float, to_come: int) -> int:
    """Bytes of a GPU that a share of it leaves."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1 - utilization) * total) - to_come)


def gpu_knob(options: LoadOptions) -> str:
    return f"--gpu-memory-utilization {options.gpu_memory_utilization:g}"
