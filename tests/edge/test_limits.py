"""Buckets and accounts on a given clock."""

from __future__ import annotations

import pytest

from gptq_api.edge.keys import Key
from gptq_api.edge.limits import Account, LimitReached, spelled
from gptq_api.rates import Bucket


def account(**limits: int) -> Account:
    return Account(Key(b"", "alice", "user", **limits), 0.0)


def refusal(made: Account, now: float, num_tokens: int | None = None) -> LimitReached:
    with pytest.raises(LimitReached) as caught:
        if num_tokens is None:
            made.begin(now)
        else:
            made.reserve(num_tokens, now)
    return caught.value


def test_a_bucket_fills_evenly_and_not_beyond_its_minute() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.wait_s(1, 0.0) == 1 and bucket.wait_s(10, 0.0) == 10 and bucket.full_s(0.0) == 60
    assert bucket.wait_s(1, 0.5) == 0.5 and bucket.wait_s(1, 1.0) == 0
    assert bucket.level(30.0) == 30 and bucket.level(500.0) == 60


def test_whoever_comes_when_told_gets_it() -> None:
    bucket = Bucket(7, 0.0)
    now = 0.0
    for _ in range(1000):
        now += bucket.wait_s(1, now)
        assert bucket.wait_s(1, now) == 0
        bucket.take(1, now)
    assert now == pytest.approx(993 * 60 / 7)


def test_more_than_a_minutes_is_owed() -> None:
    bucket = Bucket(100, 0.0)
    assert bucket.wait_s(500, 0.0) == 0, "it takes all there is"
    bucket.take(500, 0.0)
    assert bucket.wait_s(100, 0.0) == 300
    bucket.give_back(1000, 0.0)
    assert bucket.level(0.0) == 100


def test_a_changed_limit_forgets_nothing() -> None:
    bucket = Bucket(100, 0.0)
    bucket.take(80, 0.0)
    bucket.change(50, 0.0)
    assert bucket.level(0.0) == -30
    bucket.change(1000, 0.0)
    assert bucket.level(0.0) == 920


def test_requests_a_minute() -> None:
    made = account(requests_per_minute=2)
    for _ in range(2):
        made.begin(0.0)
        made.end(0.0)
    reached = refusal(made, 0.0)
    assert reached.kind == "requests" and reached.retry_after_s == 30
    assert str(reached) == (
        "Rate limit reached for key alice on requests per min (RPM): Limit 2. Please try again in 30s."
    )
    assert dict(made.headers(15.0)) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"0",
        b"x-ratelimit-reset-requests": b"45s",
    }
    made.begin(30.0)
    made.give_up(30.0, counts=False)
    made.begin(30.0)
    made.give_up(30.0, counts=True)
    assert refusal(made, 30.0).kind == "requests"
    assert made.usage.refused == {"requests": 2, "tokens": 0, "concurrency": 0}


def test_tokens_a_minute_are_reserved_and_corrected() -> None:
    made = account(tokens_per_minute=1000)
    reserved = made.reserve(900, 0.0)
    reached = refusal(made, 0.0, 200)
    assert reached.kind == "tokens" and reached.retry_after_s == pytest.approx(6)
    assert "Limit 1000, Left 100, Requested 200" in str(reached)
    made.settle(reserved, prompt_tokens=50, generation_tokens=150, now=0.0)
    headers = dict(made.headers(0.0))
    assert headers[b"x-ratelimit-remaining-tokens"] == b"800" and headers[b"x-ratelimit-reset-tokens"] == b"12s"
    assert (made.usage.prompt_tokens, made.usage.generation_tokens) == (50, 150)


def test_a_request_that_may_take_more_than_a_minutes_tokens_waits_for_all_and_owes_the_rest() -> None:
    made = account(tokens_per_minute=100)
    first = made.reserve(10_000, 0.0)
    made.settle(first, 10, 0, 0.0)
    assert refusal(made, 0.0, 10_000).retry_after_s == pytest.approx(6)
    second = made.reserve(10_000, 6.0)
    made.settle(second, 10, 390, 6.0)
    assert refusal(made, 6.0, 1).retry_after_s == pytest.approx(301 * 0.6)


def test_how_many_at_a_time() -> None:
    made = account(max_concurrent=2)
    made.begin(0.0)
    made.begin(0.0)
    assert refusal(made, 5.0).kind == "concurrency"
    assert refusal(made, 5.0).retry_after_s == 5, "nobody has left for so long"
    made.end(8.0)
    made.begin(8.0)
    assert refusal(made, 8.0).retry_after_s == 8
    made.end(10.0)
    made.begin(10.0)
    assert refusal(made, 10.0).retry_after_s == 5, "two in 10 s"
    assert made.headers(10.0) == []


def test_no_limits() -> None:
    made = account()
    for _ in range(1000):
        made.begin(0.0)
        assert made.reserve(10**6, 0.0) == 0
    assert made.headers(0.0) == [] and made.num_concurrent == 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0123, "13ms"), (0.9999, "1000ms"), (1, "1s"), (1.51, "1.6s"), (59.99, "1m0s"), (360, "6m0s"),
     (72.5, "1m12.5s")],
)  # fmt: skip
def test_times_as_openai_spells_them(seconds: float, text: str) -> None:
    assert spelled(seconds) == text
