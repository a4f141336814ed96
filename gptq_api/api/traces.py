"""Traces of requests, as OpenTelemetry has them: the framework's span of a request, in it one for the answer with the
attributes of the GenAI conventions, and in that how long it was in the queue, in prefill and in decode.

No text of anybody is in them. OTEL_* variables say where they go and which are kept, a caller's `traceparent` what they
belong to. Spans are made when an answer has ended, from times that are known anyway; a thread sends them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gptq_api import __version__
from gptq_api.errors import ConfigError, UserError
from gptq_api.types import SamplingParams

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from gptq_api.api.metrics import Phases

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
UNTRACED = frozenset({"/health", "/ready", "/metrics"})
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@dataclass(frozen=True, slots=True)
class TracedAnswer:
    """What a trace says of an answer."""

    operation: str
    model: str
    params: SamplingParams
    num_choices: int
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reasons: list[str]
    outcome: str
    """done, or what came between"""

    def attributes(self) -> dict[str, Any]:
        """By the names of OpenTelemetry's GenAI conventions."""
        params = self.params
        found: dict[str, Any] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": "gptq-api",
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.seed": params.seed,
            "gen_ai.usage.input_tokens": self.num_input_tokens,
            "gen_ai.usage.cache_read.input_tokens": self.num_cached_tokens,
            "gen_ai.usage.output_tokens": self.num_output_tokens,
            "gen_ai.response.finish_reasons": self.finish_reasons,
        }
        if params.top_k > 0:
            found["gen_ai.request.top_k"] = params.top_k
        if self.num_choices > 1:
            found["gen_ai.request.choice.count"] = self.num_choices
        if self.outcome != "done":
            found["error.type"] = self.outcome
        return found


class Traces:
    """Made once, before anything is loaded."""

    def __init__(self) -> None:
        """Raises UserError where the extra is missing, ConfigError where a variable asks for what is not there."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise UserError(
                "--otel-traces needs OpenTelemetry's SDK and exporter, which are not installed: "
                "pip install 'gptq-api[otel]'"
            ) from None
        protocol = next((name for name in _PROTOCOLS if os.environ.get(name)), None)
        if protocol is not None and os.environ[protocol] != "http/protobuf":
            raise ConfigError(
                f"{protocol}={os.environ[protocol]}: traces are sent by http/protobuf; leave the variable out, and "
                "give the address for HTTP (port 4318, as a rule) in OTEL_EXPORTER_OTLP_ENDPOINT"
            )
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({"service.version": __version__} | ({} if named else {"service.name": "gptq-api"}))
        try:
            self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except ValueError as error:
            raise ConfigError(f"an OTEL_* variable cannot be used: {error}") from None
        self._tracer = self._provider.get_tracer("gptq_api", __version__)

    def of_requests(self) -> TelemetryConfig:
        """The framework's part: a span of each request, which continues the trace that its headers name."""
        return {
            **NO_TELEMETRY,
            "tracing": True,
            "tracer_provider": self._provider,
            "operation_spans": False,
            "exclude": _is_probe,
        }

    def current(self) -> Context:
        """The span of the request that is being answered, as what spans of later belong to."""
        from opentelemetry.context import get_current

        return get_current()

    def answered(self, parent: Any, answered: TracedAnswer, phases: Phases, ended: float) -> None:
        """An answer has ended, at `ended` (time.monotonic()). `parent`: what `current` said when it began."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        offset = time.time_ns() - time.monotonic_ns()

        def ns(at: float) -> int:
            return int(at * 1e9) + offset

        name = f"{answered.operation} {answered.model}"
        attributes = answered.attributes()
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=ns(phases.submitted))
        if answered.outcome != "done":
            span.set_status(StatusCode.ERROR, answered.outcome)
        if span.is_recording():
            inside = set_span_in_context(span, parent)
            times = (phases.submitted, phases.admitted, phases.first_token, phases.last_token)
            for part, (begin, end) in zip(("queue", "prefill", "decode"), pairwise(times), strict=True):
                if begin is not None:
                    stop = ended if end is None else end
                    self._tracer.start_span(part, inside, start_time=ns(begin)).end(ns(stop))
        span.end(ns(ended))

    def close(self, seconds: float) -> None:
        """What is there is sent, as far as that takes no longer; a collector that does not answer keeps nobody."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(seconds)


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in UNTRACED
