"""What is read when somebody asks /metrics: the engine's state, batches, named keys; nothing polls.

Metrics under vLLM's prefix have its labels `model_name` and `engine`, which is "0": there is one. Those under ours have
`model_name`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gptq_api.batch.tally import BatchLoad
from gptq_api.edge.auth import Authenticator
from gptq_api.edge.limits import Usage
from gptq_api.engine.client import EngineClient
from gptq_api.logs import num_dropped

ENGINE = "0"
"""as vLLM numbers engines, of which there is one here"""


def common_labels(name: str, model_name: str) -> dict[str, str]:
    """Those that every series of a metric has."""
    return {"model_name": model_name, **({"engine": ENGINE} if name.startswith("vllm:") else {})}


def gauge_of(name: str, text: str, model_name: str, *labels: str) -> tuple[GaugeMetricFamily, list[str]]:
    """A gauge with `labels` behind the common ones, and the values of those."""
    common = common_labels(name, model_name)
    return GaugeMetricFamily(name, text, labels=[*common, *labels]), [*common.values()]


def counter_of(name: str, text: str, model_name: str, *labels: str) -> tuple[CounterMetricFamily, list[str]]:
    """The same of a counter, whose name has no "_total" here."""
    common = common_labels(name, model_name)
    return CounterMetricFamily(name, text, labels=[*common, *labels]), [*common.values()]


class ManyValues(Collector):
    """A histogram that takes a list at a time: one value of each token, for which the library's own takes 0.6 us."""

    def __init__(self, name: str, help_text: str, model_name: str, buckets: tuple[float, ...]) -> None:
        self._name, self._help_text, self._labels = name, help_text, common_labels(name, model_name)
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe_all(self, values: list[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help_text, labels=[*self._labels])
        up_to = zip(map(floatToGoString, self._bounds), accumulate(self._counts), strict=True)
        family.add_metric([*self._labels.values()], [(bound, float(count)) for bound, count in up_to], self._sum)
        yield family


class KeyCollector(Collector):
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
            counter, common = counter_of(f"gptq_api:key_{name}", text, self._model_name, "key")
            for key, account in accounts.items():
                counter.add_metric([*common, key], read(account.usage))
            yield counter
        text = "Requests that were refused for a limit of the key."
        refused, common = counter_of("gptq_api:key_rejections", text, self._model_name, "key", "limit")
        running, _ = gauge_of("gptq_api:key_requests_running", "Requests being answered.", self._model_name, "key")
        for key, account in accounts.items():
            running.add_metric([*common, key], account.num_concurrent)
            for kind, num in account.usage.refused.items():
                refused.add_metric([*common, key, kind], num)
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


class EngineCollector(Collector):
    """What the engine said with its last step, what it runs, and the log lines that neither process could write."""

    def __init__(self, model_name: str, engine: EngineClient) -> None:
        self._model_name, self._engine = model_name, engine

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._totals()
        if self._engine.alive:
            yield from self._what_runs()

    def _load(self) -> Iterator[Metric]:
        load = EngineLoad.of(self._engine)
        gauges = {
            "num_requests_running": ("Sequences being computed.", load.num_running),
            "num_requests_waiting": ("Sequences waiting for a place.", load.num_waiting),
        }
        for name, (text, value) in gauges.items():
            gauge, common = gauge_of(f"vllm:{name}", text, self._model_name)
            gauge.add_metric(common, value)
            yield gauge
        text = "Sequences waiting: for a place (capacity), for their grammar (deferred)."
        reasons, common = gauge_of("vllm:num_requests_waiting_by_reason", text, self._model_name, "reason")
        num_deferred = min(self._engine.stats.num_deferred, load.num_waiting)
        reasons.add_metric([*common, "capacity"], load.num_waiting - num_deferred)
        reasons.add_metric([*common, "deferred"], num_deferred)
        yield reasons

    def _totals(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        totals = {
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
        for name, (text, value) in totals.items():
            counter, common = counter_of(name, text, self._model_name)
            counter.add_metric(common, value)
            yield counter

    def _what_runs(self) -> Iterator[Metric]:
        """Absent while there is no engine: one that is gone would be the emptiest of all to who balances load."""
        ready = self._engine.ready
        text = "Share of the KV cache in use, 0 to 1."
        usage, common = gauge_of("vllm:kv_cache_usage_perc", text, self._model_name)
        usage.add_metric(common, EngineLoad.of(self._engine).cache_usage)
        yield usage
        if ready.device.startswith("cuda"):
            graphs, common = gauge_of("gptq_api:cuda_graphs", "CUDA graphs that are kept.", self._model_name)
            graphs.add_metric(common, self._engine.stats.num_graphs)
            yield graphs
        cache, common = gauge_of(
            "vllm:cache_config_info", "The KV cache.", self._model_name, "block_size", "num_gpu_blocks"
        )
        cache.add_metric([*common, str(ready.block_size), str(ready.num_blocks)], 1)
        yield cache
        if ready.facts is None:
            return
        kinds = ("kernel", "bits", "group_size")
        text = "Which kernels take the model's Linears, and how these are quantized."
        info, common = gauge_of("gptq_api:kernel_info", text, self._model_name, *kinds, "act_order", "device", "dtype")
        text = "Linears of the forward pass that a kernel takes, q, k and v as one where they are merged."
        number, _ = gauge_of("gptq_api:kernel_linears", text, self._model_name, *kinds)
        runs = ("true" if ready.facts.act_order else "false", ready.device, ready.dtype)
        for linears in ready.facts.linears:
            kind = (linears.kernel, linears.bits, linears.group_size)
            info.add_metric([*common, *kind, *runs], 1)
            number.add_metric([*common, *kind], linears.num)
        yield info
        yield number


class BatchCollector(Collector):
    """Files of requests that nobody waits for: how many there are, and how far."""

    def __init__(self, model_name: str, load: Callable[[], BatchLoad]) -> None:
        self._model_name, self._load = model_name, load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        text = "Batches that are known, those that have ended included, by status."
        batches, common = gauge_of("gptq_api:batches", text, self._model_name, "status")
        for status, tally in load.tallies.items():
            batches.add_metric([*common, status], tally.num)
        yield batches
        gauges = {
            "running": ("Requests of batches that are being answered.", load.num_running),
            "waiting": ("Requests of batches in progress that have no answer and are not running.", load.num_waiting),
        }
        for name, (text, value) in gauges.items():
            gauge, common = gauge_of(f"gptq_api:batch_requests_{name}", text, self._model_name)
            gauge.add_metric(common, value)
            yield gauge
        text = "Requests of batches that got an answer (completed) or an error (failed) since the server was started."
        answered, common = counter_of("gptq_api:batch_requests_answered", text, self._model_name, "outcome")
        answered.add_metric([*common, "completed"], load.num_completed)
        answered.add_metric([*common, "failed"], load.num_failed)
        yield answered
