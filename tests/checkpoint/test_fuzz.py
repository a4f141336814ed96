"""Damaged and invented checkpoints: every one loads or is refused with a CheckpointError, within the file's
memory."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.quant_config import parse_quant_config
from gptq_api.checkpoint.summary import summarise
from gptq_api.errors import ConfigError
from tests.checkpoint.test_checkpoint import load
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS

pytestmark = pytest.mark.slow

LAYOUT_NAMES = (
    "GPTQModel v1, asymmetric",
    "GPTQ-for-LLaMa before 2023-03-20, 4 bits",
    "TGI",
    "AutoGPTQ, metadata alone",
)


@contextlib.contextmanager
def only_sentences() -> Iterator[None]:
    """Nothing is raised but a CheckpointError that can be printed and sent."""
    try:
        yield
    except CheckpointError as error:
        assert str(error).isprintable() and str(error).encode() and len(str(error)) <= 2005


def read_all(folder: Path) -> None:
    """All that `inspect` and loading read."""
    checkpoint = open_checkpoint(folder)
    summarise(checkpoint)
    for module in checkpoint.modules:
        checkpoint.gptq(module)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(Recipe(num_layers=1, act_order=True, sym=False))


@pytest.fixture(scope="module")
def folder(model: RandomModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield write_checkpoint(Path(path), model)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_of_a_header(data: st.DataObject, model: RandomModel, folder: Path) -> None:
    file = write_checkpoint(folder, model) / "model.safetensors"
    content = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + header))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with only_sentences():
        read_all(folder)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_flipped_bytes_of_a_pickle(data: st.DataObject, model: RandomModel, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("pickle")
    file = write_checkpoint(folder, model, container="pt") / "llama-4bit-32g.pt"
    content = bytearray(file.read_bytes())
    # The pickle itself stands at the front, the directory of the zip file at the end.
    places = st.one_of(st.integers(0, 6000), st.integers(len(content) - 6000, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with only_sentences():
        read_all(folder)


def _noise(num_bytes: int, seed: int) -> Tensor:
    return torch.randint(0, 128, (num_bytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "flat": lambda t, n: t.flatten(),
    "turned": lambda t, n: t.t() if t.ndim == 2 else t.unsqueeze(0),
    "cut": lambda t, n: t[: max(0, t.shape[0] - n)],
    "narrow": lambda t, n: t[..., : max(0, t.shape[-1] - n)],
    "repeated": lambda t, n: t.repeat(n + 1, *[1] * (t.ndim - 1)),
    "float": lambda t, n: t.float(),
    "double": lambda t, n: t.double(),
    "int": lambda t, n: t.to(torch.int32),
    "long": lambda t, n: t.to(torch.int64),
    "byte": lambda t, n: t.to(torch.uint8),
    "bool": lambda t, n: t.bool(),
    "float8": lambda t, n: t.float().to(torch.float8_e4m3fn),
    "complex": lambda t, n: t.to(torch.complex64),
    "noise": lambda t, n: _noise(t.nbytes, n).view(t.dtype).view(t.shape),
    "huge": lambda t, n: torch.full_like(t, torch.finfo(t.dtype).max) if t.is_floating_point() else t.fill_(100),
    "infinite": lambda t, n: (
        t.fill_(math.inf) if t.is_floating_point() and t.itemsize > 1 else (t.long() * 0 - 1).to(t.dtype)
    ),
    "one number": lambda t, n: t.flatten()[0].clone(),
    "empty": lambda t, n: t[:0],
}


@settings(max_examples=50, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(("qweight", "qzeros", "scales", "g_idx", "zeros", "bias", "weight")),
            st.sampled_from(("q_proj", "down_proj", "embed_tokens", "norm", "lm_head")),
            st.sampled_from(("drop", "rename", *CHANGES)),
            st.integers(1, 40),
        ),
        min_size=1,
        max_size=3,
    ),
    layout=st.sampled_from(LAYOUT_NAMES),
)
def test_edited_tensors(edits: list[tuple[str, str, str, int]], layout: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("edited")
    chosen = LAYOUTS[layout]
    chosen.write(folder, random_model(chosen.recipe))
    file = next(f for f in folder.iterdir() if f.suffix in (".pt", ".safetensors"))
    tensors = torch.load(file) if file.suffix == ".pt" else load_file(file)
    for part, kind, change, n in edits:
        for name in [name for name in tensors if name.endswith(part) and kind in name]:
            tensor = tensors.pop(name)
            if change == "rename":
                tensors[name.replace(part, "zeros" if part != "zeros" else "qzeros")] = tensor
            elif change != "drop":
                tensors[name] = CHANGES[change](tensor.clone(), n).contiguous()
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file({name: t.clone() for name, t in tensors.items()}, file)
    with only_sentences():
        load(folder)


values = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)),
    st.sampled_from(["gptq", "gptq_v2", "auto-round", "auto_round:gptq", "-1", "int32"]),
)
objects = st.dictionaries(st.text(max_size=12), st.one_of(values, st.dictionaries(st.text(max_size=5), values)))
keys = st.sampled_from(
    (
        *("bits", "w_bit", "group_size", "desc_act", "sym", "quant_method", "method", "format", "checkpoint_format"),
        *("version", "dynamic", "extra_config", "lm_head", "pack_dtype", "packing_format", "backend"),
        "is_marlin_format",
    )
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, st.one_of(values, objects), max_size=5))
def test_any_quantization_config(raw: dict[str, Any]) -> None:
    with only_sentences():
        parse_quant_config(raw, "quantize_config.json")


@settings(max_examples=60, deadline=None)
@given(raw=st.one_of(values, objects, st.dictionaries(st.just("weight_map"), st.one_of(values, objects))))
def test_any_index(tmp_path_factory: Any, raw: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


numbers = st.one_of(
    st.integers(-2, 300),
    st.sampled_from(
        [0, 2**20, 2**31, 2**62, 2**64, 10**400, -(2**63), 1e-300, 1e308, 0.5, math.nan, math.inf, -math.inf]
    ),
)
odd = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=4), st.lists(numbers, max_size=3), objects)
config_keys = st.sampled_from(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "max_sequence_length", "rms_norm_eps", "hidden_act"),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id", "rope_theta", "rope_scaling"),
        *("rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window", "max_window_layers"),
        *("layer_types", "architectures", "model_type", "torch_dtype", "dtype", "num_local_experts"),
        "quantization_config",
    )
)
ropes = st.dictionaries(
    st.sampled_from(
        ("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "mscale")
    ),
    st.one_of(st.sampled_from(["linear", "yarn", "llama3", "dynamic", "default"]), odd),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(config_keys, st.one_of(odd, ropes), min_size=1, max_size=3), odd)
def test_any_model_config(folder: Path, model: RandomModel, changed: dict[str, Any], eos: Any) -> None:
    raw = {"architectures": ["LlamaForCausalLM"], **model.config, **changed}
    write_checkpoint(folder, model)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with only_sentences(), contextlib.suppress(ConfigError):  # where such a context does not fit the cache
        load(folder)
    (folder / "generation_config.json").unlink()


def test_experts_of_a_family_that_has_none_are_nothing(folder: Path, model: RandomModel) -> None:
    load(write_checkpoint(folder, model, num_local_experts=8))


def _damaged(text: str) -> st.SearchStrategy[bytes]:
    """The text with something in it that JSON, UTF-8 or nobody expects."""
    junk = st.sampled_from(
        (
            *(
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"9" * 5000,
                b"1e999999999",
                b'"\\ud800"',
                b"\xff",
                b"\x00",
                b"\xef\xbb\xbf",
            ),
            *(b"NaN", b"-", b'"', b"}", b"null,", b"\xed\xa0\x80", b"/* */"),
        )
    )
    data = text.encode()
    place = st.integers(0, len(data))
    return st.tuples(place, place, junk).map(lambda t: data[: t[0]] + t[2] + data[max(t[0], t[1] - 40) :])


@settings(max_examples=120, deadline=None)
@given(data=st.data(), name=st.sampled_from(("config.json", "quantize_config.json", "model.safetensors.index.json")))
def test_damaged_json(data: st.DataObject, name: str, model: RandomModel, tmp_path_factory: Any) -> None:
    quant = {"bits": 4, "group_size": 32, "model_file_base_name": "model", "dynamic": {"-:x": {}}}
    folder = tmp_path_factory.mktemp("json")
    write_checkpoint(folder, model, container="sharded", quant_config=quant)
    file = folder / name
    file.write_bytes(data.draw(_damaged(file.read_text())))
    with only_sentences():
        load(folder)


@settings(max_examples=200, deadline=None)
@given(
    entries=st.dictionaries(
        st.one_of(
            st.sampled_from(("__metadata__", "a.qweight", "a.qzeros", "a.scales", "a.g_idx")), st.text(max_size=5)
        ),
        st.one_of(
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(
                        st.sampled_from(("I32", "F16", "BF16", "F8_E4M3", "F4", "U64", "C64")), st.text()
                    ),
                    "shape": st.lists(numbers, max_size=3),
                    "data_offsets": st.lists(numbers, min_size=1, max_size=3),
                }
            ),
            objects,
            values,
        ),
        max_size=5,
    ),
    num_bytes=st.integers(0, 64),
    length=st.one_of(st.none(), numbers),
)
def test_any_safetensors_header(folder: Path, entries: dict[str, Any], num_bytes: int, length: Any) -> None:
    header = json.dumps(entries).encode()
    claimed = len(header) if not isinstance(length, int) or not 0 <= length < 2**64 else length
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + header + bytes(num_bytes))
    with only_sentences():
        read_all(folder)


OPCODES = (
    *(
        b"]",
        b"}",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"R",
        b"\x81",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b"Q",
        b"0",
        b"2",
    ),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"N", b"K\x01", b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage"),
    *(
        b"\x8a\x05\x00\x00\x00\x00\x04",
        b"J\xff\xff\xff\xff",
        b"U\x01a",
        b"\x94",
        b"\x8c\x01a",
        b"ccollections\nOrderedDict\n",
    ),
    *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(b"cbuiltins\nbytearray\n", b"cposix\nsystem\n", b"ctorch\nSize\n", b"\x88", b"."),
)
"""of protocol 2, with arguments; some that torch.save never writes"""


@settings(max_examples=300, deadline=None)
@given(program=st.lists(st.sampled_from(OPCODES), max_size=40), legacy=st.booleans())
def test_any_pickle(program: list[bytes], legacy: bool, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("program")
    (folder / "config.json").write_text("{}")
    data = b"\x80\x02" + b"".join(program) + b"."
    if legacy:
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        (folder / "model.pt").write_bytes(head + data + pickle.dumps([], 2))
    else:
        _zip_of(folder / "model.pt", data)
    with only_sentences():
        read_all(folder)


def _zip_of(file: Path, data: bytes) -> None:
    with zipfile.ZipFile(file, "w") as container:
        container.writestr("archive/data.pkl", data)
        container.writestr("archive/version", "3\n")
        container.writestr("archive/data/0", bytes(64))


def _doubled(start: bytes, use: bytes) -> bytes:
    """Forty tuples, each of the last one twice: 400 bytes that unfold to 2**40."""
    data = b"\x80\x02" + start + b"q\x00"
    for depth in range(40):
        data += b"h" + bytes([depth]) + b"h" + bytes([depth]) + b"\x86q" + bytes([depth + 1])
    return data + use.replace(b"BOMB", b"h\x28") + b"."


BOMBS = {
    "a key": _doubled(b")", b"}BOMBK\x01s"),
    "keys": _doubled(b")", b"}(BOMBK\x01u"),
    "a pair": _doubled(b")", b"ccollections\nOrderedDict\n](BOMBK\x01\x86e\x85R"),
    "the kind of a storage": _doubled(b"]", b"BOMB\x85Q"),
    "a storage's key": _doubled(
        b")", b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nBOMBX\x03\x00\x00\x00cpuK\x01tQ"
    ),
    "what is called": _doubled(b"]", b"BOMB)R"),
    "what is made": _doubled(b"]", b"BOMB)\x81"),
    "a layout": _doubled(b")", b"ctorch.serialization\n_get_layout\nBOMB\x85R"),
    "a size": _doubled(b")", b"ctorch\nSize\nBOMB\x85R"),
    "memory": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "a set": _doubled(b")", b"cbuiltins\nset\n](BOMBe\x85R"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_unfolds_is_refused_before_it_does(name: str, legacy: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    if legacy:
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        (tmp_path / "model.pt").write_bytes(head + BOMBS[name] + pickle.dumps([], 2))
    else:
        _zip_of(tmp_path / "model.pt", BOMBS[name])
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"model.pt (is not a readable torch file|holds pickled code|holds what is no)"
    ):
        open_checkpoint(tmp_path)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("legacy", [False, True])
def test_both_containers_of_torch_are_read(legacy: bool, model: RandomModel, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, container="pt")
    state = model.tensors()
    shared = {**state, "tied": state["model.embed_tokens.weight"], "part": state["model.norm.weight"][2:5]}
    parameters = {name: torch.nn.Parameter(t, requires_grad=False) for name, t in shared.items()}
    torch.save({"state_dict": parameters}, folder / "llama-4bit-32g.pt", _use_new_zipfile_serialization=not legacy)
    read_all(folder)
    store = open_checkpoint(folder).store
    assert torch.equal(store.read("part"), state["model.norm.weight"][2:5])
    assert torch.equal(store.read("tied"), state["model.embed_tokens.weight"])


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.summary import summarise
from gptq_api.errors import ConfigError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(Path(folder))
        summarise(checkpoint)
        for module in checkpoint.modules:
            checkpoint.gptq(module)
        print("read", flush=True)
    except CheckpointError as error:
        print("refused", flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
"""


def test_memory_is_bounded_by_the_file(model: RandomModel, tmp_path: Path) -> None:
    large = random_model(Recipe(num_layers=1, hidden_size=1024, intermediate_size=4096, num_heads=8, act_order=True))
    honest = [write_checkpoint(tmp_path / c, large, container=c) for c in ("safetensors", "pt")]
    size = sum(f.stat().st_size for f in honest[0].iterdir())
    tensors = model.tensors()
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.qweight"] = torch.zeros(1, dtype=torch.int32).expand(2**33, 160)
    pretending = write_checkpoint(tmp_path / "pretending", model, container="pt", tensors=tensors)
    command = [sys.executable, "-c", MEASURE, str(pretending), *map(str, honest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[::2] == ["refused", "read", "read"]
    kib = [int(line) for line in lines[1::2]]
    assert size > 8 * 2**20
    assert kib[0] < 16 * 2**10
    assert kib[-1] * 1024 < 2 * size + 16 * 2**20
