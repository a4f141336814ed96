"""Sequences that nobody schedules: for evaluation, for the check at load, and for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptq_api.step import Admission, NewBlocks, Step
from gptq_api.types import SamplingParams


@dataclass(slots=True, eq=False)
class Solo:
    """A sequence whose seat and blocks its owner chooses. What is sampled is the owner's to append."""

    token_ids: list[int]
    params: SamplingParams
    block_table: list[int]
    seat: int = 0
    num_computed_tokens: int = 0
    num_prompt_tokens: int = field(init=False)
    num_told_blocks: int | None = field(default=None, init=False)
    """entries of block_table that the runner knows; None: it has yet to be admitted"""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


def step_of(solos: list[Solo], num_new: list[int]) -> Step:
    """The next so many tokens of each, which count as computed from here on. Whoever has all tokens computed then, or
    one more that is in flight, is sampled from."""
    step = Step([], [], [], [], [], [])
    for solo, n in zip(solos, num_new, strict=True):
        if solo.num_told_blocks is None:
            step.admitted.append(Admission(solo.seat, list(solo.token_ids), solo.num_prompt_tokens, solo.params))
            solo.num_told_blocks = 0
        if solo.num_told_blocks < len(solo.block_table):
            told = solo.num_told_blocks
            step.new_blocks.append(NewBlocks(solo.seat, told, solo.block_table[told:]))
            solo.num_told_blocks = len(solo.block_table)
        step.seats.append(solo.seat)
        step.num_computed.append(solo.num_computed_tokens)
        step.num_new.append(n)
        solo.num_computed_tokens += n
        step.num_sampled.append(int(solo.num_computed_tokens >= len(solo.token_ids)))
    return step


def lone_step(token: int, rows: int, block_size: int, ahead: int = 0) -> Step:
    """A sequence of one token, over and over, in the first blocks, which nobody has yet; its last row samples. `ahead`:
    the runner's, where it has one."""
    blocks = list(range(-(-rows // block_size)))
    params, one = SamplingParams(max_tokens=1, temperature=0), [rows]
    return Step([0], [0], one, [1], [NewBlocks(0, 0, blocks)], [Admission(0, [token] * (rows + ahead), rows, params)])
