"""What is measured of one model, and the order to measure it. Plain values: they go to another process and back."""

from __future__ import annotations

from typing import Literal

import msgspec

from gptq_api.errors import UserError

EXIT_TOLD, EXIT_NO_ROOM = 3, 4
"""exit statuses of a measuring process whose last words on stderr are a sentence for the user; the second of a
TooLargeError"""


class TooLargeError(UserError):
    """Random weights would not fit in the host's memory."""


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["gptq", "dense", "dequantized"]


class Decoding(msgspec.Struct, frozen=True):
    """Steps in which so many sequences get a token each."""

    batch: int
    seconds_per_step: float
    """median of the steps of all repeats"""
    spread: float
    """of the repeats' medians: (largest - smallest) / median"""

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds_per_step


class Job(msgspec.Struct, frozen=True):
    """One row of the table to be."""

    name: str
    folder: str
    kind: Kind
    """gptq; dense: an unquantized folder; dequantized: a GPTQ checkpoint whose weights are dequantized at load"""
    ckpt: str | None
    text: str | None
    context: int | None
    num_windows: int | None
    prompt_tokens: int | None
    """None: 128, or a quarter of the context where that is less"""
    num_tokens: int | None
    """None: 128, or what the context leaves; of random weights on the CPU, where the large ones are slow, 32"""
    device: Device
    dtype: Dtype
    num_threads: int
    synthetic: str | None = None
    """the shape of random weights, which `folder` does not hold; of `kind` gptq or dense"""
    group_size: int = 128
    """of random weights; -1: one group"""
    act_order: bool = False
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    batches: list[int] | None = None
    """None: of 1, 8 and 64 what memory and patience allow"""
    repeats: int = 1


class Row(msgspec.Struct, frozen=True):
    """One row of the table. MiB are of 2**20 bytes."""

    name: str
    kind: Kind
    shape: list[int]
    """layers, hidden, intermediate and vocabulary size: rows with the same can be compared"""
    bits: list[int]
    """empty: unquantized; more than one: mixed"""
    group_sizes: list[int]
    """-1: one group"""
    act_order: str
    """yes, no, or how many modules of all"""
    device: str
    dtype: str
    threads: int
    weights_mib: float
    resident_mib: float
    """after decoding: of the process on the CPU, of the allocator on CUDA"""
    peak_mib: float
    """the same, at most, loading included"""
    load_seconds: float
    seconds_per_token: float
    """median at batch 1"""
    decoded_tokens: int
    context_tokens: int
    """in the cache when timing began"""
    perplexity: float | None
    perplexity_tokens: int
    """predicted tokens it is the mean over"""
    window: int | None
    """tokens of context perplexity was measured with"""
    repeats: int
    decoding: list[Decoding]
    """the smallest batch first"""
