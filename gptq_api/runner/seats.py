"""What a runner that computes on the host knows of the running sequences, by seat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptq_api.step import Step
from gptq_api.types import SamplingParams

if TYPE_CHECKING:
    from gptq_api.runner.cpu.native_sampler import PackedSeat


@dataclass(slots=True)
class Seat:
    """One sequence: what its admission said, and what was sampled since."""

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_table: list[int] = field(default_factory=list)
    packed: PackedSeat | None = None
    """its parameters as the sampler's kernels take them, once they have"""

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Seats:
    """`take_in` each step in the order of launching."""

    def __init__(self) -> None:
        self._seats: dict[int, Seat] = {}

    def revise(self, seat: int, first: int, token_ids: list[int]) -> None:
        """The tokens of the sequence from place `first` on are these."""
        found = self._seats[seat]
        found.token_ids[first:] = token_ids
        found.packed = None

    def take_in(self, step: Step) -> list[Seat]:
        """Note who was admitted and which blocks have come; the sequences of the step, in its order."""
        for new in step.admitted:
            self._seats[new.seat] = Seat(list(new.token_ids), new.num_prompt_tokens, new.params)
        for blocks in step.new_blocks:
            self._seats[blocks.seat].block_table[blocks.first :] = blocks.block_ids
        return [self._seats[seat] for seat in step.seats]
