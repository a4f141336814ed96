"""Grafana's board: writes deploy/chart/dashboards/gptq-api.json from the table of panels here.

    python tools/board.py

tests/deploy/test_board.py asks a real Prometheus every query while a real server is under load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "chart" / "dashboards" / "gptq-api.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
CHOSEN = 'model_name=~"$model",instance=~"$instance"'
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it"""
    queries: tuple[tuple[str, str], ...]
    """(legend, PromQL)"""
    text: str = ""
    kind: str = "timeseries"
    stacked: bool = False


def series(name: str, more: str = "") -> str:
    return f"{name}{{{CHOSEN}{',' + more if more else ''}}}"


def rate(name: str, by: str = "", more: str = "") -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({series(name, more)}[$__rate_interval]))"


def percentiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"p{p}", f"histogram_quantile({p / 100}, {rate(f'{name}_bucket', 'le')})") for p in PERCENTILES)


def mean(name: str) -> str:
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


def gauge(name: str, how: str = "sum", by: str = "") -> str:
    return f"{how} by ({by}) ({series(name)})" if by else f"{how} ({series(name)})"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel("Running", "short", (("", gauge("vllm:num_requests_running")),), "Sequences being computed.", "stat"),
            Panel(
                "Waiting", "short", (("", gauge("vllm:num_requests_waiting")),), "Sequences without a place.", "stat"
            ),
            Panel("KV cache in use", "percentunit", (("", gauge("vllm:kv_cache_usage_perc", "max")),), "", "stat"),
            Panel("Tokens a second", "short", (("", rate("vllm:generation_tokens_total")),), "Generated.", "stat"),
            Panel(
                "First token, p90",
                "s",
                (("", percentiles("vllm:time_to_first_token_seconds")[1][1]),),
                "From the request to its first token.",
                "stat",
            ),
            Panel("Engine restarts", "short", (("", gauge("gptq_api:engine_restarts_total")),), "", "stat"),
        ),
    ),
    (
        "What users feel",
        (
            Panel("Time to the first token", "s", percentiles("vllm:time_to_first_token_seconds")),
            Panel("Time between tokens", "s", percentiles("vllm:inter_token_latency_seconds")),
            Panel("Whole request", "s", percentiles("vllm:e2e_request_latency_seconds")),
            Panel(
                "Where the time goes",
                "s",
                tuple((part, mean(f"vllm:request_{part}_time_seconds")) for part in ("queue", "prefill", "decode")),
                "Means of answered requests: waiting, the prompt, the answer.",
                stacked=True,
            ),
        ),
    ),
    (
        "Load",
        (
            Panel(
                "Tokens a second",
                "short",
                (
                    ("generated", rate("vllm:generation_tokens_total")),
                    ("prompts", rate("vllm:prompt_tokens_total")),
                    ("prompts, cached", rate("vllm:prompt_tokens_cached_total")),
                ),
            ),
            Panel(
                "Sequences",
                "short",
                (
                    ("running", gauge("vllm:num_requests_running")),
                    ("waiting: {{reason}}", gauge("vllm:num_requests_waiting_by_reason", by="reason")),
                ),
                stacked=True,
            ),
            Panel(
                "Finished sequences a second",
                "short",
                (("{{finished_reason}}", rate("vllm:request_success_total", "finished_reason")),),
                stacked=True,
            ),
            Panel(
                "Not answered, a second",
                "short",
                (
                    ("refused: {{reason}}", rate("vllm:admission_rejections_total", "reason")),
                    ("ended: {{cause}}", rate("gptq_api:requests_cancelled_total", "cause")),
                ),
                "Requests that were not admitted, or ended from outside.",
                stacked=True,
            ),
            Panel(
                "Tokens of prompts and answers",
                "short",
                (
                    ("prompt, p50", percentiles("vllm:request_prompt_tokens")[0][1]),
                    ("prompt, p99", percentiles("vllm:request_prompt_tokens")[2][1]),
                    ("answer, p50", percentiles("vllm:request_generation_tokens")[0][1]),
                    ("answer, p99", percentiles("vllm:request_generation_tokens")[2][1]),
                ),
            ),
            Panel(
                "Tokens a second by key",
                "short",
                (("{{key}}", rate("gptq_api:key_generation_tokens_total", "key")),),
                "Of named keys, as their requests end.",
                stacked=True,
            ),
        ),
    ),
    (
        "Batches",
        (
            Panel(
                "Batches", "short", (("{{status}}", gauge("gptq_api:batches", by="status")),), "Where --batch-dir is."
            ),
            Panel(
                "Their requests",
                "short",
                (
                    ("running", gauge("gptq_api:batch_requests_running")),
                    ("waiting", gauge("gptq_api:batch_requests_waiting")),
                ),
                stacked=True,
            ),
            Panel(
                "Their requests answered, a second",
                "short",
                (("{{outcome}}", rate("gptq_api:batch_requests_answered_total", "outcome")),),
                stacked=True,
            ),
        ),
    ),
    (
        "Engine",
        (
            Panel(
                "KV cache in use",
                "percentunit",
                (("{{instance}}", gauge("vllm:kv_cache_usage_perc", "max", "instance")),),
            ),
            Panel(
                "Prompt tokens found in the prefix cache",
                "percentunit",
                (("", f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"),),
            ),
            Panel(
                "Tokens in a step, and steps a second",
                "short",
                (
                    ("tokens", mean("vllm:iteration_tokens_total")),
                    ("steps", rate("vllm:iteration_tokens_total_count")),
                ),
            ),
            Panel(
                "Drafted tokens a second",
                "short",
                (
                    ("drafted", rate("vllm:spec_decode_num_draft_tokens_total")),
                    ("accepted", rate("vllm:spec_decode_num_accepted_tokens_total")),
                ),
            ),
            Panel(
                "What is done twice or for nothing, a second",
                "short",
                (
                    ("preemptions", rate("vllm:num_preemptions_total")),
                    ("tokens nobody reads", rate("gptq_api:tokens_wasted_total")),
                    ("log lines dropped", rate("gptq_api:log_lines_dropped_total")),
                    ("KV events dropped", rate("gptq_api:kv_events_dropped_total")),
                ),
            ),
            Panel(
                "Kernels",
                "short",
                (
                    (
                        "{{kernel}}, {{bits}} bits, groups of {{group_size}}",
                        gauge("gptq_api:kernel_linears", "max", "kernel, bits, group_size"),
                    ),
                ),
                "How many Linears each of them takes.",
            ),
        ),
    ),
)


def targets(panel: Panel) -> list[dict[str, Any]]:
    return [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query, "legendFormat": legend or "__auto"}
        for i, (legend, query) in enumerate(panel.queries)
    ]


def drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    """A panel of Grafana's."""
    custom = {"fillOpacity": 10, "showPoints": "never", "spanNulls": True}
    if panel.stacked:
        custom |= {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}}
    stat = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    lines = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets(panel),
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, **({"custom": custom} if panel.kind == "timeseries" else {})},
            "overrides": [],
        },
        "options": stat if panel.kind == "stat" else lines,
    }


def board() -> dict[str, Any]:
    """The whole of it: rows, and in them panels from left to right."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        y += 1
        width, height = (24 // len(row), 4) if row[0].kind == "stat" else (8, 8)
        x = 0
        for panel in row:
            if x + width > 24:
                x, y = 0, y + height
            panels.append(drawn(panel, len(panels) + 1, {"x": x, "y": y, "w": width, "h": height}))
            x += width
        y += height

    def variable(name: str, label: str) -> dict[str, Any]:
        query = f"label_values(vllm:num_requests_running, {label})"
        return {
            "name": name,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }

    return {
        "uid": "gptq-api",
        "title": "gptq-api",
        "tags": ["gptq-api", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "data source", "type": "datasource", "query": "prometheus"},
                variable("model", "model_name"),
                variable("instance", "instance"),
            ]
        },
        "panels": panels,
    }  # fmt: skip


def page() -> str:
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
