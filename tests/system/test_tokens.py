"""Texts, tokens and the template, by the bodies of vLLM and of llama.cpp; the names a model answers to."""

from __future__ import annotations

from typing import Any

from gptq_api.demo import DEMO_PATH
from tests.support.server import Server, chat_body, check_error

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is GPTQ?"},
]


def test_llama_cpps_bodies(server: Server) -> None:
    text = "Hello there, <|end|> \U0001f600"
    plain = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert server.post("/tokenize", {"content": text}).json() == {"tokens": plain}
    with_bos = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert server.post("/tokenize", {"content": text, "add_special": True}).json() == {"tokens": with_bos}
    typed = server.post("/tokenize", {"content": text, "parse_special": False}).json()["tokens"]
    assert typed != plain and server.post("/detokenize", {"tokens": typed}).json()["content"] == text
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == plain
    whole = b"".join(
        piece["piece"].encode() if isinstance(piece["piece"], str) else bytes(piece["piece"]) for piece in pieces
    )
    assert whole.decode().strip() == text
    for body in ({}, {"content": "x", "prompt": "x"}, {"content": "x", "messages": MESSAGES}):
        check_error(server.post("/tokenize", body), 400, "prompt")


def test_the_template_shows_its_prompt_and_counts_it(server: Server) -> None:
    body = {"messages": MESSAGES}
    prompt = server.post("/apply-template", body).json()["prompt"]
    assert "What is GPTQ?" in prompt and prompt.index("Be brief.") < prompt.index("What is GPTQ?")
    ids = server.post("/tokenize", body).json()["tokens"]
    assert server.post("/tokenize", {"prompt": prompt}).json()["tokens"] == ids
    counted = server.post("/v1/chat/completions/input_tokens", {**body, "max_tokens": 5, "zz": 1})
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": len(ids)}
    assert counted.headers["x-unsupported-params"] == "zz"
    answered = server.post("/v1/chat/completions", {**body, "max_tokens": 1}).json()
    assert answered["usage"]["prompt_tokens"] == len(ids)
    bare = server.post("/apply-template", {**body, "add_generation_prompt": False}).json()["prompt"]
    assert prompt.startswith(bare) and len(bare) < len(prompt)
    for path in ("/apply-template", "/v1/chat/completions/input_tokens"):
        check_error(server.post(path, {"messages": []}), 400, "messages")
        check_error(server.post(path, {**body, "model": "nope"}), 404, "model", "model_not_found")


def test_without_max_tokens_a_completion_has_16(server: Server) -> None:
    """As at OpenAI; a chat goes on to the end of the context."""
    answer = server.post("/v1/completions", {"prompt": "x", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    ids = server.post("/tokenize", {"prompt": "x"}).json()["tokens"][-1:] * (limit - 3)
    assert server.post("/v1/completions", {"prompt": ids, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 3
    assert server.chat("Hello", ignore_eos=True).json()["usage"]["total_tokens"] == limit


def test_the_model_is_as_old_as_its_file(server: Server) -> None:
    (weights,) = DEMO_PATH.glob("*.safetensors")
    assert server.http.get("/v1/models/demo").json()["created"] == int(weights.stat().st_mtime)


def test_the_end_token_counts_and_has_no_logprob(server: Server) -> None:
    """It was computed, and its text is not shown."""
    ids = server.post("/tokenize", {"prompt": "x"}).json()["tokens"]
    forced: dict[str, Any] = {"logit_bias": {str(ids[-1]): 100}, "stop_token_ids": [ids[-1]], "min_tokens": 2}
    answer = server.chat(**forced, logprobs=True, max_tokens=9).json()
    told = answer["choices"][0]["logprobs"]["content"]
    assert answer["usage"]["completion_tokens"] == len(told) + 1


def test_control_tokens_have_no_bytes(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": "<|pad|>", "add_special_tokens": False}).json()["tokens"]
    forced: dict[str, Any] = {
        "logit_bias": {str(ids[0]): 100},
        "ignore_eos": True,
        "max_tokens": 2,
        "skip_special_tokens": False,
    }
    told = server.chat(**forced, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert told and all(entry["token"] == "<|pad|>" and entry["bytes"] is None for entry in told)


def test_aliases() -> None:
    with Server("--model-alias", "gpt-4o,local", "--model-alias", "demo") as server:
        for name in ("gpt-4o", "local", "demo"):
            assert server.chat(model=name, max_tokens=1).json()["model"] == "demo", "answers have its own name"
            assert server.http.get(f"/v1/models/{name}").json()["id"] == name
        assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["demo", "gpt-4o", "local"]
        check_error(server.chat(model="gpt-4"), 404, "model", "model_not_found")


def test_any_model() -> None:
    with Server("--accept-any-model") as server:
        assert server.post("/v1/chat/completions", chat_body(model="o3/mini", max_tokens=1)).json()["model"] == "demo"
        assert server.http.get("/v1/models/o3/mini").json()["id"] == "o3/mini"
        assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["demo"]
