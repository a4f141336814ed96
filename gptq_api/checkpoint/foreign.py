"""What a set of tensors is when it is not GPTQ: other quantizations by the names, types and shapes they leave."""

from __future__ import annotations

import torch

from gptq_api.checkpoint.tensors import TensorStore

_GPTQ_INSTEAD = "use a GPTQ one of the model"
_ENDINGS = {
    ".weight_packed": "a compressed-tensors checkpoint (llm-compressor); use one written by GPTQModel or AutoGPTQ",
    ".weight_g_idx": "a compressed-tensors checkpoint (llm-compressor); use one written by GPTQModel or AutoGPTQ",
    ".weight_zero_point": "a compressed-tensors checkpoint (llm-compressor); use one written by GPTQModel or AutoGPTQ",
    ".q_weight": f"an EXL2 checkpoint (exllamav2); {_GPTQ_INSTEAD}",
    ".trellis": f"an EXL3 checkpoint (exllamav3); {_GPTQ_INSTEAD}",
    ".s_channel": f"a QQQ checkpoint; {_GPTQ_INSTEAD}",
    ".B": "a Marlin-packed checkpoint; use the GPTQ checkpoint it was repacked from",
    ".B_24": "a Marlin-packed checkpoint (2:4 sparse); use a dense GPTQ one of the model",
    ".weight.absmax": f"a bitsandbytes checkpoint; {_GPTQ_INSTEAD}",
    ".SCB": f"a bitsandbytes checkpoint; {_GPTQ_INSTEAD}",
    ".W_q": f"an HQQ checkpoint; {_GPTQ_INSTEAD}",
    ".codebooks": f"an AQLM checkpoint; {_GPTQ_INSTEAD}",
    ".Qidxs": f"a QuIP# checkpoint; {_GPTQ_INSTEAD}",
    ".lookup_table": f"a SqueezeLLM checkpoint; {_GPTQ_INSTEAD}",
    ".weight_scale_2": f"an NVFP4 checkpoint (ModelOpt); {_GPTQ_INSTEAD}",
    ".weight_scale_inv": f"an FP8 checkpoint; {_GPTQ_INSTEAD}",
    ".weight_scale": f"an FP8 or INT8 checkpoint; {_GPTQ_INSTEAD}",
    ".lora_A.weight": "a LoRA adapter, not a model; merge it into its base model and quantize that",
}


def foreign_checkpoint(store: TensorStore) -> str:
    """A sentence about a checkpoint without GPTQ tensors."""
    file = store.weights.files[0]
    names = sorted(store.names)
    for ending, what in _ENDINGS.items():
        for name in names:
            if name.endswith(ending):
                return f"{file}: tensor {name} belongs to {what}"
    for name in names:
        if name.endswith(".weight") and store.dtype_name(name).startswith("F8"):
            return f"{file}: tensor {name} belongs to an FP8 checkpoint; {_GPTQ_INSTEAD}"
    if any(name.endswith(".weight") for name in names):
        return (
            f"{file} holds no quantized tensors (an FP16/BF16 model?); use a GPTQ checkpoint of the model, or make "
            "one with gptq-api quantize"
        )
    return f"{file} holds no GPTQ tensors (*.qweight); use a GPTQ checkpoint of the model"


def foreign_module(store: TensorStore, module: str) -> str | None:
    """The rest of a sentence about `<module>.qweight` where it is another format's; None where nothing says so."""
    if f"{module}.lookup_table" in store:
        return f"has a lookup_table beside it: a SqueezeLLM checkpoint; {_GPTQ_INSTEAD}"
    dtype = store.dtype(f"{module}.qweight")
    if dtype == torch.int8 and f"{module}.zeros" in store:
        return "is int8 with zeros beside it: a BitBLAS checkpoint; use the GPTQ checkpoint it was repacked from"
    if any(f"{module}.{part}" not in store for part in ("qzeros", "scales")):
        return None
    qweight, qzeros, scales = (store.shape(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
    if not len(qweight) == len(qzeros) == len(scales) == 2 or qweight[1] == scales[1]:
        return None
    gemm = qweight[1] == qzeros[1] and scales[1] == 8 * qweight[1] and qzeros[0] == scales[0]
    gemv = qweight[0] == qzeros[0] == scales[0] and scales[1] == 8 * qzeros[1]
    if gemm or gemv or (dtype == torch.int16 and qzeros == scales):
        return f"is packed along the other axis: an AWQ checkpoint; {_GPTQ_INSTEAD}"
    return None
