"""What loading a model may be told, in plain arguments: below here nobody knows where settings come from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_api.config import ModelSettings


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The settings of the same names (config.py), which say what they mean, with their defaults."""

    model_path: str = "demo"
    gptq_ckpt: Path | None = None
    gptq_wbits: int | None = None
    gptq_groupsize: int | None = None
    gptq_act_order: bool | None = None
    max_model_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_mib: int = 512
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    batch_invariant: bool = False
    lm_head_bits: int = 16
    packed_cache: str = "auto"
    draft_model: str | None = None

    @classmethod
    def of(cls, settings: ModelSettings) -> LoadOptions:
        return cls(**{option.name: getattr(settings, option.name) for option in fields(cls)})
