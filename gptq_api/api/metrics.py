"""Prometheus metrics under vLLM's names, because dashboards, autoscalers and gateways read those.

Only what is true here is there. Gauges and the engine's totals are read when they are scraped; nothing polls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from gptq_api.api.collectors import (
    BatchCollector,
    EngineCollector,
    KeyCollector,
    ManyValues,
    common_labels,
)
from gptq_api.batch.tally import BatchLoad
from gptq_api.edge.auth import Authenticator
from gptq_api.engine.client import EngineClient
from gptq_api.types import StepOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REASONS = ("stop", "length", "error", "too_complex")
_REJECTIONS = ("server_full", "share_full", "rate_limit", "unavailable")
_PLACES = ("queue", "prefill", "decode")
_CAUSES = ("disconnect", "slow_reader", "shutdown", "engine_dead", "engine_stalled", "deadline")


@dataclass(frozen=True, slots=True)
class Phases:
    """When a request was how far, time.monotonic(); None: it never was."""

    submitted: float
    """to the engine"""
    admitted: float | None
    """when the first step of any of its choices began"""
    first_token: float | None
    last_token: float | None

    @property
    def last(self) -> str:
        """How far it came: queue, prefill or decode."""
        if self.admitted is None:
            return "queue"
        return "prefill" if self.first_token is None else "decode"


class Metrics:
    """One registry per server; what labels may be is known from the start, so that the number of series is fixed; and
    of `key`, in what named keys have used, there are so many and no more."""

    def __init__(self, model_name: str, engine: EngineClient, auth: Authenticator) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each of them, which nobody reads
        self._model_name, self.registry = model_name, CollectorRegistry()
        self.registry.register(EngineCollector(model_name, engine))
        self.registry.register(KeyCollector(model_name, auth))

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            common = common_labels(f"vllm:{name}", model_name)
            metric = Histogram(f"vllm:{name}", help_text, [*common], buckets=buckets, registry=self.registry)
            return metric.labels(**common)

        def counter(name: str, help_text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
            common = common_labels(name, model_name)
            metric = Counter(name, help_text, [*common, label], registry=self.registry)
            return {value: metric.labels(*common.values(), value) for value in values}  # all exist from the start

        def total(name: str, help_text: str) -> Counter:
            common = common_labels(f"vllm:{name}", model_name)
            return Counter(f"vllm:{name}", help_text, [*common], registry=self.registry).labels(**common)

        self.prompt_tokens = total("prompt_tokens", "Prompt tokens of admitted sequences.")
        self.prompt_tokens_cached = total("prompt_tokens_cached", "Prompt tokens served from the prefix cache.")
        self.generation_tokens = total("generation_tokens", "Tokens generated.")
        self.success = counter("vllm:request_success", "Finished sequences.", "finished_reason", _REASONS)
        self.rejected = counter("vllm:admission_rejections", "Requests that were not admitted.", "reason", _REJECTIONS)
        self.cancelled = counter("gptq_api:requests_cancelled", "Requests ended from outside.", "cause", _CAUSES)
        self.cancelled_in = counter(
            "gptq_api:requests_cancelled_in", "Those, by how far the first of their choices was.", "where", _PLACES
        )
        self.iteration_tokens = histogram("iteration_tokens_total", "Tokens computed per engine step.", _TOKENS)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens per sequence.", _TOKENS
        )
        self.request_n = histogram("request_params_n", "The n of requests.", (1, 2, 5, 10, 20, 50, 128))
        self.request_max_tokens = histogram("request_params_max_tokens", "The max_tokens of requests.", _TOKENS)
        self.request_most_generated = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of a request's choices.", _TOKENS
        )
        self.ttft = histogram("time_to_first_token_seconds", "Request received to first token.", _SECONDS)
        self.inter_token = ManyValues(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", model_name, _SECONDS
        )
        self.registry.register(self.inter_token)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per sequence.", _SECONDS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Request received to answer complete.", _SECONDS)
        self.queue_s = histogram("request_queue_time_seconds", "From the engine's queue to the first step.", _SECONDS)
        self.prefill_s = histogram("request_prefill_time_seconds", "First step to first token.", _SECONDS)
        self.decode_s = histogram("request_decode_time_seconds", "First token to last token.", _SECONDS)
        self.inference_s = histogram("request_inference_time_seconds", "First step to last token.", _SECONDS)

    def on_phases(self, phases: Phases) -> None:
        """Of a request that was answered."""
        if phases.admitted is None or phases.first_token is None or phases.last_token is None:
            return
        self.queue_s.observe(phases.admitted - phases.submitted)
        self.prefill_s.observe(phases.first_token - phases.admitted)
        self.decode_s.observe(phases.last_token - phases.first_token)
        self.inference_s.observe(phases.last_token - phases.admitted)

    def on_step(self, step: StepOutput) -> None:
        if step.stats.num_batched_tokens:  # otherwise the engine comes to rest
            self.iteration_tokens.observe(step.stats.num_batched_tokens)

    def watch_batches(self, load: Callable[[], BatchLoad]) -> None:
        """From now on these are told as well; without them nothing is said of batches."""
        self.registry.register(BatchCollector(self._model_name, load))

    def render(self) -> bytes:
        return generate_latest(self.registry)
