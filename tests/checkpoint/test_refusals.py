"""What is not GPTQ is refused with what it is and what to use, from its config as from its tensors."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.test_checkpoint import Q, refused
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS
from tests.support.server import Server
from tests.support.text_tokenizers import spm

INSTEAD = "use a GPTQ"
REPACKED = "the GPTQ checkpoint it was repacked from"


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(Recipe(num_layers=1))


TENSORS: dict[str, tuple[str, ...]] = {
    "weight_packed": ("compressed-tensors", "GPTQModel or AutoGPTQ"),
    "weight_g_idx": ("compressed-tensors", "GPTQModel or AutoGPTQ"),
    "weight_zero_point": ("compressed-tensors", "GPTQModel or AutoGPTQ"),
    "q_weight": ("EXL2", INSTEAD),
    "trellis": ("EXL3", INSTEAD),
    "B": ("Marlin", REPACKED),
    "B_24": ("Marlin", "2:4", "dense GPTQ"),
    "s_channel": ("QQQ", INSTEAD),
    "weight.absmax": ("bitsandbytes", INSTEAD),
    "SCB": ("bitsandbytes", INSTEAD),
    "W_q": ("HQQ", INSTEAD),
    "codebooks": ("AQLM", INSTEAD),
    "Qidxs": ("QuIP#", INSTEAD),
    "lookup_table": ("SqueezeLLM", INSTEAD),
    "weight_scale_inv": ("FP8", INSTEAD),
    "weight_scale": ("FP8 or INT8", INSTEAD),
    "weight_scale_2": ("NVFP4", INSTEAD),
    "lora_A.weight": ("LoRA adapter", "merge it"),
    "weight": ("no quantized tensors", "FP16", "gptq-api quantize"),
    "bias": ("no GPTQ tensors", INSTEAD),
}


@pytest.mark.parametrize("part", TENSORS)
def test_from_the_names_of_tensors(part: str, model: RandomModel, tmp_path: Path) -> None:
    tensors = {f"{Q}.{part}": torch.ones(4, 4)}
    refused(write_checkpoint(tmp_path, model, tensors=tensors), str(tmp_path / "model.safetensors"), *TENSORS[part])


def test_fp8_from_the_type_of_a_weight(model: RandomModel, tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    refused(write_checkpoint(tmp_path, model, tensors=tensors), "FP8", INSTEAD)


def _awq_gemm(q: Tensor, tensors: dict[str, Tensor]) -> None:
    k, n = q.shape
    tensors[f"{Q}.qweight"] = torch.zeros(k, n // 8, dtype=torch.int32)


def _awq_gemv(q: Tensor, tensors: dict[str, Tensor]) -> None:
    k, n = q.shape
    tensors[f"{Q}.qweight"] = torch.zeros(n, k // 8, dtype=torch.int32)
    tensors[f"{Q}.qzeros"] = torch.zeros(n, 2, dtype=torch.int32)
    tensors[f"{Q}.scales"] = torch.ones(n, 16, dtype=torch.float16)


def _awq_gemv_fast(q: Tensor, tensors: dict[str, Tensor]) -> None:
    k, n = q.shape
    tensors[f"{Q}.qweight"] = torch.zeros(n // 4, k // 2, dtype=torch.int16)
    tensors[f"{Q}.qzeros"] = torch.zeros(8, n, dtype=torch.float16)
    tensors[f"{Q}.scales"] = torch.ones(8, n, dtype=torch.float16)


def _bitblas(q: Tensor, tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.qweight"] = torch.zeros(q.shape[1], q.shape[0] // 2, dtype=torch.int8)
    tensors[f"{Q}.zeros"] = torch.zeros(2, q.shape[1], dtype=torch.float16)
    del tensors[f"{Q}.qzeros"]


def _squeeze(q: Tensor, tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lookup_table"] = torch.zeros(q.shape[1], 16, dtype=torch.float16)
    del tensors[f"{Q}.qzeros"], tensors[f"{Q}.scales"]


def _words(dtype: torch.dtype) -> Callable[[Tensor, dict[str, Tensor]], None]:
    def change(_: Tensor, tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.qweight"] = tensors[f"{Q}.qweight"].to(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_awq_gemm, ("AWQ", INSTEAD)),
        (_awq_gemv, ("AWQ", INSTEAD)),
        (_awq_gemv_fast, ("AWQ", INSTEAD)),
        (_bitblas, ("BitBLAS", REPACKED)),
        (_squeeze, ("SqueezeLLM", INSTEAD)),
        (_words(torch.int64), ("int64", "pack_dtype int32", "quantize again")),
        (_words(torch.int16), ("int16", "pack_dtype int32", "quantize again")),
        (_words(torch.int8), ("int8", "pack_dtype int32", "quantize again")),
    ],
)
def test_from_the_shapes_and_types_of_a_module(
    change: Callable[[Tensor, dict[str, Tensor]], None], words: tuple[str, ...], model: RandomModel, tmp_path: Path
) -> None:
    tensors = model.tensors()
    change(model.modules[Q].q, tensors)
    refused(write_checkpoint(tmp_path, model, tensors=tensors), f"{Q}.qweight", *words)


GPTQ = {"quant_method": "gptq", "bits": 4}
CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"quant_method": "awq", "bits": 4}, ("AWQ", INSTEAD)),
    ({"w_bit": 4, "q_group_size": 128, "version": "gemm"}, ("AWQ",)),
    ({"w_bit": 4, "q_group_size": 128, "version": "GEMV"}, ("AWQ",)),
    (GPTQ | {"format": "awq"}, ("AWQ",)),
    (GPTQ | {"checkpoint_format": "marlin"}, ("Marlin", "original")),
    ({"bits": 4, "is_marlin_format": True}, ("Marlin",)),
    ({"quant_method": "marlin"}, ("Marlin",)),
    ({"quant_method": "gptq_marlin_24"}, ("2:4",)),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ("compressed-tensors", "GPTQModel")),
    (GPTQ | {"checkpoint_format": "bitblas"}, ("BitBLAS", "original")),
    (GPTQ | {"format": "gptq_p"}, ("gptq_p", "quantize again with format gptq")),
    ({"quant_method": "qqq"}, ("QQQ",)),
    ({"quant_method": "exl2"}, ("EXL2",)),
    ({"quant_method": "exl3"}, ("EXL3",)),
    ({"method": "gguf"}, ("GGUF",)),
    ({"method": "paroquant"}, ("ParoQuant",)),
    ({"quant_method": "fp8"}, ("FP8",)),
    ({"quant_method": "bitsandbytes"}, ("bitsandbytes",)),
    ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, ("AWQ",)),
    ({"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"}, ("fp8_static", "--format auto_gptq")),
    ({"quant_method": "nonsense"}, ("'nonsense'", "only GPTQ")),
    (GPTQ | {"checkpoint_format": "gptq_v9"}, ("'gptq_v9'", "gptq and gptq_v2")),
    (GPTQ | {"pack_dtype": "int64"}, ("pack_dtype 'int64'", "int32")),
    ({"bits": "four"}, ("bits is 'four'", "integer")),
    ({"sym": 1}, ("sym is 1",)),
    (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, ("'+:('", "no regular expression")),
    (GPTQ | {"dynamic": ["x"]}, ("dynamic is no object",)),
    (GPTQ | {"dynamic": {"x": 8}}, ("dynamic['x'] is 8",)),
    (GPTQ | {"extra_config": {"x": {"bits": "8"}}}, ("extra_config", "bits is '8'")),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS)
def test_from_the_config(config: dict[str, Any], words: tuple[str, ...], model: RandomModel, tmp_path: Path) -> None:
    refused(write_checkpoint(tmp_path, model, quant_config=config), "quantize_config.json", *words)
    (tmp_path / "quantize_config.json").unlink()
    refused(write_checkpoint(tmp_path, model, quantization_config=config), "(quantization_config)", *words)


def test_files_of_other_programs(model: RandomModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.npz").write_bytes(b"PK")
    refused(tmp_path, "MLX", INSTEAD)
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF", "llama.cpp", INSTEAD)
    refused(tmp_path / "model.Q4_K_M.gguf", "GGUF", "llama.cpp", INSTEAD)


MARCH: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "no scales": (lambda t: t.pop(f"{Q}.scales"), (f"{Q}.qweight", f"no {Q}.scales")),
    "other scales": (lambda t: t.update({f"{Q}.scales": torch.ones(8, 1)}), (f"{Q}.qweight", "does not fit zeros")),
    "whole scales": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()}), (f"{Q}.scales", "int32", "float")),
    "zeros between steps": (lambda t: t[f"{Q}.zeros"].add_(0.3 * t[f"{Q}.scales"]), (f"{Q}.zeros", "from 0 to 15")),
    "zeros too large": (lambda t: t[f"{Q}.zeros"].add_(16 * t[f"{Q}.scales"]), (f"{Q}.zeros", "from 0 to 15")),
    "NaN zeros": (lambda t: t[f"{Q}.zeros"].fill_(torch.nan), (f"{Q}.zeros", "NaN")),
    "qweight cut": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1].clone()}), ("no rows of 256 inputs",)),
    "no neighbours": (lambda t: t.pop("model.embed_tokens.weight"), (".qweight", "no rows of 0 inputs")),
}


@pytest.mark.parametrize("name", MARCH)
def test_broken_files_of_before_2023_03_20(name: str, tmp_path: Path) -> None:
    change, words = MARCH[name]
    layout = LAYOUTS["GPTQ-for-LLaMa before 2023-03-20, 4 bits"]
    layout.write(tmp_path, random_model(layout.recipe))
    tensors = torch.load(tmp_path / "llama7b-4bit.pt")
    change(tensors)
    torch.save(tensors, tmp_path / "llama7b-4bit.pt")
    refused(tmp_path, "llama7b-4bit.pt", *words)


def test_zero_points_that_march_2023_lost(tmp_path: Path) -> None:
    model = random_model(Recipe(num_layers=1, hidden_size=320, num_kv_heads=4))
    tensors = model.tensors()
    tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"][:, : 320 // 256 * 32].clone()
    refused(
        write_checkpoint(tmp_path, model, tensors=tensors), f"{Q}.qzeros", "lost the last zero points", "March 2023"
    )


def test_pickles_that_pretend(model: RandomModel, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, model, container="pt") / "llama-4bit-32g.pt"
    plain = model.tensors()
    for fake, words in {
        "huge": (torch.zeros(1, dtype=torch.int32).expand(2**40, 64), "larger than its stored data"),
        "sparse": (torch.eye(4).to_sparse(), "no plain tensor"),
        "meta": (torch.empty(2**40, 64, device="meta"), "no plain tensor"),
    }.values():
        torch.save(plain | {f"{Q}.qweight": fake}, file)
        refused(tmp_path, str(file), words)
    torch.save([1, 2], file)
    refused(tmp_path, "holds a list, not a state_dict")
    # Zeros of a thousand times the file's size.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(2**24))
    refused(tmp_path, "compressed zip file")


def test_a_folder_for_another_config(tmp_path: Path) -> None:
    deep = random_model(Recipe(num_layers=2))
    refused(write_checkpoint(tmp_path / "a", deep, num_hidden_layers=1), "beyond the 1 layers that config.json gives")
    qwen3 = random_model(Recipe(family="qwen3", num_layers=1))
    folder = write_checkpoint(tmp_path / "b", qwen3, architectures=["LlamaForCausalLM"])
    refused(folder, "k_norm.weight is unknown to LLaMA")


def _truncated(file: Path, _: RandomModel) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _nan(file: Path, model: RandomModel) -> None:
    tensors = model.tensors()
    tensors[f"{Q}.scales"][0, 0] = torch.nan
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_truncated, "download it again"), (_nan, f"{Q}.scales holds NaN")],
)
def test_serve_says_it_and_opens_no_port(
    spoil: Callable[[Path, RandomModel], None], words: str, model: RandomModel, tmp_path: Path
) -> None:
    spoil(spm(write_checkpoint(tmp_path, model)) / "model.safetensors", model)
    server = Server("--model-path", str(tmp_path), "--device", "cpu", wait=False)
    try:
        assert server.wait(60) == 1
        log = server.log()
        assert str(tmp_path / "model.safetensors") in log and words in log
        assert "Traceback" not in log and "serving" not in log
    finally:
        server.close()


def test_inspect_says_the_same(model: RandomModel, tmp_path: Path) -> None:
    _nan(write_checkpoint(tmp_path, model) / "model.safetensors", model)
    command = [sys.executable, "-m", "gptq_api", "inspect", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{Q}.scales holds NaN" in done.stderr and done.stdout == ""
