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
    """how many of token_ids already have their K/V in the cache: the only progress there is"""
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
        """Tokens whose K/V still have to be computed; at least 1 for a live sequence."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True, frozen=True)
class Batch:
    """The work of one step: for each sequence, compute its next `num_new_tokens` tokens.

    A sequence samples a token in this step exactly when its last token is among them
    (num_computed_tokens + num_new_tokens == len(token_ids)); otherwise it is a chunk of a longer prompt.
    """

    sequences: list[Sequence]
    num_new_tokens: list[int]

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
