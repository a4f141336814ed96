"""What /metrics says: the names, what they add up to, and the one histogram that is our own."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gptq_api.api.collectors import ManyValues
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.server import RawStream, Server, chat_body, wait_for
from tests.support.text_tokenizers import byte_level

BUCKETS = (0.001, 0.5, 1, 10)


@given(st.lists(st.lists(st.one_of(st.sampled_from(BUCKETS), st.floats(0, 100)), max_size=9), max_size=4))
def test_many_values_read_like_the_librarys_histogram(lists: list[list[float]]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("vllm:x", "Help.", ["model_name", "engine"], buckets=BUCKETS, registry=theirs)
    histogram = histogram.labels('a "model"', "0")
    many = ManyValues("vllm:x", "Help.", 'a "model"', BUCKETS)
    ours.register(many)
    for values in lists:
        many.observe_all(values)
        for value in values:
            histogram.observe(value)

    def lines(registry: CollectorRegistry) -> list[tuple[str, float | str]]:
        parts = [line.rpartition(" ") for line in generate_latest(registry).decode().splitlines()]
        return [(name, value if name.startswith("#") else round(float(value), 6)) for name, _, value in parts]

    found = [line for line in lines(theirs) if "_created" not in line[0]]
    assert lines(ours) == found


VLLMS = """
num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total prompt_tokens_total generation_tokens_total prompt_tokens_cached_total
request_success_total admission_rejections_total iteration_tokens_total_count request_prompt_tokens_count
request_generation_tokens_count request_params_n_count request_params_max_tokens_count
request_max_num_generation_tokens_count time_to_first_token_seconds_count inter_token_latency_seconds_count
request_time_per_output_token_seconds_count e2e_request_latency_seconds_count request_queue_time_seconds_count
request_prefill_time_seconds_count request_decode_time_seconds_count request_inference_time_seconds_count
cache_config_info
"""
"""what boards, autoscalers and routers ask vLLM for; lora_requests_info is left out, since there is no LoRA here"""


def test_the_names_that_boards_and_routers_ask_for(server: Server) -> None:
    server.chat(max_tokens=3)
    found = {line.split("{")[0] for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")}
    assert not {f"vllm:{name}" for name in VLLMS.split()} - found


def labels_of(line: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', line))


def test_what_selects_by_vllms_labels_finds_every_series_of_its_names(server: Server) -> None:
    server.chat(max_tokens=3)
    lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    for line in lines:
        common = {"model_name": "demo", **({"engine": "0"} if line.startswith("vllm:") else {})}
        assert common.items() <= labels_of(line).items(), line
        assert line.startswith(("vllm:", "gptq_api:")) and ("engine" in labels_of(line)) == line.startswith("vllm:")


def test_the_kernels_that_took_the_model_are_told(server: Server) -> None:
    told = server.http.get("/server_info").json()
    facts = told["checkpoint"]
    ((kernel, num),) = facts["kernels"].items()
    kind = {"kernel": kernel, "bits": "4", "group_size": next(iter(facts["group_sizes"]))}
    runs = {"act_order": "true", "device": told["device"], "dtype": told["dtype"]}
    assert facts["linears"] == [{**kind, "num": num}]
    assert server.metric("gptq_api:kernel_info", model_name="demo", **kind, **runs) == 1
    assert server.metric("gptq_api:kernel_linears", **kind) == num


def test_a_model_with_several_kinds_of_linears_has_a_series_of_each(tmp_path: Path) -> None:
    recipe = Recipe(mixed_bits={"down_proj": 8}, hidden_size=128, intermediate_size=256)
    folder = byte_level(write_checkpoint(tmp_path / "mixed", random_model(recipe)))
    with Server("--model-path", str(folder)) as server:
        facts = server.http.get("/server_info").json()["checkpoint"]
        lines = server.http.get("/metrics").text.splitlines()
        info = [labels_of(line) for line in lines if line.startswith("gptq_api:kernel_info{")]
        assert {(one["bits"], one["group_size"]) for one in info} >= {("4", "32"), ("8", "32")}
        assert len(info) == len(facts["linears"]) > 1
        assert sum(one["num"] for one in facts["linears"]) == sum(facts["kernels"].values())
        for one in facts["linears"]:
            kind = {name: one[name] for name in ("kernel", "bits", "group_size")}
            assert server.metric("gptq_api:kernel_linears", **kind) == one["num"]


def test_the_phases_of_requests_add_up(server: Server) -> None:
    names = ("queue", "prefill", "decode", "inference")

    def sums() -> dict[str, float]:
        found = {name: server.metric(f"vllm:request_{name}_time_seconds_sum") for name in names}
        return found | {"e2e": server.metric("vllm:e2e_request_latency_seconds_sum")}

    before, num_before = sums(), server.metric("vllm:request_queue_time_seconds_count")
    for n in (1, 3):
        assert server.chat(max_tokens=20, n=n, ignore_eos=True).status_code == 200
    took = {name: value - before[name] for name, value in sums().items()}
    assert server.metric("vllm:request_queue_time_seconds_count") == num_before + 2
    assert all(value >= 0 for value in took.values()) and took["decode"] > 0 and took["prefill"] > 0
    assert abs(took["prefill"] + took["decode"] - took["inference"]) < 1e-6
    assert took["queue"] + took["inference"] <= took["e2e"]


def cancelled(server: Server, where: str) -> bool:
    return server.metric("gptq_api:requests_cancelled_in_total", where=where) == 1


def test_what_a_client_that_left_had_generated_is_counted(slow_engine: None) -> None:
    with Server("--max-num-seqs", "1") as server:
        one, other = (RawStream(server, chat_body(max_tokens=900, ignore_eos=True, stream=True)) for _ in range(2))
        one.head()
        next(one.events())
        wait_for(lambda: server.metric("vllm:num_requests_waiting_by_reason", reason="capacity") == 1, 20)
        assert server.metric("vllm:num_requests_waiting_by_reason", reason="deferred") == 0
        for stream, where in ((other, "queue"), (one, "decode")):
            stream.close()
            wait_for(partial(cancelled, server, where), 20)
        server.wait_idle()
        assert server.metric("gptq_api:requests_cancelled_total", cause="disconnect") == 2
        assert server.metric("gptq_api:tokens_wasted_total") < 20, "it is forgotten within a step"
