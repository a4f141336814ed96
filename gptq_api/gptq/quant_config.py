"""What the configuration files claim about the quantisation. The tensors decide; this is cross-checked against them,
and used where tensors cannot tell (the zero version of an asymmetric checkpoint)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptq_api.gptq.errors import CheckpointError
from gptq_api.gptq.files import read_json

_METHODS = {
    "awq": ("AWQ", "use a GPTQ checkpoint of the model"),
    "marlin": ("Marlin-packed GPTQ", "use the original GPTQ checkpoint it was repacked from"),
    "gptq_marlin": ("Marlin-packed GPTQ", "use the original GPTQ checkpoint it was repacked from"),
    "compressed-tensors": ("compressed-tensors (llm-compressor)", "use a checkpoint written by GPTQModel or AutoGPTQ"),
    "bitblas": ("BitBLAS-packed", "use the original GPTQ checkpoint it was repacked from"),
    "exl2": ("EXL2 (exllamav2)", "use a GPTQ checkpoint of the model"),
    "exl3": ("EXL3 (exllamav3)", "use a GPTQ checkpoint of the model"),
    "gguf": ("GGUF (llama.cpp)", "use a GPTQ checkpoint of the model"),
    "bitsandbytes": ("bitsandbytes", "use a GPTQ checkpoint of the model"),
    "aqlm": ("AQLM", "use a GPTQ checkpoint of the model"),
    "hqq": ("HQQ", "use a GPTQ checkpoint of the model"),
    "quip": ("QuIP", "use a GPTQ checkpoint of the model"),
    "fp8": ("FP8", "use a GPTQ checkpoint of the model"),
    "qqq": ("QQQ", "use a GPTQ checkpoint of the model"),
    "gptq_p": ("GPTQModel's planar gptq_p", "quantise again with format gptq"),
    "paroquant": ("ParoQuant", "use a GPTQ checkpoint of the model"),
    "ipex": ("IPEX-packed", "use the original GPTQ checkpoint"),
}
_FORMATS_V1 = {"gptq", "auto_round:auto_gptq", "auto_round:gptq", "autoround:auto_gptq"}


@dataclass(frozen=True)
class QuantConfig:
    """None: the files do not say."""

    source: str | None = None
    """the file the values came from; None: there is no quantisation config at all"""
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None
    zero_version: Literal[1, 2] | None = None
    mixed: bool = False
    """`dynamic` or `extra_config` overrides single modules, so bits and group size are only defaults"""


def read_quant_config(folder: Path) -> QuantConfig:
    """From quantize_config.json, quant_config.json or config.json's quantization_config, in this order.

    CheckpointError for other quantisation methods and formats, by name, and for files that are not JSON objects.
    """
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            return parse_quant_config(read_json(folder / name), str(folder / name))
    config = folder / "config.json"
    if config.is_file():
        inner = read_json(config).get("quantization_config")
        if isinstance(inner, dict):
            return parse_quant_config(inner, f"{config} (quantization_config)")
        if inner is not None:
            raise CheckpointError(
                f"{config}: quantization_config is a {type(inner).__name__} where an object is expected"
            )
    return QuantConfig()


def parse_quant_config(raw: dict[str, Any], source: str) -> QuantConfig:
    """Synonyms of five years (w_bit, q_group_size, format/checkpoint_format) in one place."""
    _refuse_other_methods(raw, source)
    form = _text(raw, source, "checkpoint_format") or _text(raw, source, "format") or ""
    packing = _text(raw, source, "packing_format") or ""
    version: Literal[1, 2] | None = None
    if form == "gptq_v2":
        version = 2
    elif form in _FORMATS_V1 or packing in _FORMATS_V1:
        version = 1
    pack_dtype = raw.get("pack_dtype")
    if pack_dtype not in (None, "int32"):
        raise CheckpointError(f"{source}: pack_dtype {pack_dtype!r} is not supported; quantise again with int32")
    return QuantConfig(
        source=source,
        bits=_number(raw, source, "bits", "w_bit"),
        group_size=_number(raw, source, "group_size", "q_group_size"),
        desc_act=_flag(raw, source, "desc_act"),
        sym=_flag(raw, source, "sym"),
        zero_version=version,
        mixed=bool(raw.get("dynamic")) or bool(raw.get("extra_config")),
    )


def _refuse_other_methods(raw: dict[str, Any], source: str) -> None:
    named = [_text(raw, source, key) for key in ("quant_method", "method", "checkpoint_format", "format")]
    if raw.get("is_marlin_format") is True:
        named.append("marlin")
    if raw.get("version") in ("gemm", "gemv", "gemv_fast") and "gptq" not in named:
        named.append("awq")
    for name in named:
        key = (name or "").lower()
        if key in _METHODS:
            what, remedy = _METHODS[key]
            raise CheckpointError(f"{source} says the checkpoint is {what}, not GPTQ; {remedy}")
    method = next((name for name in named[:2] if name), "gptq").lower()
    if method not in ("gptq", "gptq_v2", "auto-round", "autoround", "auto_round", "intel/auto-round"):
        raise CheckpointError(f"{source} names the quantisation method {method!r}; only GPTQ checkpoints are served")


def _text(raw: dict[str, Any], source: str, key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{source}: {key} is {value!r} where a string is expected")
    return value


def _number(raw: dict[str, Any], source: str, *keys: str) -> int | None:
    for key in keys:
        value = raw.get(key)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"{source}: {key} is {value!r} where an integer is expected")
            return value
    return None


def _flag(raw: dict[str, Any], source: str, key: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {value!r} where true or false is expected")
    return value
