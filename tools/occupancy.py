"""How many blocks of a kernel an SM holds at once, from registers, threads and shared memory alone."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
"""of an SM; a warp gets them in units of 256, from the quarter that it runs in"""
QUARTERS = 4
RESERVED_SHARED = 1024
"""bytes of each block's shared memory that the driver keeps; the rest comes in units of 128"""


@dataclass(frozen=True)
class Limits:
    """Of an SM."""

    threads: int
    blocks: int
    shared: int
    """bytes, those that the driver keeps of each block among them"""

    @property
    def shared_of_a_block(self) -> int:
        """What one block may ask for."""
        return self.shared - RESERVED_SHARED


LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
"""by compute capability; CUDA C++ Programming Guide, technical specifications per compute capability"""


def blocks_per_sm(capability: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads`, each of `registers`, with `shared` bytes that the kernel has and the launch asks for. 0: not
    even one. KeyError for a capability that is not in LIMITS."""
    limits = LIMITS[capability]
    warps = -(-threads // WARP)
    of_a_warp = -(-registers * WARP // 256) * 256
    resident_warps = REGISTERS // QUARTERS // of_a_warp * QUARTERS
    of_a_block = -(-(shared + RESERVED_SHARED) // 128) * 128
    if shared > limits.shared_of_a_block:
        return 0
    return min(limits.blocks, limits.threads // (warps * WARP), resident_warps // warps, limits.shared // of_a_block)
