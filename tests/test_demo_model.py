"""The demo checkpoint: an ordinary act-order GPTQ folder whose answers are right, judged without our own reader.

Everything here is unpacked by the few lines below and run by transformers in float32, so that a failure of the engine
on the same questions is the engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gptq_api.demo import DEMO_PATH

TESTS = Path(__file__).parent
QUESTIONS: list[dict[str, Any]] = json.loads((TESTS / "demo_questions.json").read_text())
CHATS: list[list[dict[str, str]]] = json.loads((TESTS / "demo_chats.json").read_text())
MODULES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DEMO_PATH / "model.safetensors")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((DEMO_PATH / "config.json").read_text())


def nibbles(words: torch.Tensor) -> np.ndarray:
    """int32 [R, C] -> [R * 8, C], lowest bits first, along the rows."""
    fields = words.numpy().view(np.uint32)[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[None, :, None]
    return (fields & 15).reshape(-1, words.shape[1]).astype(np.float32)


def dequantised(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """float32 [N, K]; the stored zero points are one less than the real ones (v1)."""
    groups = tensors[f"{module}.g_idx"].numpy()
    zeros = nibbles(tensors[f"{module}.qzeros"].T.contiguous()).T + 1
    scales = tensors[f"{module}.scales"].float().numpy()
    return torch.from_numpy(((nibbles(tensors[f"{module}.qweight"]) - zeros[groups]) * scales[groups]).T.copy())


@pytest.fixture(scope="module")
def model(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> LlamaForCausalLM:
    state = {n: t.float() for n, t in tensors.items() if n.endswith(".weight")}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            state[f"{module}.weight"] = dequantised(tensors, module)
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(plain)).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()


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
    for chat in CHATS:
        text = template.render(messages=chat[:-1], add_generation_prompt=True, bos_token=raw["bos_token"])
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        fast = AutoTokenizer.from_pretrained(DEMO_PATH)
        assert ours == fast.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        assert ours[0] == raw_id(tokenizer, raw["bos_token"]) and ours.count(ours[0]) == 1


def raw_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return int(found)


@torch.inference_mode()
def answers(model: LlamaForCausalLM, chats: list[list[dict[str, str]]], temperature: float = 0.0) -> list[str]:
    """One batch, padded on the left; greedy, or sampled with a fixed seed."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH, padding_side="left")
    rendered = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    batch = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=420,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_question_is_answered_right(model: LlamaForCausalLM) -> None:
    found = answers(model, [[{"role": "user", "content": q["question"]}] for q in QUESTIONS])
    assert found == [q["exact"] for q in QUESTIONS]
    for question in QUESTIONS:
        assert all(e in question["exact"] for e in question["expect"])


def test_chats_refer_back(model: LlamaForCausalLM) -> None:
    prompts, expected = [], []
    for chat in CHATS:
        for i, message in enumerate(chat):
            if message["role"] == "assistant":
                prompts.append(chat[:i])
                expected.append(message["content"])
    assert answers(model, prompts) == expected


def test_sampling_at_temperature_0_7_does_not_change_the_answers(model: LlamaForCausalLM) -> None:
    short = [q for q in QUESTIONS if len(q["exact"]) < 150]
    found = answers(model, [[{"role": "user", "content": q["question"]}] for q in short * 3], 0.7)
    assert found == [q["exact"] for q in short * 3]


def test_a_wrong_permutation_is_noticed(tensors: dict[str, torch.Tensor], model: LlamaForCausalLM) -> None:
    """The questions are a real test: the same weights with sequential groups answer nothing right."""
    state = {n: p.clone() for n, p in model.state_dict().items()}
    try:
        for name in list(tensors):
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                groups = tensors[f"{module}.g_idx"]
                wrong = {**tensors, f"{module}.g_idx": groups.sort().values}
                model.get_submodule(module).weight.data.copy_(dequantised(wrong, module))
        short = [q for q in QUESTIONS if len(q["exact"]) < 60]
        found = answers(model, [[{"role": "user", "content": q["question"]}] for q in short])
        assert sum(f == q["exact"] for f, q in zip(found, short, strict=True)) <= len(short) // 4
    finally:
        model.load_state_dict(state)
