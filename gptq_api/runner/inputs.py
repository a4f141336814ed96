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
from gptq_api.step import Step

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
    drafted: bool = False
    """Pure decode in which a sequence may have several rows, drafted tokens behind its last one. Each row counts as a
    sequence, with the context that it would have alone."""
    prompts: bool = False
    """Where prompts are apart: rows of prompts and no others, and tiles of every sequence."""


@dataclass(frozen=True)
class StepInputs(Generic[Array]):
    """int32 arrays over one buffer: numpy's on the host, tensors on the device."""

    row_seat: Array
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
    draft_tokens: Array
    """[T] where the step is drafted, else [0]: the drafted token of each row"""
    draft_places: Array
    """[T, 2] or [0, 2], int64 in two words: where in a flat history it goes"""

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
    num_draft_rows = shape.num_rows if shape.drafted else 0
    return (
        *(rows, rows, rows, (shape.num_sequences + 1,), sequences, sequences),
        *((FIELDS, shape.num_sequences), (shape.num_tiles, 2), (shape.num_sequences, shape.table_width)),
        *((num_draft_rows,), (num_draft_rows, 2)),
    )


@dataclass(frozen=True)
class Columns:
    """A step as arrays, one entry per sequence, in its order."""

    seats: Ints
    computed: Ints
    """tokens in the cache before the step"""
    new: Ints
    context: Ints
    """tokens in the cache after it"""
    decode: bool
    """every sequence has one row, and none was admitted in this step"""
    num_sampled: Ints
    """rows that are sampled from, the last ones of each"""
    drafted: bool = False
    """each row of the step counts as a sequence: some have drafts"""
    prompts: bool = False
    """all rows are of prompts, which are apart"""

    @property
    def num_rows(self) -> int:
        return int(self.new.sum())

    def num_blocks(self, block_size: int) -> int:
        """Blocks of the longest context."""
        return -(-int(self.context.max()) // block_size)

    def num_tiles(self, tile_rows: int) -> int:
        """Query tiles of its sequences with more than one row; of all where prompts are apart."""
        return int((-(-self.new // tile_rows))[self.new >= self.least_tiled].sum())

    @property
    def least_tiled(self) -> int:
        """Rows from which a sequence has tiles."""
        return 1 if self.prompts else 2


class SequenceTable:
    """The block tables of the running sequences, by seat, so that a step of many sequences is a few numpy
    calls and no loop over them."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, prompts_apart: bool = False) -> None:
        self._block_size, self._prompts_apart = block_size, prompts_apart
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self._blocks = np.zeros((max_num_seqs, max_blocks), np.int32)

    def take_in(self, step: Step) -> Columns:
        """Note the blocks that have come since the last step."""
        for blocks in step.new_blocks:
            self._blocks[blocks.seat, blocks.first : blocks.first + len(blocks.block_ids)] = blocks.block_ids
        if step.drafts:
            return _columns_of_rows(step)
        columns = (step.seats, step.num_computed, step.num_new, step.num_sampled)
        seats, computed, new, sampled = (np.array(column, np.int32) for column in columns)
        prompts = self._prompts_apart and self._are_prompts(step, seats, computed, new)
        decode = not step.admitted and int(new.max(initial=1)) == 1 and not prompts
        return Columns(seats, computed, new, computed + new, decode, sampled, prompts=prompts)

    def _are_prompts(self, step: Step, seats: Ints, computed: Ints, new: Ints) -> bool:
        """Whether the step has rows of prompts. ValueError where it has both sorts."""
        for admission in step.admitted:
            self._num_prompt_tokens[admission.seat] = admission.num_prompt_tokens
        ends = self._num_prompt_tokens[seats]
        prompts = bool((computed < ends).any())
        if prompts and not (computed + new <= ends).all():
            raise ValueError("a step of prompts and answers, where prompts are apart (--batch-invariant)")
        return prompts

    def write(self, step: Columns, tile_rows: int, to: StepInputs[Ints]) -> None:
        """Fill the arrays of a shape that holds the step, padding included; all but `sampling`."""
        num, size = len(step.seats), self._block_size
        if step.decode:
            rows, row_seat, positions = num, step.seats, step.computed
            ends = np.arange(1, num + 1, dtype=np.int32)
        else:
            ends = np.cumsum(step.new, dtype=np.int32)
            rows, row_seat = int(ends[-1]), np.repeat(step.seats, step.new)
            positions = np.arange(rows, dtype=np.int32) + np.repeat(step.context - ends, step.new)
            _write_tiles(step.new, step.least_tiled, tile_rows, to.tiles)
        slots = self._blocks[row_seat, positions // size] * size + positions % size
        for array, values, padding in (
            (to.row_seat, row_seat, 0),
            (to.positions, positions, -1),
            (to.slot_mapping, slots, -1),
            (to.query_start[1:], ends, rows),
            (to.context_lens, step.context, 0),
            (to.last_rows, ends - 1, 0),
            (to.block_tables, self._blocks[step.seats, : to.block_tables.shape[1]], 0),
        ):
            array[: len(values)] = values
            if len(values) < len(array):
                array[len(values) :] = padding
        to.query_start[0] = 0


def _columns_of_rows(step: Step) -> Columns:
    """Of a step with drafts: of few rows, for which a device waits."""
    seats, computed, sampled = list[int](), list[int](), list[int]()
    for seat, start, new, num in zip(step.seats, step.num_computed, step.num_new, step.num_sampled, strict=True):
        assert new == max(num, 1) and not step.admitted, "beside drafts only what decodes"
        seats += [seat] * new
        computed += range(start, start + new)
        sampled += [min(num, 1)] * new
    columns = (seats, computed, [1] * len(seats), sampled)
    of_seats, of_computed, ones, of_sampled = (np.array(column, np.int32) for column in columns)
    return Columns(of_seats, of_computed, ones, of_computed + 1, True, of_sampled, drafted=True)


def _write_tiles(new: Ints, least: int, tile_rows: int, tiles: Ints) -> None:
    many = np.flatnonzero(new >= least).astype(np.int32)
    counts = -(-new[many] // tile_rows)
    total = int(counts.sum())
    tiles[:total, 0] = np.repeat(many, counts)
    tiles[:total, 1] = (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    tiles[total:] = -1


def write_idle(to: StepInputs[Ints]) -> None:
    """A step of padding alone; `sampling` is not touched."""
    zeros = (to.row_seat, to.query_start, to.context_lens, to.last_rows, to.block_tables)
    for array in (*zeros, to.draft_tokens, to.draft_places):
        array[...] = 0
    for array in (to.positions, to.slot_mapping, to.tiles):
        array[...] = -1
