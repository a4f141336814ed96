"""Log-probabilities of prompts: `echo` with `logprobs` as lm-eval asks for them, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from gptq_api.api.answers.logprobs import token_text
from gptq_api.bench.measure import _perplexity
from gptq_api.demo import DEMO_PATH
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.server import Server, check_error, stream_chunks

COMPLETIONS = "/v1/completions"
TEXT = "Once upon a time there was a model of four bits. It was small, and it knew its own README by heart: "
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def chunked() -> Iterator[Server]:
    """Every prompt in chunks, without a cache."""
    with Server("--max-num-batched-tokens", "7", "--no-enable-prefix-caching") as running:
        yield running


def ids_of(server: Server, text: str) -> list[int]:
    ids: list[int] = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    return ids


def complete(server: Server, prompt: Any, **fields: Any) -> dict[str, Any]:
    answer = server.post(COMPLETIONS, {"prompt": prompt, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def echoed(server: Server, prompt: Any, **fields: Any) -> dict[str, Any]:
    answer = complete(server, prompt, echo=True, **{"logprobs": 1, "max_tokens": 1, **fields})
    told: dict[str, Any] = answer["choices"][0]["logprobs"]
    return told


def loglikelihood(told: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """As lm-eval reads an answer of one token more: (of what follows the context, whether greedy says the same)."""
    greedy = all(
        max(top, key=lambda token: top[token]) == token
        for token, top in zip(told["tokens"][num_context:-1], told["top_logprobs"][num_context:-1], strict=True)
    )
    return sum(told["token_logprobs"][num_context:-1]), greedy


def test_each_token_is_as_likely_as_if_it_were_the_next_one(server: Server, chunked: Server) -> None:
    """The same floats from the sampler, which has one row of each sequence."""
    ids = ids_of(server, TEXT)
    assert len(ids) > 20
    told = echoed(server, ids, logprobs=3)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    forced = [complete(server, ids[:i], max_tokens=1, logprobs=3, logit_bias={ids[i]: 100}) for i in range(1, len(ids))]
    alone = [answer["choices"][0]["logprobs"] for answer in forced]
    assert told["token_logprobs"][1:-1] == [one["token_logprobs"][0] for one in alone]
    assert told["top_logprobs"][1:-1] == [one["top_logprobs"][0] for one in alone]
    for token, value, top in zip(told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert top[token] == value and value <= 0 and 3 <= len(top) <= 4
    assert echoed(chunked, ids, logprobs=3) == told, "chunks change nothing"


def test_columns_stand_where_their_text_does(server: Server) -> None:
    for prompt in (TEXT, ids_of(server, TEXT), "caf\u00e9 \u2192 \U0001f600!", "<|user|>Hi<|end|>", " x"):
        answer = complete(server, prompt, echo=True, logprobs=2, max_tokens=6, skip_special_tokens=False)["choices"][0]
        told, text = answer["logprobs"], answer["text"]
        ids = prompt if isinstance(prompt, list) else ids_of(server, prompt)
        assert len({len(column) for column in told.values()} | {len(ids) + 6}) == 1
        offsets = told["text_offset"]
        assert offsets == sorted(offsets) and offsets[0] == 0
        ends = [*offsets[1:], len(text)]
        for i, (token, start, end) in enumerate(zip(told["tokens"], offsets, ends, strict=True)):
            hidden = i == 0 and not isinstance(prompt, list)  # a BOS before a text
            if not token.startswith("bytes:"):
                assert text[start:end] == ("" if hidden else token)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_loglikelihood_of_a_continuation(server: Server, num_tokens: int) -> None:
    context = ids_of(server, TEXT)
    said = complete(server, context, max_tokens=12, logprobs=0)["choices"][0]["logprobs"]["tokens"]
    tokenizer = load_tokenizer(DEMO_PATH)
    id_of = {token_text(tokenizer, i): i for i in reversed(range(tokenizer.vocab_size))}
    liked = [*context, *(id_of[token] for token in said)]
    told = echoed(server, liked, max_tokens=num_tokens)
    assert len(told["tokens"]) == len(liked) + num_tokens
    if not num_tokens:  # lm-eval asks for one and drops it
        told = {name: [*column, None] for name, column in told.items()}
    value, greedy = loglikelihood(told, len(context))
    assert greedy and -60 < value < 0
    other = echoed(server, [*context, *reversed(liked[len(context) :])])
    assert loglikelihood(other, len(context))[0] < value - 5 and not loglikelihood(other, len(context))[1]


def test_one_entry_for_each_token_even_where_an_end_token_follows(server: Server) -> None:
    """Who drops the last one would lose one of the prompt otherwise."""
    ids = ids_of(server, "Hello")
    forced = {"logit_bias": {str(ids[-1]): 100}, "stop_token_ids": [ids[-1]]}
    answer = complete(server, ids, echo=True, logprobs=1, max_tokens=1, **forced)["choices"][0]
    assert answer["finish_reason"] == "stop" and len(answer["logprobs"]["tokens"]) == len(ids) + 1
    assert answer["logprobs"]["text_offset"][-1] == len(answer["text"])
    found = stream_chunks(server, {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, **forced}, COMPLETIONS)
    told = [chunk["choices"][0]["logprobs"] for chunk in found if chunk["choices"][0]["logprobs"]]
    assert [token for part in told for token in part["tokens"]] == answer["logprobs"]["tokens"]


def test_nothing_is_sampled_where_no_token_may_come(server: Server) -> None:
    ids = ids_of(server, TEXT)
    answer = complete(server, [ids, ids[:1]], echo=True, logprobs=20, max_tokens=0, n=2)
    assert answer["usage"]["completion_tokens"] == 0 and len(answer["choices"]) == 4
    for index, choice in enumerate(answer["choices"]):
        prompt = [ids, ids[:1]][index // 2]
        assert choice["index"] == index and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(prompt)
        assert all(len(top) >= 20 for top in choice["logprobs"]["top_logprobs"][1:])
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    full = (ids * limit)[:limit]
    assert len(echoed(server, full, max_tokens=0)["tokens"]) == limit, "as long as the context"
    steps = server.metric("vllm:iteration_tokens_total_count")
    assert complete(server, ids, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None
    assert server.metric("vllm:iteration_tokens_total_count") == steps, "there is nothing to run"


def test_a_cache_and_others_change_nothing(server: Server) -> None:
    ids = ids_of(server, TEXT * 3)
    expected = echoed(server, ids)
    plain = complete(server, ids, max_tokens=1)
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "they are found by others"
    again = complete(server, [ids, TEXT, ids[::-1]], echo=True, logprobs=1, max_tokens=1)
    assert again["choices"][0]["logprobs"] == expected
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "and find nothing where rows are told"


def test_samples_share_what_is_told_of_their_prompt(server: Server) -> None:
    body = {"n": 3, "temperature": 1.5, "seed": 3, "echo": True, "logprobs": 2, "max_tokens": 5, "ignore_eos": True}
    answer = complete(server, [TEXT, "Hello"], **body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, choice in enumerate(answer["choices"]):
        text = [TEXT, "Hello"][index // 3]
        num = len(ids_of(server, text))
        first = answer["choices"][index - index % 3]["logprobs"]
        assert choice["text"].startswith(text) and len(choice["logprobs"]["tokens"]) == num + 5
        assert all(choice["logprobs"][name][:num] == first[name][:num] for name in first)
    best = complete(server, TEXT, **{**body, "n": 1}, best_of=3)["choices"][0]
    means = [sum(choice["logprobs"]["token_logprobs"][-5:]) for choice in answer["choices"][:3]]
    assert best["logprobs"] == answer["choices"][means.index(max(means))]["logprobs"]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"max_tokens": 0}, {"stop": "e"}], ids=str)
def test_a_stream_tells_the_same(server: Server, chunked: Server, fields: dict[str, Any]) -> None:
    body = {"prompt": [TEXT, "Hello"], "echo": True, "logprobs": 2, "max_tokens": 8, **GREEDY, **fields}
    for one in (server, chunked):
        expected = complete(one, **body)
        usage = {"stream_options": {"include_usage": True}}
        found = stream_chunks(one, {**body, **usage}, COMPLETIONS)
        assert found[-1]["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
        for choice in expected["choices"]:
            mine = [c for chunk in found for c in chunk["choices"] if c["index"] == choice["index"]]
            assert mine[0]["text"] in (TEXT, "Hello"), "the first chunk is the prompt"
            assert "".join(c["text"] for c in mine) == choice["text"]
            told = [c["logprobs"] for c in mine if c["logprobs"]]
            for name, column in choice["logprobs"].items():
                assert [entry for part in told for entry in part[name]] == column
            assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_prompt_logprobs_in_vllms_shape(server: Server, chunked: Server) -> None:
    ids = ids_of(server, TEXT)
    told = echoed(server, ids, logprobs=4, max_tokens=0)
    for one in (server, chunked):
        choice = complete(one, ids, prompt_logprobs=4, max_tokens=2)["choices"][0]
        assert not choice["text"].startswith(TEXT) and choice["logprobs"] is None
        listed = choice["prompt_logprobs"]
        assert len(listed) == len(ids) and listed[0] is None
        for token, logprob, entry in zip(ids[1:], told["token_logprobs"][1:], listed[1:], strict=True):
            assert next(iter(entry)) == str(token) and entry[str(token)]["logprob"] == logprob
            ranks = [value["rank"] for value in entry.values()]
            assert set(ranks) >= {1, 2, 3, 4} and len(entry) == (4 if ranks[0] <= 4 else 5)
            assert (
                max(value["logprob"] for value in entry.values())
                == min(entry.values(), key=lambda value: value["rank"])["logprob"]
            )
    assert [next(iter(entry.values()))["decoded_token"] for entry in listed[1:]] == told["tokens"][1:]
    alone = complete(server, ids, prompt_logprobs=0, max_tokens=0)["choices"][0]["prompt_logprobs"]
    assert all(list(entry) == [str(token)] for token, entry in zip(ids[1:], alone[1:], strict=True))
    both = complete(server, ids, prompt_logprobs=4, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert both["prompt_logprobs"] == listed and both["logprobs"] == echoed(server, ids, max_tokens=0)


def test_prompt_logprobs_of_a_chat(server: Server) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "n": 2}
    answer = server.post("/v1/chat/completions", {**asked, "prompt_logprobs": 1}).json()
    listed = answer["prompt_logprobs"]
    assert len(listed) == answer["usage"]["prompt_tokens"] and listed[0] is None
    assert "Hello" in [next(iter(entry.values()))["decoded_token"] for entry in listed[1:]]
    assert "prompt_logprobs" not in server.post("/v1/chat/completions", asked).json()


def test_what_is_refused(server: Server) -> None:
    for fields, param in (
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ):
        check_error(server.chat(**fields), 400, param)
        check_error(server.post(COMPLETIONS, {"prompt": "x", **fields}), 400, param)
    for num in (None, 20):
        assert server.chat(max_tokens=1, prompt_logprobs=num).status_code == 200


def test_perplexity_is_the_one_that_bench_computes(server: Server) -> None:
    texts = [ids_of(server, TEXT * 2), ids_of(server, TEXT[::-1])]
    runner = load_runner(LoadOptions(device="cpu", num_threads=1, max_num_seqs=1))
    expected, num = _perplexity(runner, texts)
    told = [value for ids in texts for value in echoed(server, ids, max_tokens=0, logprobs=0)["token_logprobs"][1:]]
    assert len(told) == num
    assert math.exp(-sum(told) / num) == pytest.approx(expected, rel=1e-5)
