"""An engine's client without an engine: what it sends is kept, what it gets is the test's to say."""

from __future__ import annotations

from types import SimpleNamespace

from gptq_api.config import Settings
from gptq_api.engine import wire
from gptq_api.engine.client import EngineClient
from gptq_api.types import EngineStats, FinishReason, PromptLogprobs, StepOutput, ToEngine, TokenLogprobs, pack_ids


class HandFedEngine(EngineClient):
    """`settings` are those that the client reads; the model's context is 100 tokens."""

    def __init__(self, engine_timeout_s: float = 60.0, max_queued_requests: int = 8) -> None:
        super().__init__(
            Settings.model_construct(
                engine_timeout_s=engine_timeout_s,
                max_queued_requests=max_queued_requests,
                api_key=[],
                kv_cache_dtype="auto",
                model_alias=[],
            )
        )
        self.sent: list[ToEngine] = []
        self._life = SimpleNamespace(  # type: ignore[assignment]
            send=lambda message: self.sent.append(wire.decode_to_engine(wire.encode(message)[4:]))
        )
        self.ready = SimpleNamespace(  # type: ignore[assignment]
            max_model_len=100, vocab_size=100, device="cpu", dtype="float32", checkpoint="", checkpoint_written=0
        )
        self.alive = True

    def die(self) -> None:
        self._lose("it died")

    def step(
        self,
        *tokens: tuple[int, int],
        finished: dict[int, FinishReason] | None = None,
        cached: dict[int, int] | None = None,
        num_running: int = 1,
        prompt_logprobs: dict[int, PromptLogprobs] | None = None,
        logprobs: dict[int, TokenLogprobs] | None = None,
        drafted: dict[int, tuple[int, int]] | None = None,
        predicted: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        """One message of the engine; `tokens`: (sequence id, token)."""
        output = StepOutput(
            sequence_ids=pack_ids(sequence_id for sequence_id, _ in tokens),
            tokens=pack_ids(token for _, token in tokens),
            finished=finished or {},
            cached_tokens=cached or {},
            logprobs=logprobs or {},
            stats=EngineStats(num_running, 0, 0, 0, 0, 0, 0, 1),
            prompt_logprobs=prompt_logprobs or {},
            drafted=drafted or {},
            predicted=predicted or {},
        )
        message = wire.decode_from_engine(wire.encode(output)[4:])
        assert isinstance(message, StepOutput)
        self._deliver(message)
