"""The one histogram that is our own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gptq_api.api.metrics import ManyValues

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
