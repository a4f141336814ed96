"""What /metrics says: the names, what they add up to, and the one histogram that is our own."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gptq_api.api.metrics import ManyValues
from tests.support.server import RawStream, Server, chat_body, wait_for

BUCKETS = (0.001, 0.5, 1, 10)


@given(st.lists(st.lists(st.one_of(st.sampled_from(BUCKETS), st.floats(0, 100)), max_size=9), max_size=4))
def test_many_values_read_like_the_librarys_histogram(lists: list[list[float]]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("vllm:x", "Help.", ["model_name"], buckets=BUCKETS, registry=theirs).labels('a "model"')
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
