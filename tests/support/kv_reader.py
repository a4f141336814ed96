"""A reader of KV events as a router has one, by the format that vLLM publishes: it imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


DECODER = msgspec.msgpack.Decoder(KVEventBatch)


@dataclass
class Index:
    """What one server has cached, by its events."""

    blocks: dict[bytes | int, tuple[bytes | int | None, tuple[int, ...]]] = field(default_factory=dict)
    """hash -> (hash of the block before it, tokens)"""
    block_size: int = 0
    next_number: int = 0

    def take(self, number: bytes, payload: bytes) -> None:
        """The next batch."""
        assert int.from_bytes(number, "big") == self.next_number, "a batch is missing"
        self.next_number += 1
        batch = DECODER.decode(payload)
        assert batch.ts > 0 and batch.events and batch.data_parallel_rank == 0
        for event in batch.events:
            match event:
                case BlockStored(hashes, parent, tokens, size, lora_id, medium):
                    assert hashes and len(tokens) == size * len(hashes) and lora_id is None and medium in ("CPU", "GPU")
                    self.block_size = size
                    for i, content in enumerate(hashes):
                        assert content not in self.blocks, "told twice"
                        self.blocks[content] = parent, tuple(tokens[i * size : (i + 1) * size])
                        parent = content
                case BlockRemoved(hashes):
                    for content in hashes:
                        del self.blocks[content]
                case AllBlocksCleared():
                    self.blocks.clear()

    def num_cached(self, token_ids: list[int]) -> int:
        """How many tokens of a prompt are cached, where all callers share one cache."""
        found: bytes | int | None = None
        size, places = self.block_size, {block: content for content, block in self.blocks.items()}
        num = 0
        while size and num + size <= len(token_ids) - 1:  # one token is always computed
            block = found, tuple(token_ids[num : num + size])
            if block not in places:
                break
            found = places[block]
            num += size
        return num
