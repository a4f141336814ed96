"""Paged KV blocks with automatic prefix caching.

A block is `block_size` token slots of every layer's KV cache. A sequence's block_table is the record of what it holds;
this class knows how many hold each block, which blocks are free, and which hash a full block's content has.

A block that nobody holds any more keeps its content and its hash until the space is needed: free means blank or
merely cached. Blank blocks are handed out first, then the cached one that was released longest ago.

The hash of a block is chained over everything before it (salt, parent hash, its token ids; BLAKE2b-128), so equal hash
means equal prefix, position included. The class does *not* know tokens, sequences or time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block behind `parent` (the previous block's hash, or the cache salt for the first)."""
    return blake2b(
        array("i", token_ids).tobytes(), digest_size=16, key=blake2b(parent, digest_size=32).digest()
    ).digest()


class CacheListener(Protocol):
    """Is told what can be found in the cache, as it changes; nobody waits for it."""

    def stored(self, hashes: list[bytes], parent: bytes | None, token_ids: list[int]) -> None:
        """These blocks can be found from now on: full ones, each behind the one before it, the first behind `parent`
        (None: a prompt begins with it). `token_ids`: of all of them."""

    def removed(self, content: bytes) -> None:
        """The block with this hash can not be found any more."""


class BlockManager:
    """Hands out fixed-size KV blocks; shares full ones between sequences with the same prefix."""

    def __init__(self, num_blocks: int, block_size: int, listener: CacheListener | None = None) -> None:
        """`listener`: is told here which blocks cannot be found any more, and by the scheduler, which knows the tokens,
        which ones can."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_size {block_size} have to be positive")
        self.num_blocks, self.block_size, self.listener = num_blocks, block_size, listener
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # ordered: released longest ago first
        self._num_owners = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def num_needed(self, block_table: list[int], num_tokens: int) -> int:
        """How many blocks more block_table has to have for num_tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def grow(self, block_table: list[int], num_tokens: int, keep_free: int = 0) -> bool:
        """Make block_table long enough for num_tokens, or change nothing and say no."""
        missing = -(-num_tokens // self.block_size) - len(block_table)
        if missing <= 0:
            return True
        if missing > self.num_free - keep_free:
            return False
        for _ in range(missing):
            if self._blank:
                block_id = self._blank.pop()
            else:
                block_id = next(iter(self._cached))
                del self._cached[block_id]
                self._forget(block_id)
            self._num_owners[block_id] = 1
            block_table.append(block_id)
        return True

    def release(self, block_table: list[int]) -> None:
        """Give the blocks back, the tail first, so that a prefix outlives what follows it."""
        for block_id in reversed(block_table):
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                if self._hash_of[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._cached[block_id] = None
        block_table.clear()

    def share(self, block_table: list[int], hashes: Sequence[bytes]) -> int:
        """Put the longest cached prefix of `hashes` into the empty block_table; returns the number of blocks."""
        assert not block_table
        for wanted in hashes:
            block_id = self._block_of.get(wanted)
            if block_id is None:
                break
            self._cached.pop(block_id, None)
            self._num_owners[block_id] += 1
            block_table.append(block_id)
        return len(block_table)

    @property
    def hashes(self) -> set[bytes]:
        """Of all blocks that can be found."""
        return set(self._block_of)

    def register(self, block_id: int, content: bytes) -> bool:
        """`block_id`, held by somebody, is full of `content` (or will be when the step now being scheduled has run).
        False where that can be found already."""
        if content in self._block_of or self._hash_of[block_id] is not None:
            return False
        self._block_of[content] = block_id
        self._hash_of[block_id] = content
        return True

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Nobody may find this content again: it is not to be trusted. Whoever holds the blocks keeps them."""
        for content in hashes:
            block_id = self._block_of.get(content)
            if block_id is not None:
                self._forget(block_id)
                if self._num_owners[block_id] == 0:
                    del self._cached[block_id]
                    self._blank.append(block_id)

    def _forget(self, block_id: int) -> None:
        content = self._hash_of[block_id]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block_id] = None
            if self.listener is not None:
                self.listener.removed(content)
