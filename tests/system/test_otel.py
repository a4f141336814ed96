"""Traces of a real server, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.collector import Collector
from tests.support.commands import Commands
from tests.support.server import RawStream, Server, chat_body, stream_chunks, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MISSING = "OpenTelemetry's SDK is not installed: pip install 'gptq-api[otel]'"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=MISSING)
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Server]:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with Server("--otel-traces", env=env) as server:
        yield server


def of_trace(collector: Collector, trace: str, num: int) -> dict[str, dict[str, Any]]:
    """Its spans by their names, once there are so many."""
    wait_for(lambda: len([span for span in collector.spans if span["trace"] == trace]) >= num, 20)
    found = [span for span in collector.spans if span["trace"] == trace]
    assert len(found) == num
    return {span["name"]: span for span in found}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_parts(collector: Collector, traced: Server, stream: bool) -> None:
    trace = f"{int(stream) + 1:032x}"
    body = chat_body("Secret words", max_tokens=8, temperature=0, ignore_eos=True, stream=stream)
    before = time.time()
    answer = traced.post("/v1/chat/completions", body, traceparent=f"00-{trace}-{PARENT}-01")
    after = time.time()
    assert answer.status_code == 200
    spans = of_trace(collector, trace, 5)
    request, chat = spans["POST /v1/chat/completions"], spans["chat demo"]
    assert request["parent"] == PARENT and chat["parent"] == request["id"]
    assert request["attributes"]["http.response.status_code"] == 200
    attributes = chat["attributes"]
    assert attributes["gen_ai.operation.name"] == "chat" and attributes["gen_ai.request.model"] == "demo"
    assert attributes["gen_ai.usage.output_tokens"] == 8 and attributes["gen_ai.usage.input_tokens"] > 3
    assert attributes["gen_ai.response.finish_reasons"] == ["length"] and "error.type" not in attributes
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {part["parent"] for part in parts} == {chat["id"]}
    edges = [chat["begin"], *(edge for part in parts for edge in (part["begin"], part["end"])), chat["end"]]
    assert edges == sorted(edges) and before <= edges[0] and edges[-1] <= after + 0.1
    for earlier, later in pairwise(parts):
        assert earlier["end"] == later["begin"]
    assert "Secret" not in str(spans) and collector.services == {"gptq-api"}


def test_what_is_not_sampled_is_not_sent_and_probes_are_no_requests(collector: Collector, traced: Server) -> None:
    unsampled, sampled = f"{7:032x}", f"{8:032x}"
    for path in ("/health", "/ready", "/metrics"):
        traced.http.get(path, headers={"traceparent": f"00-{unsampled}-{PARENT}-01"})
    for trace, flag in ((unsampled, "00"), (sampled, "01")):
        headers = {"traceparent": f"00-{trace}-{PARENT}-{flag}"}
        assert traced.post("/v1/completions", {"prompt": "One", "max_tokens": 2}, **headers).status_code == 200
    assert "text_completion demo" in of_trace(collector, sampled, 5)
    assert not [span for span in collector.spans if span["trace"] == unsampled]


def test_a_refused_request_and_one_whose_client_leaves(collector: Collector, traced: Server) -> None:
    refused = f"{9:032x}"
    headers = {"traceparent": f"00-{refused}-{PARENT}-01"}
    assert traced.post("/v1/chat/completions", {"messages": 3}, **headers).status_code == 400
    (request,) = of_trace(collector, refused, 1).values()
    assert request["attributes"]["http.response.status_code"] == 400
    stream = RawStream(traced, chat_body(max_tokens=900, ignore_eos=True, stream=True))
    stream.head()
    next(stream.events())
    stream.close()

    def left() -> list[dict[str, Any]]:
        return [span for span in collector.spans if span["attributes"].get("error.type") == "disconnect"]

    wait_for(left, 20)
    assert left()[0]["failed"] and left()[0]["name"] == "chat demo"


def test_traces_of_the_last_requests_are_sent_before_the_server_goes(collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_SERVICE_NAME": "mine"}
    with Server("--otel-traces", env=env) as server:
        stream_chunks(server, chat_body(max_tokens=3))
        server.signal()
        assert server.wait() == 0
    assert "mine" in collector.services


def test_a_collector_that_is_not_there_keeps_nobody() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=MISSING)
    with Server("--otel-traces", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}) as server:
        assert server.chat(max_tokens=3).status_code == 200
        began = time.monotonic()
        server.signal()
        assert server.wait() == 0 and time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_another_protocol_is_refused(name: str, commands: Commands) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=MISSING)
    status, log = commands.refused("--otel-traces", env={name: "grpc"})
    assert status == 2
    assert f"{name}=grpc: traces are sent by http/protobuf" in log


def test_without_the_sdk_it_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text("import sys\nsys.modules['opentelemetry.sdk'] = None\n")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    server = Server("--otel-traces", wait=False, env={"PYTHONPATH": path})
    try:
        assert server.wait(60) == 1
        assert "--otel-traces needs OpenTelemetry's SDK and exporter, which are not installed" in server.log()
        assert "loading" not in server.log() and "Traceback" not in server.log()
    finally:
        server.close()


def test_nothing_of_the_sdk_is_imported_without_the_setting() -> None:
    code = (
        "import sys, gptq_api.api.listener, gptq_api.api.server\n"
        "found = [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
