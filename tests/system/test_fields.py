"""Request fields whose effect is seen in the prompt, in the shape of the answer or in the log, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gptq_api.api.requests.refused import REFUSED
from tests.support.fields import ELSEWHERE, END, LONG, Seen, case_of, nothing
from tests.support.server import RawStream, Server, chat_body, check_error, stream_chunks, wait_for
from tools.fields_table import MODELS, is_accepted, refused

ROOT = Path(__file__).parents[2]
TEMPLATE = """
{%- if enable_thinking is defined and enable_thinking %}THINK {% endif %}
{%- if verbosity is defined %}{{ verbosity }} {% endif %}
{%- for document in documents or [] %}{{ document.title }}: {{ document.text }} {% endfor %}
{%- for message in messages %}{{ message.content }}{% endfor %}"""
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose chat template reads variables."""
    path: Path = tmp_path_factory.mktemp("template") / "reads.jinja"
    path.write_text(TEMPLATE)
    with Server("--chat-template", str(path)) as running:
        yield running


@pytest.fixture(scope="module")
def crowded() -> Iterator[Server]:
    """A server with one seat, where the longest answer takes ten seconds and more."""
    with Server("--max-num-seqs", "1", env={"GPTQ_CPU_INSTRUCTION_SET": "portable"}) as running:
        yield running


@contextlib.contextmanager
def seat_taken(crowded: Server) -> Iterator[None]:
    """By a long answer, which nobody waits for."""
    stream = RawStream(crowded, chat_body("first", ignore_eos=True, stream=True, timeout=600))
    assert stream.head()[0] == 200
    wait_for(lambda: crowded.metric("vllm:num_requests_running") == 1, 20)
    yield
    assert crowded.metric("vllm:num_requests_running") == 1, "it should have taken longer"
    stream.close()


def prompt(server: Server, **fields: Any) -> str:
    answer = server.post("/apply-template", chat_body("Hi", **fields))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["prompt"]
    return text


def test_the_template_gets_the_variables_it_reads(reading: Server) -> None:
    assert prompt(reading) == "Hi"
    assert prompt(reading, chat_template_kwargs={"enable_thinking": True}) == "THINK Hi"
    assert prompt(reading, reasoning_effort="high") == "THINK Hi"
    assert prompt(reading, reasoning_effort="none") == "Hi"
    assert prompt(reading, verbosity="low") == "low Hi"
    assert prompt(reading, documents=[{"title": "A", "text": "b"}]) == "A: b Hi"
    answer = reading.chat(max_tokens=1, reasoning_effort="high", verbosity="low")
    assert answer.status_code == 200 and "x-unsupported-params" not in answer.headers


def test_what_the_template_does_not_read_is_said(server: Server, reading: Server, strict_server: Server) -> None:
    error = check_error(reading.chat(chat_template_kwargs={"zz": 1}), 400, "chat_template_kwargs.zz")
    assert "'zz'" in error["message"] and "enable_thinking, verbosity" in error["message"]
    check_error(reading.chat(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs.messages")
    check_error(server.chat(documents=[{"text": "x"}]), 400, "documents", "unsupported_parameter")
    answer = server.chat(max_tokens=1, reasoning_effort="high", verbosity="low")
    assert answer.headers["x-unsupported-params"] == "reasoning_effort, verbosity"
    check_error(strict_server.chat(reasoning_effort="high"), 400, "reasoning_effort", "unsupported_parameter")


def test_variables_are_bounded_and_stay_text(reading: Server) -> None:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    for value in (deep, [0] * 5000, {str(i): 0 for i in range(65)}, 2**64):
        check_error(reading.chat(chat_template_kwargs={"verbosity": value}), 400, "chat_template_kwargs")
    wrong: tuple[Any, ...] = ({}, [1], [{"text": ["x"]}], [{}] * 257)
    for documents in wrong:
        check_error(reading.chat(documents=documents), 400, "documents")
    long = [{"text": "word " * 300_000}]
    check_error(reading.chat(documents=long), 400, "documents", "context_length_exceeded")


def test_usage_and_tier(server: Server) -> None:
    answer = server.chat(max_tokens=2, service_tier="auto", prediction={"type": "content", "content": "x"}).json()
    assert answer["service_tier"] == "default"
    assert answer["usage"]["completion_tokens_details"].keys() >= {"reasoning_tokens", "accepted_prediction_tokens"}
    assert "service_tier" not in server.chat(max_tokens=1).json()
    chunks = stream_chunks(server, chat_body(max_tokens=1, service_tier="flex"), CHAT)
    assert all(chunk["service_tier"] == "default" for chunk in chunks)


def test_who_asked_stands_in_the_log(strict_server: Server) -> None:
    said: dict[str, Any] = {
        "user": "ann\x1b[31m",
        "metadata": {"job": "7"},
        "store": True,
        "prompt_cache_key": "k" * 512,
    }
    assert strict_server.chat(max_tokens=1, **said).status_code == 200
    line = wait_for(lambda: [line for line in strict_server.log().splitlines() if "ann?[31m" in line], 5)[0]
    assert "job" in line and "k" * 512 in line and '"store": true' in line


def test_an_urgent_request_overtakes_those_that_wait(crowded: Server) -> None:
    order, jobs = list[str](), list[Future[None]]()

    def ask(name: str, headers: dict[str, str], **fields: Any) -> None:
        body = chat_body(name, ignore_eos=True, max_tokens=20, **fields)
        assert crowded.http.post(CHAT, json=body, headers=headers).status_code == 200
        order.append(name)

    def is_waiting(number: int) -> bool:
        return crowded.metric("vllm:num_requests_waiting") == number

    with ThreadPoolExecutor(3) as threads:
        with seat_taken(crowded):
            for number, (name, headers, fields) in enumerate(
                [
                    ("late", {"X-Priority": "3"}, {}),
                    ("usual", {}, {}),
                    ("urgent", {"X-Priority": "3"}, {"priority": -1}),
                ],
                1,
            ):
                jobs.append(threads.submit(ask, name, headers, **fields))
                wait_for(partial(is_waiting, number), 20)
            assert not order, "who has the seat keeps it"
        for job in jobs:
            job.result()
    assert order == ["urgent", "usual", "late"]


def test_a_wrong_priority_names_its_header(server: Server) -> None:
    for wrong in ("urgent", "1.5", "1001", "9" * 20, ""):
        answer = server.http.post(CHAT, json=chat_body("x"), headers={"X-Priority": wrong})
        check_error(answer, 400, "X-Priority")
    check_error(server.chat(priority=1001), 400, "priority")


def test_a_deadline_counts_the_time_in_the_queue(server: Server, crowded: Server) -> None:
    with seat_taken(crowded):
        for path in (CHAT, "/v1/responses", "/v1/messages"):
            body = {"input": "x"} if path == "/v1/responses" else {**chat_body("x"), "max_tokens": 5}
            answer = crowded.post(path, body, X_Request_Timeout="0.01")
            assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false", answer.text
        check_error(crowded.chat(timeout=0.01), 504, "timeout", "deadline_exceeded")
        assert crowded.metric("gptq_api:requests_cancelled_total", cause="deadline") >= 4
    choice = crowded.chat("x", ignore_eos=True, max_tokens=20, timeout=60).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    for wrong in ("soon", "nan", "0", "-1", "1e9", ""):
        check_error(server.post(CHAT, chat_body("x"), X_Request_Timeout=wrong), 400, "X-Request-Timeout")
    check_error(server.chat(timeout=0), 400, "timeout")


ROUTES = {"chat": CHAT, "completions": "/v1/completions"}
FIELDS = [(route, name) for route, model in MODELS.items() for name in model.model_fields]


@pytest.mark.parametrize(("route", "name"), FIELDS, ids=[".".join(field) for field in FIELDS])
def test_every_field_does_what_its_row_says(server: Server, reading: Server, route: str, name: str) -> None:
    """docs/fields.md: honoured is what makes a difference, accepted what makes none."""
    case = case_of(route, name)
    if case is None:
        path, test = ELSEWHERE[name].split("::")
        assert f"def {test}(" in (ROOT / path).read_text()
        return
    running = reading if case.variables else server
    end = str(running.http.get("/tokenizer_info").json()["eos_token_id"])
    body = {"temperature": 2, "seed": 7, "max_tokens": 12, "ignore_eos": True, **case.beside}
    body = (chat_body(LONG) if route == "chat" else {"prompt": LONG}) | body
    if END in body.get("logit_bias", ()):
        body["logit_bias"] = {end: body["logit_bias"][END]}
    for _ in range(2):  # so that its prompt is cached
        without = running.post(ROUTES[route], body)
        assert without.status_code == 200, without.text
    answer = running.post(ROUTES[route], {**body, name: case.value})
    assert "x-unsupported-params" not in answer.headers
    # the log's line comes behind the answer
    wait_for(lambda: case.seen(Seen(without, answer, running.log())), 5)
    assert (case.seen is nothing or name == "service_tier") == is_accepted(MODELS[route], name)


def test_what_is_refused_by_name_is_refused_on_its_route(server: Server) -> None:
    for route, model in MODELS.items():
        body = chat_body("x") if route == "chat" else {"prompt": "x"}
        for name in refused(model):
            for value in (5, "x", True, ["x"]):
                answer = server.post(ROUTES[route], {**body, "max_tokens": 1, name: value})
                if value not in REFUSED[name]:
                    check_error(answer, 400, name, "unsupported_parameter")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stop", [None, "e"])
def test_streamed_ids_are_those_of_the_whole_answer(server: Server, route: str, stop: str | None) -> None:
    body: dict[str, Any] = {"return_token_ids": True, "n": 2, "seed": 3, "max_tokens": 30, "stop": stop}
    body |= chat_body("Tell me of ships") if route == "chat" else {"prompt": ["Ships are", "A sail"]}
    whole = server.post(ROUTES[route], body).json()
    chunks = stream_chunks(server, {**body, "stream_options": {"include_usage": True}}, ROUTES[route])
    assert sum(len(choice["token_ids"]) for choice in whole["choices"]) == whole["usage"]["completion_tokens"]
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        told = [chunk["choices"][0].get("token_ids", []) for chunk in mine]
        assert [token for ids in told for token in ids] == choice["token_ids"]
        if route == "chat":
            assert mine[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        else:
            assert mine[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
