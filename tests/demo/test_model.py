"""The demo checkpoint: an ordinary act-order GPTQ folder whose answers are right, judged without our own reader.

Everything here is unpacked by the few lines below and run by transformers in float32, so that a failure of the engine
on the same questions is the engine's.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from gptq_api.demo import DEMO_PATH

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM  # where it runs: each process that collects tests would import it

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
QUESTIONS: list[dict[str, Any]] = json.loads((TESTS / "demo_questions.json").read_text())
CHATS: list[list[dict[str, str]]] = json.loads((TESTS / "demo_chats.json").read_text())
MODULES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DEMO_PATH / "model.safetensors")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEMO_PATH / "config.json").read_text())
    return found


def nibbles(words: torch.Tensor) -> np.ndarray:
    """int32 [R, C] -> [R * 8, C], lowest bits first, along the rows."""
    fields = words.numpy().view(np.uint32)[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[None, :, None]
    return (fields & 15).reshape(-1, words.shape[1]).astype(np.float32)


def dequantized(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """float32 [N, K]; the stored zero points are one less than the real ones (v1)."""
    groups = tensors[f"{module}.g_idx"].numpy()
    zeros = nibbles(tensors[f"{module}.qzeros"].T.contiguous()).T + 1
    scales = tensors[f"{module}.scales"].float().numpy()
    return torch.from_numpy(((nibbles(tensors[f"{module}.qweight"]) - zeros[groups]) * scales[groups]).T.copy())


@pytest.fixture(scope="module")
def model(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    state = {n: t.float() for n, t in tensors.items() if n.endswith(".weight")}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            state[f"{module}.weight"] = dequantized(tensors, module)
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(plain))
    model.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    model.eval()
    return model


def test_questions_are_well_formed() -> None:
    assert len(QUESTIONS) >= 24
    for question in QUESTIONS:
        assert set(question) == {"question", "expect", "exact"}
        assert question["expect"] and all(e in question["exact"] for e in question["expect"])


def test_the_folder_is_complete_and_small() -> None:
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    files = list(DEMO_PATH.iterdir())
    assert {f.name for f in files} == expected
    assert sum(f.stat().st_size for f in files) <= 12e6
    assert (DEMO_PATH.parent / "MODEL_CARD.md").is_file()


def test_config_says_what_the_tensors_are(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    quantization = config["quantization_config"]
    assert quantization == json.loads((DEMO_PATH / "quantize_config.json").read_text())
    assert config["model_type"] == "llama"
    assert quantization["quant_method"] == quantization["checkpoint_format"] == "gptq"
    assert (quantization["bits"], quantization["desc_act"], quantization["static_groups"]) == (4, True, False)
    for layer in range(config["num_hidden_layers"]):
        for name in MODULES:
            module = f"model.layers.{layer}.{name}"
            num_inputs, num_outputs = tensors[f"{module}.qweight"].shape[0] * 8, tensors[f"{module}.qweight"].shape[1]
            num_groups = num_inputs // quantization["group_size"]
            assert num_inputs % 128 == 0 and num_outputs % 16 == 0
            assert tensors[f"{module}.scales"].shape == (num_groups, num_outputs)
            assert tensors[f"{module}.qzeros"].shape == (num_groups, num_outputs // 8)
            assert tensors[f"{module}.g_idx"].shape == (num_inputs,)
            assert tensors[f"{module}.scales"].dtype == torch.float16
            # A stored 15 would be the zero point 0 or 16: tools disagree on it.
            assert nibbles(tensors[f"{module}.qzeros"].T.contiguous()).max() < 15


def test_act_order_is_real_and_shared_by_what_reads_the_same_input(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    group_size = config["quantization_config"]["group_size"]
    for layer in range(config["num_hidden_layers"]):
        g_idx = {name: tensors[f"model.layers.{layer}.{name}.g_idx"] for name in MODULES}
        for name, groups in g_idx.items():
            sequential = torch.arange(len(groups)) // group_size
            assert torch.equal(groups.sort().values, sequential.to(groups.dtype)), name
            assert (groups != sequential).double().mean() > 0.8, name
        for other in ("self_attn.k_proj", "self_attn.v_proj"):
            assert torch.equal(g_idx["self_attn.q_proj"], g_idx[other])
        assert torch.equal(g_idx["mlp.gate_proj"], g_idx["mlp.up_proj"])


def test_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_PATH / "tokenizer.json"))
    for text in ("Hello  world", "a\nb", "🦙🚀✨", "こんにちは", "gptq-api serve --port 8000", " x ", "1234567890"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("2048", add_special_tokens=False).tokens == list("2048")
    assert tokenizer.encode("Hi").ids[0] == 0
    assert len(tokenizer.encode("🦙", add_special_tokens=False).ids) > 1
    raw = json.loads((DEMO_PATH / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment().from_string(raw["chat_template"])
    fast = fast_tokenizer()
    for chat in CHATS:
        text = template.render(messages=chat[:-1], add_generation_prompt=True, bos_token=raw["bos_token"])
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours == fast.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        assert ours[0] == raw_id(tokenizer, raw["bos_token"]) and ours.count(ours[0]) == 1


def raw_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return int(found)


@functools.cache
def fast_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_PATH)


def all_cases() -> list[tuple[list[dict[str, str]], str]]:
    """(messages, right answer): the questions, and every answer within the chats."""
    cases = [([{"role": "user", "content": q["question"]}], q["exact"]) for q in QUESTIONS]
    for chat in CHATS:
        cases += [(chat[:i], m["content"]) for i, m in enumerate(chat) if m["role"] == "assistant"]
    return cases


@torch.inference_mode()
def greedy_and_chance(
    model: LlamaForCausalLM, messages: list[dict[str, str]], answer: str, temperature: float = 0.7
) -> tuple[bool, float]:
    """Whether greedy decoding gives exactly `answer` and ends, and the probability that sampling does.

    One pass over the right answer says both: greedy decoding follows it exactly when each of its tokens is the most
    likely one after those before it.
    """
    tokenizer = fast_tokenizer()
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    wanted = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([before + wanted[:-1]]), use_cache=False).logits[0, len(before) - 1 :].float()
    target = torch.tensor(wanted)
    chance = (logits / temperature).log_softmax(-1).gather(1, target[:, None]).sum().exp()
    return bool((logits.argmax(-1) == target).all()), float(chance)


def test_every_question_is_answered_right_greedily_and_when_sampled(model: LlamaForCausalLM) -> None:
    for messages, answer in all_cases():
        greedy, chance = greedy_and_chance(model, messages, answer)
        assert greedy, messages
        assert chance > 0.99, (messages, chance)
    for question in QUESTIONS:
        assert all(e in question["exact"] for e in question["expect"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_answers(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    half = copy.deepcopy(model)
    nn.Module.to(half, dtype)
    for messages, answer in all_cases():
        if len(answer) < 100:
            greedy, chance = greedy_and_chance(half, messages, answer)
            assert greedy and chance > 0.98, (messages, chance)


def test_generation_ends_with_the_right_answer(model: LlamaForCausalLM) -> None:
    """The same by really generating, for one question."""
    tokenizer = fast_tokenizer()
    question = next(q for q in QUESTIONS if q["question"] == "Count to ten.")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question["question"]}], add_generation_prompt=True, return_tensors="pt"
    )
    anything: Any = model
    out = anything.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert out[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(out[:-1]) == question["exact"]


@pytest.mark.parametrize("mistake", ["sequential groups", "zero point off by one", "nibbles reversed"])
def test_a_wrong_reading_of_the_tensors_is_noticed(
    tensors: dict[str, torch.Tensor], model: LlamaForCausalLM, mistake: str
) -> None:
    """The questions are a real test: a loader with a usual mistake answers none of them."""
    wrong = copy.deepcopy(model)
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        changed = dict(tensors)
        if mistake == "sequential groups":
            changed[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].sort().values
        weight = dequantized(changed, module)
        if mistake == "zero point off by one":
            weight += tensors[f"{module}.scales"].float()[tensors[f"{module}.g_idx"].long()].T
        if mistake == "nibbles reversed":
            weight = weight.view(len(weight), -1, 8).flip(2).reshape(len(weight), -1)
        wrong.get_parameter(f"{module}.weight").data.copy_(weight)
    for messages, answer in all_cases():
        if len(answer) < 100:
            greedy, chance = greedy_and_chance(wrong, messages, answer)
            assert not greedy and chance < 0.01, (messages, chance)
