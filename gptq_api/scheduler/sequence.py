"""A sequence, as the scheduler knows it; nobody else does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptq_api.types import SamplingParams

if TYPE_CHECKING:
    from gptq_api.scheduler.drafts import Knowledge
    from gptq_api.scheduler.judgement import Drafting
    from gptq_api.scheduler.model_drafts import DraftCache


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens sampled after it. Identity is object identity; `sequence_id` is the caller's name."""

    sequence_id: int
    token_ids: list[int]
    """prompt, then what was sampled"""
    params: SamplingParams
    cache_salt: bytes = b""
    owner: bytes = b""
    """who shares seats and memory with whom; only equality matters"""
    rank: tuple[int, int, int] = (0, 0, 0)
    """its level, its priority, and when it was added: of an owner's the lowest is admitted first; the highest is
    preempted first"""
    block_hashes: list[bytes] = field(default_factory=list)
    """chained hashes of the full blocks of token_ids, computed as far as needed"""
    shares_prompt: bool = False
    """whether token_ids and block_hashes are those of other samples of the prompt too; until its first token"""
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    """how many tokens have their K/V in the cache, or will have when the steps launched so far have run: the only
    progress there is"""
    num_tokens_in_flight: int = 0
    """tokens that launched steps sample, at most, and whose values are not known here yet; they follow token_ids"""
    seat: int = -1
    """its row in the runner's tables, in [0, max_num_seqs) while running; -1 otherwise"""
    block_table: list[int] = field(default_factory=list)
    """KV block ids, in order"""
    num_told_blocks: int = 0
    """how many entries of block_table the runner has been told"""
    num_scored_rows: int = 0
    """rows of the prompt whose logprobs launched steps tell, where they were asked for: never twice, not even when the
    sequence is computed once more"""
    last_turn: int = 0
    """the number of the step in which it decoded last, where not all were in every step"""
    num_cached_tokens: int | None = None
    """prompt tokens found in the prefix cache when it was first scheduled; None until then"""
    prediction: list[int] = field(default_factory=list)
    """what the answer may look like"""
    knowledge: Knowledge | None = None
    """what its guesses are made from, once there were any"""
    drafting: Drafting | None = None
    """how good they were"""
    draft_cache: DraftCache | None = None
    """what a draft model has computed of it, in the blocks that it has now"""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def append(self, token: int) -> None:
        """The next token is known."""
        if self.shares_prompt:
            self._part()
        self.token_ids.append(token)

    def extend(self, tokens: list[int]) -> None:
        """Several are."""
        if self.shares_prompt:
            self._part()
        self.token_ids += tokens

    def _part(self) -> None:
        """What the sequence shares with other samples it copies before it grows."""
        self.token_ids, self.block_hashes = self.token_ids.copy(), self.block_hashes.copy()
        self.shares_prompt = False

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose K/V still have to be computed, one in flight included. 0 while it is not known how many tokens a
        step brings, and once the last token that max_tokens allows is in flight, whose K/V nobody needs."""
        in_flight = self.num_tokens_in_flight
        if in_flight > 1 or (in_flight and self.num_output_tokens + in_flight >= self.params.max_tokens):
            return 0
        return len(self.token_ids) + in_flight - self.num_computed_tokens

    @property
    def num_unscored_rows(self) -> int:
        """Rows of the prompt that have to be computed because their logprobs are still to be told."""
        return 0 if self.params.prompt_logprobs is None else self.num_prompt_tokens - 1 - self.num_scored_rows

    @property
    def num_known_computed_tokens(self) -> int:
        """Computed tokens whose values are known here: the last one computed may be in flight."""
        computed, known = self.num_computed_tokens, len(self.token_ids)
        return computed if computed < known else known  # min() takes three times as long

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
