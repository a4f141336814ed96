"""What crosses between the scheduler and the model: a Sequence (one prompt and its growing tokens) and a Batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptq_api.types import SamplingParams, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens sampled after it. Identity is object identity; `sequence_id` is the caller's name."""

    sequence_id: int
    token_ids: list[int]
    """prompt, then what was sampled"""
    params: SamplingParams
    cache_salt: bytes = b""
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    """how many tokens have their K/V in the cache, or will have when the steps launched so far have run: the only
    progress there is"""
    num_tokens_in_flight: int = 0
    """tokens that launched steps sample and whose values are not known here yet; they follow token_ids"""
    slot: int = -1
    """row of the runner's per-sequence tables, in [0, max_num_seqs) while running; -1 otherwise"""
    block_table: list[int] = field(default_factory=list)
    """KV block ids, in order; token i lives in slot block_table[i // block_size] * block_size + i % block_size"""
    block_hashes: list[bytes] = field(default_factory=list)
    """chained hashes of the full blocks of token_ids, computed as far as needed"""
    num_cached_tokens: int | None = None
    """prompt tokens found in the prefix cache when it was first scheduled; None until then"""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose K/V still have to be computed, one in flight included. The last token that max_tokens allows
        need not be: 0 once it is in flight."""
        in_flight = self.num_tokens_in_flight
        if in_flight and self.num_output_tokens + in_flight >= self.params.max_tokens:
            return 0
        return len(self.token_ids) + in_flight - self.num_computed_tokens

    @property
    def num_known_computed_tokens(self) -> int:
        """Computed tokens whose values are known here: the last one computed may be in flight."""
        return min(self.num_computed_tokens, len(self.token_ids))

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True, frozen=True)
class Batch:
    """The work of one step: for each sequence, compute its next `num_new_tokens` tokens."""

    sequences: list[Sequence]
    num_new_tokens: list[int]
    num_computed_tokens: list[int]
    """of each sequence before this step, as of scheduling: the sequence's own counter has moved on"""
    samples: list[bool]
    """whether this step computes the sequence's last token, so that the next one is sampled; otherwise it is a chunk of
    a longer prompt"""
    num_admitted: int
    """the last so many sequences were admitted in this step: all their tokens are known, their slot and their block
    table are new"""

    @classmethod
    def of(cls, sequences: list[Sequence], num_new_tokens: list[int], num_admitted: int = 0) -> Batch:
        """A step of sequences that nobody schedules; whoever runs it advances their num_computed_tokens."""
        computed = [seq.num_computed_tokens for seq in sequences]
        ends = [start + n for start, n in zip(computed, num_new_tokens, strict=True)]
        samples = [end == len(seq.token_ids) for seq, end in zip(sequences, ends, strict=True)]
        return cls(sequences, num_new_tokens, computed, samples, num_admitted)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new_tokens)


@dataclass(slots=True, frozen=True)
class Sampled:
    """The result of one step, one entry per sequence of the Batch.

    `tokens[i]` is None where the sequence only computed a chunk of its prompt, and -1 where its logits were not
    finite (the sequence must be finished with reason "error"; token 0 is never made up).
    """

    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None]


class DeviceMemoryError(RuntimeError):
    """The device has no memory for this batch. A runner's `launch` raises it having launched nothing that samples."""
