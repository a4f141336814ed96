"""CUDA graphs of whole steps: captured once per shape, replayed ever after.

A decode step of a 13B is 200 kernels of a few microseconds each; the host cannot launch them that fast one by one.
"""

from __future__ import annotations

import bisect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gptq_api.runner.inputs import StepShape

_log = logging.getLogger(__name__)
_SMALL_BATCHES = (1, 2, 4, 6, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
MAX_MIXED_ROWS = 512
"""larger steps keep the device busy for longer than the host needs to launch their kernels, without padding"""
_NEARLY = 0.9
"""of a full step's rows; fewer would be padded by too many"""
_DRAFT_ROWS = (2, 4, 6, 8)
_MIXED_ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MIXED_SEQUENCES = (8, 64)
_MIXED_TILES = (1, 4, 16, 64)
_WIDTHS = (128, 512, 2048, 8192)
GRAPH_BYTES = 256 * 2**20
"""left free on the device for graphs, and for what libraries allocate late"""
_FEWEST, _MOST = 16, 256
"""graphs beside those that are always kept, however large or small they are: there are 650 shapes, of which a load
meets a few dozen. The fewest are more than the steps that may be under way, so that none of theirs is dropped"""


class Buckets:
    """The shapes that steps are padded to, so that few graphs serve all."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks: int,
        tile_rows: int,
        max_draft_rows: int = 0,
        full_steps: bool = False,
    ) -> None:
        """`full_steps`: those that have nearly all the tokens that a step may have are padded as well: where one
        process launches the kernels of several devices, not even they are long enough to do that meanwhile."""
        self._drafts = _capped(_DRAFT_ROWS, max_draft_rows) if max_draft_rows else []
        self._decode = _capped((*_SMALL_BATCHES, *range(384, max_num_seqs, 128)), max_num_seqs)
        most_rows = min(MAX_MIXED_ROWS, max_num_batched_tokens)
        self._mixed = _capped(_MIXED_ROWS, most_rows)
        self._full = max_num_batched_tokens if full_steps else most_rows
        self._sequences = _capped(_MIXED_SEQUENCES, max_num_seqs)
        # Each sequence with tiles may waste all but one row of its last one.
        self._tiles = _capped(_MIXED_TILES, self._full // tile_rows + min(max_num_seqs, self._full))
        self._widths = _capped(_WIDTHS, max_blocks)

    @property
    def start_shapes(self) -> list[StepShape]:
        """What is captured before the first request: decode steps of every batch size, with the smallest tables, and
        steps with drafts."""
        decode = [StepShape(rows, rows, self._widths[0], 0) for rows in reversed(self._decode)]
        return decode + [StepShape(rows, rows, self._widths[0], 0, drafted=True) for rows in reversed(self._drafts)]

    def padded(self, num_sequences: int) -> int:
        """The batch size of a decode step of so many."""
        return _at_least(num_sequences, self._decode)

    def decode_shape(self, num_sequences: int, num_blocks: int) -> StepShape:
        """`num_blocks`: of the longest context."""
        rows = self.padded(num_sequences)
        return StepShape(rows, rows, self._width(num_blocks), 0)

    def draft_shape(self, num_rows: int, num_blocks: int) -> StepShape:
        rows = _at_least(num_rows, self._drafts)
        return StepShape(rows, rows, self._width(num_blocks), 0, drafted=True)

    def mixed_shape(
        self, num_rows: int, num_sequences: int, num_tiles: int, num_blocks: int, prompts: bool = False
    ) -> StepShape | None:
        """None where the step is too large for a graph. `prompts`: they are apart."""
        if num_rows > self._mixed[-1] and not _NEARLY * self._full <= num_rows <= self._full:
            return None
        return StepShape(
            self._full if num_rows > self._mixed[-1] else _at_least(num_rows, self._mixed),
            _at_least(num_sequences, self._sequences),
            self._width(num_blocks),
            _at_least(num_tiles, self._tiles),
            prompts=prompts,
        )

    def _width(self, num_blocks: int) -> int:
        return _at_least(num_blocks, self._widths)


class Graphs:
    """`body` on static memory, by shape. A shape's first step runs kernel by kernel, which also compiles and loads what
    must not be compiled or loaded during a capture; its second is captured, and from then on replayed. As many graphs
    are kept as GRAPH_BYTES hold; the one that was not used for the longest time makes room, and begins anew."""

    def __init__(self, body: Callable[[StepShape], Tensor], kept: Iterable[StepShape]) -> None:
        """`body` returns a tensor that stays where it is: every later step of that shape leaves its result there.
        `kept`: shapes that are never dropped."""
        self._body, self._kept = body, frozenset(kept)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: OrderedDict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        """in the order of their last use"""
        self._seen: set[StepShape] = set()
        self._refused: set[StepShape] = set()
        self._num_weighed = 0
        self.num_bytes = 0
        """that all captures until now have taken from the device"""

    def __len__(self) -> int:
        return len(self._captured)

    def __str__(self) -> str:
        taken = self.num_bytes / 2**20
        return f"{len(self)} CUDA graphs take {taken:.0f} MiB; up to {self._num_others()} more are kept, the last used"

    def run(self, shape: StepShape, capture: bool = True) -> Tensor:
        """`capture`: whether this shape will come again. Runs on the current stream, not the default one."""
        found = self._captured.get(shape)
        if found is not None:
            self._captured.move_to_end(shape)
            graph, result = found
            graph.replay()
            return result
        if capture and shape in self._seen and shape not in self._refused:
            captured = self._capture(shape)
            if captured is not None:
                return captured
        elif capture:
            self._seen.add(shape)
        return self._body(shape)

    def _capture(self, shape: StepShape) -> Tensor | None:
        """And replay it. None where it can not be captured."""
        if shape not in self._kept:
            self._make_room()
        before = _free_bytes()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._body(shape)
            finally:
                graph.capture_end()
        except RuntimeError as error:  # out of memory is one
            self._refused.add(shape)
            _log.warning("steps of %s run without a CUDA graph: %s", shape, str(error).partition("\n")[0])
            return None
        self._captured[shape] = graph, result
        graph.replay()  # the first brings it to the device
        self.num_bytes += max(0, before - _free_bytes())
        self._num_weighed += 1
        return result

    def _make_room(self) -> None:
        """For one more graph."""
        others = [shape for shape in self._captured if shape not in self._kept]
        for shape in others[: max(0, len(others) + 1 - self._num_others())]:
            del self._captured[shape]
            self._seen.discard(shape)

    def _num_others(self) -> int:
        """Graphs that there may be beside those that are always kept."""
        if not self.num_bytes:
            return _MOST
        each = self.num_bytes / self._num_weighed
        return min(_MOST, max(_FEWEST, int(GRAPH_BYTES / each) - len(self._kept)))


def _free_bytes() -> int:
    """Of the device, in which the driver and torch's pool keep graphs: neither tells how large one is."""
    return torch.cuda.mem_get_info()[0]


def _capped(sizes: tuple[int, ...], largest: int) -> list[int]:
    return [*(size for size in sizes if size < largest), largest]


def _at_least(size: int, sizes: list[int]) -> int:
    return sizes[bisect.bisect_left(sizes, size)]
