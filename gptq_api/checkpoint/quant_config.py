"""What the configuration files claim about the quantization. The tensors decide; this is cross-checked against them,
and used where tensors cannot tell (the zero version of an asymmetric checkpoint)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_api.checkpoint.claims import Claim, Rule, parse_claim, parse_dynamic, parse_extra_config
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import read_json
from gptq_api.checkpoint.packing import ZeroVersion
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.on_disk import is_there

_GPTQ_INSTEAD = "use a GPTQ checkpoint of the model"
_METHODS = {
    "awq": ("AWQ", _GPTQ_INSTEAD),
    "marlin": ("Marlin-packed GPTQ", "use the original GPTQ checkpoint it was repacked from"),
    "gptq_marlin": ("Marlin-packed GPTQ", "use the original GPTQ checkpoint it was repacked from"),
    "gptq_marlin_24": ("Marlin-packed GPTQ (2:4 sparse)", _GPTQ_INSTEAD),
    "compressed-tensors": ("compressed-tensors (llm-compressor)", "use a checkpoint written by GPTQModel or AutoGPTQ"),
    "bitblas": ("BitBLAS-packed", "use the original GPTQ checkpoint it was repacked from"),
    "exl2": ("EXL2 (exllamav2)", _GPTQ_INSTEAD),
    "exl3": ("EXL3 (exllamav3)", _GPTQ_INSTEAD),
    "gguf": ("GGUF (llama.cpp)", _GPTQ_INSTEAD),
    "bitsandbytes": ("bitsandbytes", _GPTQ_INSTEAD),
    "aqlm": ("AQLM", _GPTQ_INSTEAD),
    "hqq": ("HQQ", _GPTQ_INSTEAD),
    "quip": ("QuIP", _GPTQ_INSTEAD),
    "fp8": ("FP8", _GPTQ_INSTEAD),
    "fbgemm_fp8": ("FP8", _GPTQ_INSTEAD),
    "modelopt": ("ModelOpt", _GPTQ_INSTEAD),
    "mxfp4": ("MXFP4", _GPTQ_INSTEAD),
    "torchao": ("torchao", _GPTQ_INSTEAD),
    "qqq": ("QQQ", _GPTQ_INSTEAD),
    "gptq_p": ("GPTQModel's planar gptq_p", "quantize again with format gptq"),
    "paroquant": ("ParoQuant", _GPTQ_INSTEAD),
    "ipex": ("IPEX-packed", "use the original GPTQ checkpoint"),
}
_AWQ_VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_AUTO_ROUND = ("auto-round", "autoround", "auto_round", "intel/auto-round")


@dataclass(frozen=True)
class QuantConfig:
    """None: the files do not say."""

    source: str | None = None
    """the file the values came from; None: there is no quantization config at all"""
    claim: Claim = field(default_factory=Claim)
    """about every module that no rule names"""
    rules: tuple[Rule, ...] = ()
    zero_version: ZeroVersion | None = None
    lm_head: bool | None = None
    """whether the head is quantized"""
    weights_name: str | None = None
    """what AutoGPTQ called the weights file, without its ending"""


def read_quant_config(folder: Path, store: TensorStore | None = None) -> QuantConfig:
    """From quantize_config.json, quant_config.json, config.json's quantization_config, or what some writers put into
    the weights file, in this order.

    CheckpointError for other quantization methods and formats, by name, and for files that are not JSON objects.
    """
    for name in ("quantize_config.json", "quant_config.json"):
        if is_there(folder / name):
            return parse_quant_config(read_json(folder / name), str(folder / name))
    config = folder / "config.json"
    if is_there(config):
        inner = read_json(config).get("quantization_config")
        if isinstance(inner, dict):
            return parse_quant_config(inner, f"{config} (quantization_config)")
        if inner is not None:
            raise CheckpointError(
                f"{config}: quantization_config is a {type(inner).__name__} where an object is expected"
            )
    return QuantConfig() if store is None else _from_weights_file(store)


def parse_quant_config(raw: dict[str, Any], source: str) -> QuantConfig:
    """One JSON object in any writer's dialect."""
    _refuse_other_methods(raw, source)
    pack_dtype = raw.get("pack_dtype")
    if pack_dtype not in (None, "int32", "torch.int32"):
        raise CheckpointError(f"{source}: pack_dtype {pack_dtype!r:.60} is not supported; quantize again with int32")
    lm_head = raw.get("lm_head")
    return QuantConfig(
        source=source,
        claim=parse_claim(raw, source),
        rules=parse_dynamic(raw.get("dynamic"), source) + parse_extra_config(raw.get("extra_config"), source),
        zero_version=_zero_version(raw, source),
        weights_name=_text(raw, source, "model_file_base_name"),
        lm_head=lm_head if isinstance(lm_head, bool) else None,
    )


def _zero_version(raw: dict[str, Any], source: str) -> ZeroVersion | None:
    """GPTQModel names it; AutoRound's own packing stores zero points as they are, its auto_gptq packing less one."""
    form = _text(raw, source, "checkpoint_format") or _text(raw, source, "format")
    if form in ("gptq", "gptq_v2"):
        return 1 if form == "gptq" else 2
    packing = _auto_round_packing(raw, source)
    if packing is None:
        return None
    return 1 if "gptq" in packing or packing.endswith("_zp") else 2


def _auto_round_packing(raw: dict[str, Any], source: str) -> str | None:
    """ "auto_round:auto_gptq" and the like, wherever the writer's version put it."""
    for key in ("packing_format", "backend", "checkpoint_format", "format"):
        value = _text(raw, source, key)
        if value is not None and value.lower().startswith(("auto_round", "autoround")):
            return value.lower()
    return None


def _refuse_other_methods(raw: dict[str, Any], source: str) -> None:
    named = [_text(raw, source, key) for key in ("quant_method", "method", "checkpoint_format", "format")]
    if raw.get("is_marlin_format") is True:
        named.append("marlin")
    if str(raw.get("version")).lower() in _AWQ_VERSIONS and "gptq" not in named:
        named.append("awq")
    packing = _auto_round_packing(raw, source)
    if packing is not None:
        named += packing.replace("auto_awq", "awq").split(":")[1:]
    for name in named:
        key = (name or "").lower()
        if key in _METHODS:
            what, remedy = _METHODS[key]
            raise CheckpointError(f"{source} says the checkpoint is {what}, not GPTQ; {remedy}")
    if packing is not None and any(word in packing for word in ("fp8", "fp4", "llm_compressor", "rrq", "int8_w8a8")):
        raise CheckpointError(f"{source} names the packing {packing!r:.60}; export it again with --format auto_gptq")
    method = next((name for name in named[:2] if name), "gptq").lower()
    if method not in ("gptq", "gptq_v2", *_AUTO_ROUND):
        raise CheckpointError(
            f"{source} names the quantization method {method!r:.60}; only GPTQ checkpoints are served"
        )
    form = next((name for name in named[2:4] if name), "gptq").lower()
    if form not in ("gptq", "gptq_v2", *_AUTO_ROUND) and packing is None:
        raise CheckpointError(f"{source} names the format {form!r:.60}; gptq and gptq_v2 are served")


def _from_weights_file(store: TensorStore) -> QuantConfig:
    """TGI's scalar tensors, or the metadata AutoGPTQ gave its safetensors files."""
    file = store.weights.files[0]
    found: dict[str, Any] = {}
    for name, key in (("gptq_bits", "bits"), ("gptq_groupsize", "group_size"), ("gptq_sym", "sym")):
        if name in store and store.numel(name) == 1:
            value = store.read(name).item()
            found[key] = bool(value) if key == "sym" else int(value)
    if found:
        return QuantConfig(f"{file} (gptq_bits and others)", parse_claim(found, str(file)))
    for name, key in (("gptq_bits", "bits"), ("gptq_group_size", "group_size"), ("gptq_desc_act", "desc_act")):
        text = store.metadata.get(name, "").strip().lower()
        if key == "desc_act" and text in ("true", "false"):
            found[key] = text == "true"
        elif key != "desc_act" and text.removeprefix("-").isdecimal() and len(text) < 7:
            found[key] = int(text)
    return QuantConfig(f"{file} (metadata)", parse_claim(found, str(file))) if found else QuantConfig()


def _text(raw: dict[str, Any], source: str, key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{source}: {key} is {value!r:.60} where a string is expected")
    return value
