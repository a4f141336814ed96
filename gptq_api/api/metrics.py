"""Prometheus metrics under vLLM's names, because dashboards, autoscalers and gateways read those.

Only what is true here is there. Gauges and the engine's totals are read when they are scraped; nothing polls.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gptq_api.edge.auth import Authenticator
from gptq_api.edge.limits import Usage
from gptq_api.engine.client import EngineClient
from gptq_api.logs import num_dropped
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
    """One registry per server; the label is `model_name`, so that the number of series is fixed; and `key` in what
    named keys have used, of which there are so many and no more."""

    def __init__(self, model_name: str, engine: EngineClient, auth: Authenticator) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each of them, which nobody reads
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, engine))
        self.registry.register(_KeyCollector(model_name, auth))

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"vllm:{name}", help_text, ["model_name"], buckets=buckets, registry=self.registry)
            return metric.labels(model_name)

        def counter(name: str, help_text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
            metric = Counter(name, help_text, ["model_name", label], registry=self.registry)
            return {value: metric.labels(model_name, value) for value in values}  # all series exist from the start

        def total(name: str, help_text: str) -> Counter:
            return Counter(f"vllm:{name}", help_text, ["model_name"], registry=self.registry).labels(model_name)

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

    def render(self) -> bytes:
        return generate_latest(self.registry)


class ManyValues(Collector):
    """A histogram that takes a list at a time: one value of each token, for which the library's own takes 0.6 us."""

    def __init__(self, name: str, help_text: str, model_name: str, buckets: tuple[float, ...]) -> None:
        self._name, self._help_text, self._model_name = name, help_text, model_name
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe_all(self, values: list[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help_text, labels=["model_name"])
        up_to = zip(map(floatToGoString, self._bounds), accumulate(self._counts), strict=True)
        family.add_metric([self._model_name], [(bound, float(count)) for bound, count in up_to], self._sum)
        yield family


class _KeyCollector(Collector):
    """What named keys have used."""

    def __init__(self, model_name: str, auth: Authenticator) -> None:
        self._model_name, self._auth = model_name, auth

    def collect(self) -> Iterator[Metric]:
        accounts = self._auth.accounts
        if not accounts:
            return
        totals: dict[str, tuple[str, Callable[[Usage], int]]] = {
            "requests": ("Requests that were admitted.", lambda usage: usage.requests),
            "prompt_tokens": ("Prompt tokens of ended requests.", lambda usage: usage.prompt_tokens),
            "generation_tokens": ("Tokens generated for ended requests.", lambda usage: usage.generation_tokens),
        }
        for name, (text, read) in totals.items():
            counter = CounterMetricFamily(f"gptq_api:key_{name}", text, labels=["model_name", "key"])
            for key, account in accounts.items():
                counter.add_metric([self._model_name, key], read(account.usage))
            yield counter
        text = "Requests that were refused for a limit of the key."
        refused = CounterMetricFamily("gptq_api:key_rejections", text, labels=["model_name", "key", "limit"])
        running = GaugeMetricFamily(
            "gptq_api:key_requests_running", "Requests being answered.", labels=["model_name", "key"]
        )
        for key, account in accounts.items():
            running.add_metric([self._model_name, key], account.num_concurrent)
            for kind, num in account.usage.refused.items():
                refused.add_metric([self._model_name, key, kind], num)
        yield refused
        yield running


@dataclass(frozen=True, slots=True)
class EngineLoad:
    num_running: int
    num_waiting: int
    cache_usage: float
    """share of the KV cache in use, 0 to 1"""

    @classmethod
    def of(cls, engine: EngineClient) -> EngineLoad:
        """The engine reports with its steps and when it comes to rest; whoever is admitted by now counts."""
        stats = engine.stats
        waiting = min(stats.num_waiting, engine.num_admitted)
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        return cls(engine.num_admitted - waiting, waiting, used)


class _EngineCollector(Collector):
    """What the engine said with its last step, and the log lines that neither process could write."""

    def __init__(self, model_name: str, engine: EngineClient) -> None:
        self._model_name, self._engine = model_name, engine

    def collect(self) -> Iterator[Metric]:
        engine, stats, load = self._engine, self._engine.stats, EngineLoad.of(self._engine)
        gauges = {
            "num_requests_running": ("Sequences being computed.", load.num_running),
            "num_requests_waiting": ("Sequences waiting for a place.", load.num_waiting),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 0 to 1.", load.cache_usage),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting: for a place (capacity), for their grammar (deferred).",
            labels=["model_name", "reason"],
        )
        num_deferred = min(stats.num_deferred, load.num_waiting)
        reasons.add_metric([self._model_name, "capacity"], load.num_waiting - num_deferred)
        reasons.add_metric([self._model_name, "deferred"], num_deferred)
        yield reasons
        counters = {
            "vllm:num_preemptions": ("Sequences thrown out of the KV cache and computed again.", stats.num_preemptions),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.num_prefix_hits),
            "vllm:spec_decode_num_drafts": ("Times that tokens were drafted for a sequence.", stats.num_drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens that were drafted.", stats.num_draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": (
                "Drafted tokens that were the ones sampled.",
                stats.num_accepted_tokens,
            ),
            "gptq_api:engine_restarts": ("How often an engine that died was started again.", engine.num_restarts),
            "gptq_api:tokens_wasted": (
                "Tokens that were generated when the client had left or a stop string had ended the answer.",
                engine.num_wasted_tokens,
            ),
            "gptq_api:kv_events_dropped": (
                "Batches of KV events that were not published, because their thread was behind.",
                stats.num_kv_events_dropped,
            ),
            "gptq_api:log_lines_dropped": (
                "Log lines that were not written, because nobody read them or the disk was full.",
                num_dropped() + stats.num_log_lines_dropped,
            ),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        if engine.alive and engine.ready.device.startswith("cuda"):
            graphs = GaugeMetricFamily("gptq_api:cuda_graphs", "CUDA graphs that are kept.", labels=["model_name"])
            graphs.add_metric([self._model_name], stats.num_graphs)
            yield graphs
        if engine.alive:
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "The KV cache.", labels=["model_name", "block_size", "num_gpu_blocks"]
            )
            info.add_metric([self._model_name, str(engine.ready.block_size), str(engine.ready.num_blocks)], 1)
            yield info
