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

from gptq_api.kernels.row_groups import RowGroups
from gptq_api.kernels.sampling import FIELDS
from gptq_api.step import NewBlocks, Step

Ints = NDArray[np.int32]
Array = TypeVar("Array", Ints, Tensor)
_ALIGNMENT = 4
"""words: every array begins at a multiple of 16 bytes"""
HISTORY_START = 4
"""Words of a flat history in front of the first sequence's. Rows that have no drafted token write one there."""


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
    groups: Array
    """[T, 2] or [0, 2], of kernels/row_groups.py; 0: padding"""
    next_slots: Array
    """[S], where K and V of the place behind a sequence's last row will go, if that is sampled from and the model looks
    ahead; -1 otherwise"""

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
        *((num_draft_rows,), (num_draft_rows, 2), (num_draft_rows, 2), sequences),
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


class Rows(NamedTuple):
    """A step with drafts, one entry per row, in its order: each counts as a sequence and is sampled from. Plain lists:
    of eight rows they take less time than arrays, and the device waits for them."""

    seats: list[int]
    positions: list[int]
    context: list[int]
    """tokens in the cache that the row may see, its own among them"""
    tokens: list[int]
    """drafted ones; 0 where a sequence's last known token is computed"""
    places: list[int]
    """where in a flat history that token goes"""
    groups: list[tuple[int, int]]
    """as kernels/row_groups.py says"""


class SequenceTable:
    """The block tables of the running sequences, by seat, so that a step of many sequences is a few numpy
    calls and no loop over them."""

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        prompts_apart: bool = False,
        groups: RowGroups | None = None,
        *,
        looks_ahead: bool = False,
    ) -> None:
        """`groups`: None: each row by itself."""
        self._looks_ahead = looks_ahead
        self._block_size, self._prompts_apart, self._groups = block_size, prompts_apart, groups or RowGroups()
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self._blocks = np.zeros((max_num_seqs, max_blocks), np.int32)

    def take_in(self, step: Step) -> Columns:
        """Note the blocks that have come since the last step, which has no drafts."""
        assert not step.drafts
        self._note(step.new_blocks)
        columns = (step.seats, step.num_computed, step.num_new, step.num_sampled)
        seats, computed, new, sampled = (np.array(column, np.int32) for column in columns)
        prompts = self._prompts_apart and self._are_prompts(step, seats, computed, new)
        decode = not step.admitted and int(new.max(initial=1)) == 1 and not prompts
        return Columns(seats, computed, new, computed + new, decode, sampled, prompts=prompts)

    def take_in_rows(self, step: Step, max_model_len: int) -> Rows:
        """The same of a step with drafts. `max_model_len`: from one sequence of the history to the next."""
        assert not step.admitted and step.num_new == step.num_sampled, "beside drafts only what decodes"
        self._note(step.new_blocks)
        seats, positions, tokens, places, groups = (
            list[int](),
            list[int](),
            list[int](),
            list[int](),
            list[tuple[int, int]](),
        )
        for entry, (seat, start, num) in enumerate(zip(step.seats, step.num_computed, step.num_new, strict=True)):
            seats += [seat] * num
            positions += range(start, start + num)
            first = HISTORY_START + seat * max_model_len + start
            tokens += [0, *step.drafts.get(entry, ())]
            places += [0, *range(first + 1, first + num)]
            groups += self._groups.of_sequence(start + 1, num)
        return Rows(seats, positions, [position + 1 for position in positions], tokens, places, groups)

    def _note(self, new_blocks: list[NewBlocks]) -> None:
        for blocks in new_blocks:
            self._blocks[blocks.seat, blocks.first : blocks.first + len(blocks.block_ids)] = blocks.block_ids

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
        next_slots = self._next_slots(step) if self._looks_ahead else np.zeros(0, np.int32)
        for array, values, padding in (
            (to.row_seat, row_seat, 0),
            (to.positions, positions, -1),
            (to.slot_mapping, slots, -1),
            (to.query_start[1:], ends, rows),
            (to.context_lens, step.context, 0),
            (to.last_rows, ends - 1, 0),
            (to.block_tables, self._blocks[step.seats, : to.block_tables.shape[1]], 0),
            (to.next_slots, next_slots, -1),
        ):
            array[: len(values)] = values
            if len(values) < len(array):
                array[len(values) :] = padding
        to.query_start[0] = 0

    def _next_slots(self, step: Columns) -> Ints:
        """Of a sequence's last token a new one would begin a block that it does not have."""
        block, offset = np.divmod(step.context, self._block_size)
        last = self._blocks.shape[1] - 1
        slots = self._blocks[step.seats, np.minimum(block, last)] * self._block_size + offset
        return np.where((step.num_sampled > 0) & (block <= last), slots, -1)

    def write_rows(self, rows: Rows, to: StepInputs[Ints]) -> None:
        """The same for a step with drafts."""
        num, size = len(rows.seats), self._block_size
        padding = len(to.positions) - num
        slots, seat, table = list[int](), -1, self._blocks[0]
        for row, (of, position) in enumerate(zip(rows.seats, rows.positions, strict=True)):
            if of != seat:
                seat, table, block = of, self._blocks[of], -1
                to.block_tables[row:] = table[: to.block_tables.shape[1]]  # of the rows behind this one, too
            if position // size != block:
                block = position // size
                base = int(table[block]) * size
            slots.append(base + position % size)
        to.row_seat[...] = rows.seats + [0] * padding
        to.positions[...] = rows.positions + [-1] * padding
        to.slot_mapping[...] = slots + [-1] * padding
        to.query_start[...] = [*range(num), *[num] * (padding + 1)]
        to.context_lens[...] = rows.context + [0] * padding
        to.last_rows[...] = [*range(num), *[0] * padding]
        to.draft_tokens[...] = rows.tokens + [0] * padding
        to.draft_places.view(np.int64)[:, 0] = rows.places + [0] * padding
        to.groups[...] = rows.groups + [(0, 0)] * padding
        to.next_slots[...] = -1
        if padding:
            to.block_tables[num:] = 0


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
    for array in (*zeros, to.draft_tokens, to.draft_places, to.groups):
        array[...] = 0
    for array in (to.positions, to.slot_mapping, to.tiles, to.next_slots):
        array[...] = -1
