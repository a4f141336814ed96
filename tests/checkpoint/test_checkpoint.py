"""What is refused, and in which words; what is only warned about; what the flags may claim."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_api.checkpoint.checkpoint import CheckpointError, Expected, open_checkpoint
from gptq_api.checkpoint.summary import summarise
from gptq_api.cli.inspect import inspect
from gptq_api.config import InspectSettings
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(Recipe(num_layers=1))


@pytest.fixture(scope="module")
def act_order_model() -> RandomModel:
    return random_model(Recipe(num_layers=1, act_order=True, sym=False))


def load(folder: Path, **more: Any) -> Any:
    chosen = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 4, "num_threads": 1, **more}
    return load_runner(LoadOptions(model_path=str(folder), **chosen))


def refused(folder: Path, *words: str, **more: Any) -> None:
    """Loading raises a CheckpointError of one line that holds all the words, and so does `inspect`, which does not read
    the weights."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **more)
    message = str(caught.value)
    assert "\n" not in message
    if not message.endswith("norm.weight holds NaN or infinity; download the file again"):
        with pytest.raises(CheckpointError) as told:
            inspect(InspectSettings(model_path=str(folder), device="cpu", **more))
        assert str(told.value) == message
    for word in words:
        assert word in message, message


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def drop(*names: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return apply


def first_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return apply


BROKEN: dict[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "no embedding": (drop("model.embed_tokens.weight"), ("model.embed_tokens.weight", "missing")),
    "no norm": (drop("model.norm.weight"), ("model.norm.weight", "missing")),
    "no head": (drop("lm_head.weight"), ("lm_head.weight", "tie_word_embeddings")),
    "no module": (drop(*(f"{Q}.{p}" for p in ("qweight", "qzeros", "scales", "g_idx"))), (f"{Q}.weight", "missing")),
    "no qzeros": (drop(f"{Q}.qzeros"), (f"{Q}.qzeros", "download")),
    "no scales": (drop(f"{Q}.scales"), (f"{Q}.scales", "download")),
    "NaN scale": (edit(f"{Q}.scales", first_is(torch.nan)), (f"{Q}.scales", "NaN")),
    "infinite scale": (edit(f"{Q}.scales", first_is(torch.inf)), (f"{Q}.scales", "NaN or infinity")),
    "NaN norm": (edit("model.norm.weight", first_is(torch.nan)), ("model.norm.weight", "NaN")),
    "g_idx too large": (edit(f"{Q}.g_idx", first_is(2)), (f"{Q}.g_idx", "group 2 of 2")),
    "g_idx negative": (edit(f"{Q}.g_idx", first_is(-1)), (f"{Q}.g_idx", "group -1 of 2")),
    "g_idx unbalanced": (edit(f"{Q}.g_idx", first_is(1)), (f"{Q}.g_idx", "equal size")),
    "g_idx of a fused module": (edit(f"{Q}.g_idx", lambda t: t.repeat(3)), (f"{Q}.g_idx", "fused")),
    "qweight cut": (edit(f"{Q}.qweight", lambda t: t[:-1]), (f"{Q}.g_idx", "(56,)")),
    "scales cut": (edit(f"{Q}.scales", lambda t: t[:, :-8]), (f"{Q}.qweight", "does not fit")),
    "qzeros cut": (edit(f"{Q}.qzeros", lambda t: t[:, :-1]), (f"{Q}.qzeros", "no bit width")),
    "groups cut": (edit(f"{Q}.qzeros", lambda t: t[:-1]), (f"{Q}.qweight", "does not fit")),
    "flat qweight": (edit(f"{Q}.qweight", torch.flatten), (f"{Q}.qweight", "shape")),
    "int16 words": (edit(f"{Q}.qweight", lambda t: t.to(torch.int16)), (f"{Q}.qweight", "int16", "int32")),
    "integer scales": (edit(f"{Q}.scales", lambda t: t.to(torch.int32)), (f"{Q}.scales", "float")),
    "short bias": (lambda t: t.update({f"{Q}.bias": torch.ones(3)}), (f"{Q}.bias", "(64,)")),
    "embedding of another model": (
        edit("model.embed_tokens.weight", lambda t: t[:, :-1]),
        ("model.embed_tokens.weight", "config.json gives (96, 64)"),
    ),
    "module of another model": (
        lambda t: t.update({k.replace("v_proj", "q_proj"): v.clone() for k, v in t.items() if "v_proj" in k}),
        (f"{Q}.qweight", "32 outputs", "config.json gives 64 and 64"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tensor_is_named(name: str, model: RandomModel, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    tensors = model.tensors()
    change(tensors)
    refused(write_checkpoint(tmp_path, model, tensors=tensors), str(tmp_path / "model.safetensors"), *words)


def test_files_that_are_not_weights(model: RandomModel, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights")
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF", "llama.cpp")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "model.safetensors", "not a complete safetensors file")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(tmp_path, "not a complete safetensors file")


def test_truncated_at_any_length(model: RandomModel, tmp_path: Path) -> None:
    for container, file in (("safetensors", "model.safetensors"), ("pt", "llama-4bit-32g.pt")):
        folder = write_checkpoint(tmp_path / container, model, container=container)
        data = (folder / file).read_bytes()
        for share in (0.0, 0.001, 0.1, 0.5, 0.999):
            (folder / file).write_bytes(data[: int(len(data) * share)])
            refused(folder, file, "download it again")


def test_a_file_that_shrinks_while_it_is_read(model: RandomModel, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, model) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cannot be read .it has become shorter"):
        for module in checkpoint.modules:
            checkpoint.gptq(module)


def test_pickled_code_is_never_run(model: RandomModel, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model, container="pt")
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"weight": Evil()}, tmp_path / "llama-4bit-32g.pt")
    refused(tmp_path, "pickled code", ".safetensors")
    (tmp_path / "llama-4bit-32g.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(tmp_path, "llama-4bit-32g.pt")
    assert not marker.exists()


def test_a_tensor_may_not_be_larger_than_its_data(model: RandomModel, tmp_path: Path) -> None:
    tensors = model.tensors()
    write_checkpoint(tmp_path, model, container="pt")
    tensors[f"{Q}.g_idx"] = torch.zeros(1, dtype=torch.int32).expand(64)
    torch.save(tensors, tmp_path / "llama-4bit-32g.pt")
    refused(tmp_path, f"{Q}.g_idx", "larger than its stored data")


def test_shards(model: RandomModel, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, container="sharded")
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00003.safetensors").rename(folder / "elsewhere")
    refused(folder, "lacks the shard model-00002-of-00003.safetensors")
    index.rename(folder / "hidden")
    refused(folder, "2 of the 3 shards")
    (folder / "elsewhere").rename(folder / "model-00002-of-00003.safetensors")
    load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(folder, "outside its folder")
    index.write_text("[1, 2]")
    refused(folder, "index.json", "object")


def test_which_file_of_several(model: RandomModel, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model)
    save_file({"model.embed_tokens.weight": torch.ones(96, 64)}, folder / "fp16.safetensors")
    torch.save(model.tensors(), folder / "old.pt")
    assert open_checkpoint(folder).files == (folder / "model.safetensors",)
    save_file(load_file(folder / "model.safetensors"), folder / "second.safetensors")
    refused(folder, "model.safetensors, second.safetensors", "--gptq-ckpt")
    assert open_checkpoint(folder, Path("second.safetensors")).files == (folder / "second.safetensors",)
    assert open_checkpoint(folder, folder / "old.pt").files == (folder / "old.pt",)
    assert open_checkpoint(folder / "old.pt").files == (folder / "old.pt",)
    with pytest.raises(CheckpointError, match=r"--gptq-ckpt third.pt: no such file"):
        open_checkpoint(folder, Path("third.pt"))
    with pytest.raises(CheckpointError, match="no weights file"):
        open_checkpoint(folder, Path("config.json"))


def test_the_config_names_one_of_several(model: RandomModel, tmp_path: Path) -> None:
    quant = {"bits": 4, "group_size": 32, "model_file_base_name": "gptq_model-4bit-32g"}
    folder = write_checkpoint(tmp_path, model, quant_config=quant)
    save_file(load_file(folder / "model.safetensors"), folder / "gptq_model-4bit-32g.safetensors")
    assert open_checkpoint(folder).files == (folder / "gptq_model-4bit-32g.safetensors",)
    assert open_checkpoint(folder, Path("model.safetensors")).files == (folder / "model.safetensors",)
    (folder / "gptq_model-4bit-32g.safetensors").rename(folder / "renamed.safetensors")
    refused(folder, "model.safetensors, renamed.safetensors", "--gptq-ckpt")
    (folder / "renamed.safetensors").rename(folder / "gptq_model-4bit-32g-00001-of-00001.safetensors")
    assert open_checkpoint(folder).layout == "1 shards without an index"
    write_checkpoint(folder, model, quant_config={"model_file_base_name": ["model"]})
    refused(folder, "model_file_base_name is ['model'] where a string is expected")


def test_flags_that_contradict_the_tensors(model: RandomModel, act_order_model: RandomModel, tmp_path: Path) -> None:
    plain, ordered = write_checkpoint(tmp_path / "a", model), write_checkpoint(tmp_path / "b", act_order_model)
    load(plain, gptq_wbits=4, gptq_groupsize=32, gptq_act_order=False)
    load(ordered, gptq_wbits=4, gptq_groupsize=32, gptq_act_order=True)
    refused(plain, "--gptq-wbits 3 contradicts", "4 bits", gptq_wbits=3)
    refused(plain, "--gptq-groupsize 128 contradicts", "group size 32", gptq_groupsize=128)
    refused(plain, "--gptq-groupsize -1 contradicts", "group size 32", gptq_groupsize=-1)
    refused(plain, "--gptq-act-order contradicts", "sequential", gptq_act_order=True)
    refused(ordered, "--no-gptq-act-order contradicts", "permuted", gptq_act_order=False)


def test_configs_that_contradict_the_tensors_are_warned_about(act_order_model: RandomModel, tmp_path: Path) -> None:
    lies = {"bits": 8, "group_size": 128, "desc_act": False, "sym": True}
    warnings = open_checkpoint(write_checkpoint(tmp_path, act_order_model, quant_config=lies)).warnings
    assert len(warnings) == 4
    for word in ("8 bits but", "group size 128 but", "desc_act is false but g_idx is permuted", "sym is true but"):
        assert any(word in warning and "tensors decide" in warning for warning in warnings)


def test_a_version_that_contradicts_symmetric_zeros_is_warned_about(model: RandomModel, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, zero_version=2, quant_config={"checkpoint_format": "gptq"})
    checkpoint = open_checkpoint(folder)
    assert "says zero points are v1 but the tensors show v2" in checkpoint.warnings[0]
    assert summarise(checkpoint).zero_versions == {"v2": 7}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_settings_are_read_from_the_tensors(bits: int, group_size: int, tmp_path: Path) -> None:
    made = random_model(Recipe(num_layers=1, bits=bits, group_size=group_size, act_order=True, sym=False))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, made))
    tensors = checkpoint.gptq("model.layers.0.mlp.down_proj")
    source = made.modules["model.layers.0.mlp.down_proj"]
    assert (tensors.bits, tensors.group_size, tensors.sym) == (bits, group_size, False)
    assert tensors.act_order is (group_size > 0)
    assert torch.equal(tensors.zeros, source.zeros) and torch.equal(tensors.g_idx, source.g_idx)
    summary = summarise(checkpoint)
    assert summary.bits == {bits: 7} and summary.num_sym == 0
    open_checkpoint(tmp_path, None, Expected(bits, group_size, None))


@pytest.mark.parametrize(
    ("name", "tie"),
    [("model.embed_tokens.weight", False), ("model.embed_tokens.weight", True), ("lm_head.weight", False)],
)
def test_float64_is_read_as_float32(name: str, tie: bool, tmp_path: Path) -> None:
    """No kernel has it, and who edits a checkpoint may leave it."""
    folder = tmp_path / "model"
    write_checkpoint(folder, random_model(Recipe(num_layers=1, tie=tie)))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].double()}, file)
    load(folder, dtype="auto")
    load(folder)
