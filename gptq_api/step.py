"""What crosses between the scheduler and a runner: values that nobody changes.

The scheduler owns sequences, seats and block tables and emits a `Step`; a runner knows by seat what it was told at the
admission and what it has sampled since, and answers with `Sampled`. So a step can be written to a file, read again and
given to another runner, and a runner may keep a step for as long as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gptq_api.types import PromptLogprobs, SamplingParams, TokenLogprobs

Launched = TypeVar("Launched")


class Admission(msgspec.Struct, frozen=True):
    """A sequence takes a seat: what a runner has to know of it. Whoever had the seat before is forgotten."""

    seat: int
    token_ids: list[int]
    """prompt, and for a sequence that was preempted what it has sampled so far"""
    num_prompt_tokens: int
    params: SamplingParams


class NewBlocks(msgspec.Struct, frozen=True):
    """A sequence's block table has grown: entries from `first` on. Token i of a sequence lives in KV cache slot
    block_ids[i // block_size] * block_size + i % block_size of its whole table."""

    seat: int
    first: int
    block_ids: list[int]


class PromptRows(msgspec.Struct, frozen=True):
    """Rows of a prompt whose logprobs are wanted: row i says how likely token i + 1 of the prompt is."""

    first: int
    """the first of them, counted in the sequence; one of the step's new tokens, like the others"""
    num: int
    num_top: int
    """how many most likely tokens of each"""


class Step(msgspec.Struct, frozen=True):
    """The work of one step, columnar: entry i of each column belongs to the sequence in seat seats[i]."""

    seats: list[int]
    num_computed: list[int]
    """tokens whose K/V are in the cache before the step"""
    num_new: list[int]
    """tokens to compute, at least 1"""
    num_sampled: list[int]
    """How many of the last rows are sampled from. 0: a chunk of a longer prompt. 1: the last row. 1 + k: the last known
    token and k drafted ones behind it. Each row is sampled at its own position, as it would be alone, and the sequence
    gets the tokens of its rows one after the other as long as a token is the draft of the next row; the first that
    differs counts too. So drafts change no token."""
    new_blocks: list[NewBlocks]
    admitted: list[Admission]
    prompt_rows: dict[int, PromptRows] = {}
    """by entry, where logprobs of the prompt were asked for"""
    drafts: dict[int, list[int]] = {}
    """By entry: token ids below vocab_size that may follow the sequence's last known one. Each has a row behind it, so
    num_new and num_sampled of the entry are both 1 + their number. Nobody promises that they are right."""

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new)


@dataclass(slots=True, frozen=True)
class Masks:
    """What the entries of a step that have a grammar may sample."""

    entries: list[int]
    """of the Step, ascending"""
    words: NDArray[np.int32]
    """[entries, ceil(vocab_size / 32)], C order: bit i % 32 of word i // 32 is set where token i may be sampled; at
    least one is"""


class Sampled(msgspec.Struct, frozen=True):
    """The result of one step."""

    num_tokens: list[int]
    """for each entry of the Step how many tokens it got: at most its num_sampled. Fewer than that and none are allowed:
    the rows behind the last token do not count as computed."""
    tokens: list[int]
    """All of them, in the order of the Step. -1: the logits were not finite, and the sequence has to end with reason
    "error" (token 0 is never made up). -2, from the engine: its grammar could not be followed."""
    logprobs: dict[int, TokenLogprobs] = {}
    """by place in `tokens`, where they were asked for"""
    prompt_logprobs: dict[int, PromptLogprobs] = {}
    """for each of the Step's `prompt_rows`"""


@dataclass(slots=True, frozen=True)
class PromptCosts:
    """What a runner's steps take, in milliseconds: estimates, which decide how large steps are and nothing else."""

    decode_ms: float
    """a step of one row"""
    row_ms: float
    """what a row of a prompt adds to a step of many"""
    context_ms: float
    """and it adds more for each token before it"""


MAX_ROWS_AGAIN = 256
"""rows of a step, where prompts are apart, that are answers computed once more"""


@dataclass(slots=True, frozen=True)
class DraftRequest:
    """What a draft model is asked for one sequence."""

    key: int
    """whose K/V they are: a sequence that begins anew, with other blocks, gets another one"""
    token_ids: list[int]
    """all that are known, the caller's own list"""
    num_prompt_tokens: int
    params: SamplingParams
    block_table: list[int]
    """the caller's too: blocks for the known tokens and the drafts"""
    num_computed: int
    """tokens whose K/V the draft model has in these blocks"""
    num_new: int
    """tokens to compute behind them, at least 1"""
    num_drafts: int
    """how many tokens to guess; 0 where the last known one is not computed yet"""


class Drafter(Protocol):
    """A draft model, whose cache has the blocks of the runner that it drafts for. Costs are shares of what a step of
    one row takes there."""

    vocab_size: int
    max_model_len: int
    """of tokens from here on it knows nothing"""
    ahead: int
    """1: an EAGLE-3 head, whose K/V of a place are of the token behind it, and of what the served model made of the one
    there. So of n tokens n - 1 places are computed, and what it guessed is computed anew when the served model has."""
    max_seqs: int
    """requests of one call"""
    max_rows: int
    """tokens to compute in one call, those of all requests together"""
    step_cost: float
    """of each token that is guessed, however many sequences there are"""
    row_cost: float
    """of each further row that is computed because the cache lacks it"""
    call_cost: float
    """of asking at all"""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """For each request what may follow its last token: at most num_drafts, maybe fewer. Nothing of the runner may
        be under way. K/V of the new tokens and, unless it looks ahead, of all drafts but the last are in the cache
        afterwards, unless it raises DeviceMemoryError."""


class DeviceMemoryError(RuntimeError):
    """The device has no memory for this step. A runner's `launch` raises it having launched nothing that samples."""


class Runner(Protocol[Launched]):
    """What the engine needs of a model: the work of a step done, K/V written, tokens sampled. Steps run in the order in
    which they are launched."""

    vocab_size: int
    """rows of the embedding: token ids are below it"""
    lookahead: int
    """0: a step is collected before the next one is scheduled; 1: afterwards"""
    max_draft_rows: int
    """Rows of a step with drafts, those of all its sequences together, at most: so many rows have the bits each has
    alone. Such a step admits nobody, follows no grammar, and has of each sequence its last known token and the drafts
    behind it. 0: no drafts."""
    row_cost: float
    """what one row more adds to such a step, as a share of a step of one row"""
    context_cost: float
    """and it adds more for each token before it"""
    wait_cost: float
    """what a step with drafts costs beside its rows, as a share of a step of one row: above all that it is launched
    only when the one before it is collected; 0 where that is always so"""

    prompt_costs: PromptCosts | None
    """None: not known"""
    prompts_apart: bool
    """Whether a step has rows of prompts alone or none: which kernels compute a token, and so its bits, depends on
    which of the two it is. Of a step without, at most MAX_ROWS_AGAIN rows are not its sequence's last."""

    @property
    def num_graphs(self) -> int:
        """Captured and kept by a GPU's runner; 0 where there are none."""

    def launch(self, step: Step) -> Launched:
        """Start a step, after all that were launched before, and do not wait for it. Raises DeviceMemoryError.

        Where one of its entries samples and has a grammar, the step goes no further than to its logits."""

    def draw(self, launched: Launched, masks: Masks) -> None:
        """Such a step samples now. Called once for each of them, before the next step is launched and after all
        earlier ones were collected, since a mask follows from the token before."""

    def collect(self, launched: Launched) -> Sampled:
        """Wait for the step launched longest ago. With lookahead 1 an entry whose num_sampled is 1 gets its token."""
