"""/v1/completions: raw prompts in four spellings, stop strings, log-probabilities, echo, best_of."""

from __future__ import annotations

from tests.support.server import RawStream, Server, chunks, stream_chunks

LONG = {"ignore_eos": True, "temperature": 0}


def test_stop_strings_are_never_shown(server: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, **LONG}
    full = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert len(full) > 20
    for start, length in [(0, 1), (0, 3), (3, 1), (7, 5), (len(full) // 2, 9), (len(full) - 4, 4)]:
        stop = full[start : start + length]
        expected = full[: full.index(stop)]
        whole = server.post("/v1/completions", body | {"stop": [stop, "never met"]}).json()
        assert whole["choices"][0]["text"] == expected
        assert whole["choices"][0]["finish_reason"] == "stop"
        found = stream_chunks(server, body | {"stop": stop}, "/v1/completions")
        shown = [chunk["choices"][0]["text"] for chunk in found]
        assert "".join(shown) == expected
        assert all(shown[:-1]), "no empty text but the last"
        included = server.post("/v1/completions", body | {"stop": stop, "include_stop_str_in_output": True}).json()
        assert included["choices"][0]["text"] == expected + stop
    server.wait_idle()


def test_stop_hides_the_logprobs_too(server: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 30, "logprobs": 0, **LONG}
    full = server.post("/v1/completions", body).json()["choices"][0]
    stop = full["text"][12:15]
    cut = server.post("/v1/completions", body | {"stop": stop}).json()["choices"][0]
    assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
    assert cut["logprobs"]["tokens"] == full["logprobs"]["tokens"][: len(cut["logprobs"]["tokens"])]


def test_completions_shape(server: Server) -> None:
    body = {"prompt": ["One", "Two"], "n": 2, "max_tokens": 4, "logprobs": 2, "ignore_eos": True, "seed": 1}
    answer = server.post("/v1/completions", body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16
    for choice in answer["choices"]:
        told = choice["logprobs"]
        assert len(told["tokens"]) == 4 and told["text_offset"][0] == 0
        for token, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
            assert top[token] == value, "the very same number"
            assert 2 <= len(top) <= 3
    found = stream_chunks(server, body, "/v1/completions")
    for choice in answer["choices"]:
        parts = [c["text"] for chunk in found for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(parts) == choice["text"]


def test_prompts_as_token_ids(server: Server) -> None:
    text = "Hello there"
    ids = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    fields = {"max_tokens": 8, **LONG}
    as_text = server.post("/v1/completions", {"prompt": text, **fields}).json()
    as_ids = server.post("/v1/completions", {"prompt": [ids, ids], **fields}).json()
    assert {choice["text"] for choice in as_ids["choices"]} == {as_text["choices"][0]["text"]}
    assert as_ids["usage"]["prompt_tokens"] == 2 * len(ids)


def test_echo_and_no_tokens(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "Hello there", "echo": True, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == "Hello there" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    body = {"prompt": "Hello there", "echo": True, "max_tokens": 5, **LONG}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert whole.startswith("Hello there") and len(whole) > len("Hello there")
    assert "".join(chunk["choices"][0]["text"] for chunk in stream_chunks(server, body, "/v1/completions")) == whole


def test_best_of_returns_the_likeliest(server: Server) -> None:
    body = {"prompt": "Once", "max_tokens": 6, "temperature": 1.5, "seed": 4, "logprobs": 0, "ignore_eos": True}
    samples = server.post("/v1/completions", body | {"n": 4}).json()["choices"]
    best = server.post("/v1/completions", body | {"best_of": 4}).json()
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in samples]
    assert [choice["text"] for choice in best["choices"]] == [samples[means.index(max(means))]["text"]]
    assert best["usage"]["completion_tokens"] == 24


def test_line_separators_are_escaped(server: Server) -> None:
    body = {"prompt": "a\u2028b\u2029c\u0085d\x1ee", "echo": True, "max_tokens": 1, "stream": True}
    raw = RawStream(server, body, "/v1/completions")
    raw.head()
    events = list(raw.events())
    raw.close()
    assert rb"a\u2028b\u2029c\u0085d" in events[0]
    assert not any(mark in b"".join(events) for mark in (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85"))
    assert chunks(events)[0]["choices"][0]["text"] == body["prompt"]


def test_logit_bias_and_stop_token_ids(server: Server) -> None:
    """A ban is a ban, a stop token ends the text without being shown."""
    body = {"prompt": "Once upon a time", "max_tokens": 12, "logprobs": 0, **LONG}
    ids = server.post("/tokenize", {"prompt": "x"}).json()["tokens"]
    forced = server.post("/v1/completions", body | {"logit_bias": {str(ids[-1]): 100}}).json()["choices"][0]
    assert len(set(forced["logprobs"]["tokens"])) == 1
    ended = server.post(
        "/v1/completions", body | {"logit_bias": {str(ids[-1]): 100}, "stop_token_ids": [ids[-1]]}
    ).json()
    assert ended["choices"][0]["text"] == "" and ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == 1
    kept = server.post(
        "/v1/completions",
        body | {"logit_bias": {str(ids[-1]): 100}, "stop_token_ids": [ids[-1]], "min_tokens": 5},
    ).json()
    assert kept["usage"]["completion_tokens"] >= 6
