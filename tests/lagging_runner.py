"""The CPU's runner behind a device's door: one step ahead, and a sequence's tokens are what this side was told at its
admission and what it sampled since."""

from __future__ import annotations

from collections import deque
from typing import Any

from gptq_api.model.runner import ModelRunner
from gptq_api.sequence import Batch, Sampled, Sequence


class LaggingRunner:
    lookahead = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._by_slot: dict[int, Sequence] = {}
        self._queue: deque[Sampled] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, batch: Batch) -> Sampled:
        first_admitted = len(batch.sequences) - batch.num_admitted
        for seq in batch.sequences[first_admitted:]:
            ours = Sequence(seq.sequence_id, list(seq.token_ids), seq.params)
            ours.num_prompt_tokens = seq.num_prompt_tokens
            self._by_slot[seq.slot] = ours
        sequences = [self._by_slot[seq.slot] for seq in batch.sequences]
        for ours, seq in zip(sequences, batch.sequences, strict=True):
            assert ours.sequence_id == seq.sequence_id
            ours.block_table = list(seq.block_table)
        ends = [start + n for start, n in zip(batch.num_computed_tokens, batch.num_new_tokens, strict=True)]
        assert batch.samples == [end == len(ours.token_ids) for end, ours in zip(ends, sequences, strict=True)]
        sampled = self._runner.launch(
            Batch(sequences, batch.num_new_tokens, batch.num_computed_tokens, batch.samples, batch.num_admitted)
        )
        for ours, token in zip(sequences, sampled.tokens, strict=True):
            if token is not None:
                ours.token_ids.append(max(token, 0))
        self._queue.append(sampled)
        return sampled

    def collect(self, launched: Sampled) -> Sampled:
        assert self._queue.popleft() is launched
        return self._runner.collect(launched)
