"""How large the KV cache is: arithmetic that loading and `inspect` share."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptq_api.errors import ConfigError
from gptq_api.model.config import LlamaConfig
from gptq_api.runner.features import Features
from gptq_api.runner.options import LoadOptions


class CacheOwner(Protocol):
    """What a backend says of its KV cache."""

    def cache_dtype(self, kv_cache_dtype: str) -> torch.dtype:
        """Of K and V; `auto` is that of the activations. ConfigError for what it does not hold."""

    def cache_memory(self, options: LoadOptions, to_come: int) -> int:
        """Bytes the options leave for the KV cache; `to_come` bytes of other things are not on the device yet."""

    def blocks_of_ranks(self, ranks: list[tuple[int, int]]) -> int:
        """How many blocks fit on all ranks, which have the same ones, from (bytes for the cache, bytes of a block) of
        each."""

    def memory_knob(self, options: LoadOptions) -> str:
        """The setting to turn where memory does not suffice, as it stands."""


@dataclass(frozen=True)
class CachePlan:
    """How large the cache is, and what that says about the settings."""

    num_blocks: int
    max_model_len: int
    """cut to what the cache holds"""
    notes: tuple[str, ...]
    """sentences: where less is done than a setting says"""


@dataclass(frozen=True)
class Beside:
    """What a draft model takes of the memory that the KV cache would have."""

    token_bytes: int = 0
    """of its own cache, which has as many blocks, and of features"""
    to_come: int = 0
    """of other things that are not on the device yet"""
    features: Features | None = None
    """what an EAGLE-3 head wants of every token, which the served model's runner makes room for and writes"""


NOTHING_BESIDE = Beside()


def longest_text(options: LoadOptions, config: LlamaConfig) -> int:
    """Prompt plus answer, tokens. ConfigError where more is asked for than the model's positions go."""
    asked, rope = options.max_model_len, config.rope
    longest = config.max_position_embeddings
    if rope.rope_type == "dynamic":  # stretches as far as it is asked to, and is made for its factor
        longest = int(longest * rope.factor)
    if asked is not None and asked > longest:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {longest} tokens this model was made for "
            "(max_position_embeddings and rope scaling in config.json); lower it, or leave it out"
        )
    return asked or config.max_position_embeddings


def plan_cache(
    options: LoadOptions, config: LlamaConfig, owner: CacheOwner, max_model_len: int, memory: int, beside: int = 0
) -> CachePlan:
    """A cache of at most `memory` bytes, as many blocks as are asked for or as fit, but no more than max_num_seqs full
    sequences can use. `beside`: bytes that a token takes in another cache of as many blocks.

    The length is cut to what the cache holds, unless the user asked for it; ConfigError names the knob to turn.
    """
    knob, block_bytes = _knob(options, owner), bytes_of_block(options, config, owner, beside)
    blocks_each = -(-max_model_len // options.block_size)
    most = options.max_num_seqs * blocks_each
    fitting = memory // block_bytes
    num_blocks = options.num_blocks or min(most, fitting)
    if num_blocks < 1:
        raise ConfigError(f"{knob} does not hold one KV cache block of {block_bytes / 2**20:.1f} MiB; raise it")
    capacity = num_blocks * options.block_size
    if capacity < max_model_len and options.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {max_model_len} needs {blocks_each} KV cache blocks, {num_blocks} are there; lower it or "
            f"raise {knob}"
        )
    notes = _without_effect(options, owner)
    if options.num_blocks is None and fitting > most and options.kv_cache_mib != LoadOptions.kv_cache_mib and not notes:
        notes.append(
            f"the KV cache takes {most * block_bytes / 2**20:.0f} MiB and not {knob}: {options.max_num_seqs} sequences "
            f"(--max-num-seqs) of {max_model_len} tokens fill no more"
        )
    if capacity < max_model_len:
        notes.append(
            f"prompt and answer have {capacity} tokens together, not the model's {max_model_len}: that is what the KV "
            f"cache holds; raise {knob}"
        )
    return CachePlan(num_blocks, min(max_model_len, capacity), tuple(notes))


def bytes_of_block(options: LoadOptions, config: LlamaConfig, owner: CacheOwner, beside: int = 0) -> int:
    """With what a token takes `beside` it."""
    itemsize = owner.cache_dtype(options.kv_cache_dtype).itemsize
    return (config.kv_elements_per_token * itemsize + beside) * options.block_size


def _knob(options: LoadOptions, owner: CacheOwner) -> str:
    return owner.memory_knob(options) if options.num_blocks is None else f"--num-blocks {options.num_blocks}"


def _without_effect(options: LoadOptions, owner: CacheOwner) -> list[str]:
    """Of the settings of the cache's size that are not their defaults those that something else overrules."""
    share = LoadOptions.gpu_memory_utilization
    settings = {
        "--kv-cache-mib": (f"{options.kv_cache_mib}", options.kv_cache_mib != LoadOptions.kv_cache_mib),
        "--gpu-memory-utilization": (f"{options.gpu_memory_utilization:g}", options.gpu_memory_utilization != share),
    }
    knob = _knob(options, owner)
    return [
        f"{name} {value} changes nothing: here {knob} says how large the KV cache is"
        for name, (value, is_given) in settings.items()
        if is_given and not knob.startswith(name)
    ]


def does_not_fit(options: LoadOptions, owner: CacheOwner) -> ConfigError:
    """The memory that was planned with is not there."""
    return ConfigError(f"the KV cache does not fit in memory; lower {_knob(options, owner)}")


def host_memory() -> int | None:
    """Bytes this process may still take, of the machine's and of its control group's; None where neither is told."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used, stat = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
        found.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))  # ValueError: "max", no limit
    return min(found, default=None)


def free_memory(device: torch.device, utilization: float, to_come: int) -> int:
    """Bytes of a GPU that a share of it leaves."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1 - utilization) * total) - to_come)


def gpu_knob(options: LoadOptions) -> str:
    return f"--gpu-memory-utilization {options.gpu_memory_utilization:g}"
