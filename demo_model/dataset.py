"""Chats as tensors: generated and encoded by all cores, kept flat on the device, batched by length.

Chats of similar length share a batch and are padded at the end, so that plain causal attention is right without a
mask and every chat starts at position 0, as it will in the server.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from demo_model.data import records
from demo_model.tokenizer import MAX_LENGTH, PAD, segments

LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512, 768, MAX_LENGTH)
Encoded = tuple[npt.NDArray[np.int16], npt.NDArray[np.int8], npt.NDArray[np.int32]]


def encode(job: tuple[Path, int, int]) -> Encoded:
    """(tokenizer.json, seed, number of records) -> flat token ids, flat "the model writes this" flags, lengths."""
    path, seed, num = job
    tokenizer = Tokenizer.from_file(str(path))
    pieces, owners, written = [], [], []
    for i, item in enumerate(records(seed, num)):
        for text, ours in segments(item):
            pieces.append(text)
            owners.append(i)
            written.append(ours)
    ids: list[list[int]] = [[] for _ in range(num)]
    flags: list[list[int]] = [[] for _ in range(num)]
    for encoding, i, ours in zip(
        tokenizer.encode_batch(pieces, add_special_tokens=False), owners, written, strict=True
    ):
        ids[i] += encoding.ids
        flags[i] += [int(ours)] * len(encoding.ids)
    keep = [i for i in range(num) if len(ids[i]) <= MAX_LENGTH]
    return (
        np.concatenate([np.array(ids[i], np.int16) for i in keep]),
        np.concatenate([np.array(flags[i], np.int8) for i in keep]),
        np.array([len(ids[i]) for i in keep], np.int32),
    )


@dataclass
class Chats:
    """Records one after the other: ids int16 [T], written int8 [T], lengths int32 [R], starts int64 [R]."""

    ids: torch.Tensor
    written: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def generate(cls, tokenizer_json: Path, seed: int, num: int, device: torch.device) -> Chats:
        """`num` records from seeds seed * 1000 + i, in parts of at most 10,000 records."""
        part = min(num, 10_000)
        jobs = [(tokenizer_json, seed * 1000 + i, part) for i in range(max(1, num // part))]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            done = pool.map(encode, jobs, chunksize=1)
        lengths = torch.from_numpy(np.concatenate([d[2] for d in done]))
        return cls(
            torch.from_numpy(np.concatenate([d[0] for d in done])).to(device),
            torch.from_numpy(np.concatenate([d[1] for d in done])).to(device),
            lengths.to(device),
            (lengths.cumsum(0) - lengths).to(device),
        )

    def batch(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records `rows` padded to `length`: token ids int64 [B, L], flags int8 [B, L] (-1 on padding)."""
        at = torch.arange(length, device=rows.device)
        inside = at < self.lengths[rows, None]
        index = torch.where(inside, self.starts[rows, None] + at, 0)
        return self.ids[index].long().where(inside, PAD), self.written[index].where(inside, -1)

    def epochs(self, tokens_per_batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled batches of about `tokens_per_batch` tokens, for ever."""
        generator = torch.Generator().manual_seed(seed)
        lengths = self.lengths.cpu()
        bucket = torch.bucketize(lengths, torch.tensor(LENGTHS))
        while True:
            batches = []
            for b, length in enumerate(LENGTHS):
                rows = (bucket == b).nonzero()[:, 0]
                rows = rows[torch.randperm(len(rows), generator=generator)]
                parts = rows.split(max(1, tokens_per_batch // length))  # one, and empty, where there are no rows
                batches += [(part, length) for part in parts if len(part)]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                rows, length = batches[i]
                yield self.batch(rows.to(self.ids.device), length)
