"""A draft model that is no model, over the blocks of a toy runner: it remembers for every KV slot the tokens it was
written for, so that what is claimed to be computed is looked at, and knows what the toy runner will sample."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gptq_api.step import DeviceMemoryError, DraftRequest
from tests.support.toy_runner import NUM_TOKENS, next_token


class ToyDrafter:
    """`right`: how likely a token is the one that will be sampled; `out_of_memory`: the share of calls that fail;
    `ahead`: 1, as an EAGLE-3 head: what it remembers of a place goes one token further."""

    vocab_size, max_seqs = NUM_TOKENS, 4
    step_cost, row_cost, call_cost = 0.05, 0.001, 0.02

    def __init__(
        self,
        block_size: int,
        right: float = 1.0,
        max_rows: int = 16,
        max_model_len: int = 10**6,
        out_of_memory: float = 0.0,
        ahead: int = 0,
    ) -> None:
        self.ahead = ahead
        self.max_rows, self.max_model_len = max_rows, max_model_len
        self.num_rows = self.num_steps = 0
        self._block_size, self._right, self._out_of_memory = block_size, right, out_of_memory
        self._kv: dict[int, list[int]] = {}
        self._rng = random.Random(9)

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        assert 0 < len(requests) <= self.max_seqs and sum(request.num_new for request in requests) <= self.max_rows
        assert len({request.key for request in requests}) == len(requests)
        if self._rng.random() < self._out_of_memory:
            raise DeviceMemoryError("toy")
        for request in requests:
            end = request.num_computed + request.num_new
            assert request.num_new >= 1 and end <= len(request.token_ids)
            assert not request.num_drafts or end == len(request.token_ids)
            for place in range(max(0, request.num_computed - self.ahead), end - self.ahead):
                self._write(request, place, request.token_ids)
        self.num_rows += sum(request.num_new for request in requests)
        self.num_steps += max(1, *(request.num_drafts for request in requests), 1)
        for request in requests:  # after all writes: as a layer does
            for place in range(request.num_computed + request.num_new - self.ahead):
                self._check(request, place)
        return [self._guess(request) for request in requests]

    def _guess(self, request: DraftRequest) -> list[int]:
        tokens = list(request.token_ids)
        assert len(tokens) + request.num_drafts <= self.max_model_len or not request.num_drafts
        for i in range(request.num_drafts):
            if i:
                self._write(request, len(tokens) - 1 - self.ahead, tokens)
            token = next_token(tokens, request.num_prompt_tokens, request.params)
            if token < 0 or self._rng.random() >= self._right:
                token = self._rng.randrange(NUM_TOKENS)
            tokens.append(token)
        return tokens[len(request.token_ids) :]

    def _write(self, request: DraftRequest, place: int, tokens: list[int]) -> None:
        self._kv[self._slot(request, place)] = tokens[: place + 1 + self.ahead]

    def _check(self, request: DraftRequest, place: int) -> None:
        """Looking ahead, the last place of a block may be of another text that shares the block and parts behind it."""
        found, tokens = self._kv.get(self._slot(request, place)), request.token_ids
        parts = self.ahead and (place + 1) % self._block_size == 0
        assert found == tokens[: place + 1 + self.ahead] or (
            parts and found is not None and found[:-1] == tokens[: place + 1]
        ), "stale K/V"

    def _slot(self, request: DraftRequest, place: int) -> int:
        return request.block_table[place // self._block_size] * self._block_size + place % self._block_size
