"""What the device has to be told of a step: laid out on the host with numpy in one buffer, copied once.

A step has a `StepShape`; a captured graph is fixed to one. Real steps are padded up to it: rows with position -1,
sequences without context, tiles of no sequence, which every kernel skips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gptq_api.kernels.sampling import FIELDS
from gptq_api.sequence import Batch

Ints = NDArray[np.int32]
Array = TypeVar("Array", Ints, Tensor)
_ALIGNMENT = 4
"""words: every array begins at a multiple of 16 bytes"""


class StepShape(NamedTuple):
    """The sizes of a step's arrays."""

    num_rows: int
    num_sequences: int
    table_width: int
    """blocks per sequence"""
    num_tiles: int
    """query tiles of prefill attention; 0: every sequence has one row and none was admitted (pure decode)"""


@dataclass(frozen=True)
class StepInputs(Generic[Array]):
    """int32 arrays over one buffer: numpy's on the host, tensors on the device."""

    row_slot: Array
    """[T]"""
    positions: Array
    """[T], -1: padding"""
    slot_mapping: Array
    """[T], where K and V of the row go; -1: nowhere"""
    query_start: Array
    """[S + 1]"""
    context_lens: Array
    """[S], 0: padding"""
    last_rows: Array
    """[S], the row that a sequence is sampled from"""
    sampling: Array
    """[FIELDS, S] of kernels/sampling.py"""
    tiles: Array
    """[tiles, 2] = (sequence, first row inside it); sequence -1: idle"""
    block_tables: Array
    """[S, table_width]"""

    @classmethod
    def over(cls, buffer: Array, shape: StepShape) -> StepInputs[Array]:
        """Views of `buffer`, int32 [at least num_words(shape)]."""
        views, start = [], 0
        for dims in _dims(shape):
            size = dims[0] if len(dims) == 1 else dims[0] * dims[1]
            views.append(buffer[start : start + size].reshape(dims))
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        return cls(*views)


def num_words(shape: StepShape) -> int:
    """int32 words of a step's buffer."""
    sizes = (dims[0] if len(dims) == 1 else dims[0] * dims[1] for dims in _dims(shape))
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _dims(shape: StepShape) -> tuple[tuple[int, ...], ...]:
    rows, sequences = (shape.num_rows,), (shape.num_sequences,)
    return (
        *(rows, rows, rows, (shape.num_sequences + 1,), sequences, sequences),
        *((FIELDS, shape.num_sequences), (shape.num_tiles, 2), (shape.num_sequences, shape.table_width)),
    )


@dataclass(frozen=True)
class Step:
    """A batch as arrays, one entry per sequence, in the batch's order."""

    slots: Ints
    computed: Ints
    """tokens in the cache before the step"""
    new: Ints
    context: Ints
    """tokens in the cache after it"""
    decode: bool
    """every sequence has one row, and none was admitted in this step"""

    @property
    def num_rows(self) -> int:
        return int(self.new.sum())

    def num_blocks(self, block_size: int) -> int:
        """Blocks of the longest context."""
        return -(-int(self.context.max()) // block_size)

    def num_tiles(self, tile_rows: int) -> int:
        """Query tiles of its sequences with more than one row."""
        return int((-(-self.new // tile_rows))[self.new > 1].sum())


class SequenceTable:
    """What stays of a running sequence from step to step, by slot, so that a step of many sequences is a few numpy
    calls and no loop over them."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._blocks = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int32)

    def take_in(self, batch: Batch, slots: Ints) -> Step:
        """Note the blocks that have come since the last step; those of the sequences admitted now are all new."""
        computed = np.array(batch.num_computed_tokens, np.int32)
        new = np.array(batch.num_new_tokens, np.int32)
        context = computed + new
        self.forget(slots[len(slots) - batch.num_admitted :])
        missing = self._num_blocks[slots] * self._block_size < context
        for i in np.flatnonzero(missing).tolist():
            slot, table = slots[i], batch.sequences[i].block_table
            known = int(self._num_blocks[slot])
            self._blocks[slot, known : len(table)] = table[known:]
            self._num_blocks[slot] = len(table)
        decode = not batch.num_admitted and int(new.max(initial=1)) == 1
        return Step(slots, computed, new, context, decode)

    def forget(self, slots: Ints) -> None:
        """Read the blocks of these slots anew in their next step."""
        self._num_blocks[slots] = 0

    def write(self, step: Step, tile_rows: int, to: StepInputs[Ints]) -> None:
        """Fill the arrays of a shape that holds the step, padding included; all but `sampling`."""
        num, size = len(step.slots), self._block_size
        if step.decode:
            rows, row_slot, positions = num, step.slots, step.computed
            ends = np.arange(1, num + 1, dtype=np.int32)
        else:
            ends = np.cumsum(step.new, dtype=np.int32)
            rows, row_slot = int(ends[-1]), np.repeat(step.slots, step.new)
            positions = np.arange(rows, dtype=np.int32) + np.repeat(step.context - ends, step.new)
            _write_tiles(step.new, tile_rows, to.tiles)
        block, offset = np.divmod(positions, size)
        to.row_slot[:rows], to.row_slot[rows:] = row_slot, 0
        to.positions[:rows], to.positions[rows:] = positions, -1
        to.slot_mapping[:rows], to.slot_mapping[rows:] = self._blocks[row_slot, block] * size + offset, -1
        to.query_start[0], to.query_start[1 : num + 1], to.query_start[num + 1 :] = 0, ends, rows
        to.context_lens[:num], to.context_lens[num:] = step.context, 0
        to.last_rows[:num], to.last_rows[num:] = ends - 1, 0
        to.block_tables[:num], to.block_tables[num:] = self._blocks[step.slots, : to.block_tables.shape[1]], 0


def _write_tiles(new: Ints, tile_rows: int, tiles: Ints) -> None:
    many = np.flatnonzero(new > 1).astype(np.int32)
    counts = -(-new[many] // tile_rows)
    total = int(counts.sum())
    tiles[:total, 0] = np.repeat(many, counts)
    tiles[:total, 1] = (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    tiles[total:] = -1


def write_idle(to: StepInputs[Ints]) -> None:
    """A step of padding alone; `sampling` is not touched."""
    for array in (to.row_slot, to.query_start, to.context_lens, to.last_rows, to.block_tables):
        array[...] = 0
    for array in (to.positions, to.slot_mapping, to.tiles):
        array[...] = -1
