"""transformers' model of a checkpoint's family with the checkpoint's weights, dequantized. The only module of the
package that imports transformers, and it does so when it is asked to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.checkpoint.dense import DequantizedCheckpoint
from gptq_api.checkpoint.files import read_json
from gptq_api.errors import UserError
from gptq_api.model.modules import config_of
from gptq_api.runner.backends import backend_of
from gptq_api.runner.memory import host_memory

_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
"""a Linear of transformers -> what a file may hold it in, and what stands there in which order"""


class VerifyError(UserError):
    """There is nothing to compare with: one sentence."""


class Reference:
    """The model in float32 (`dtype`: in 16 bits where memory does not hold that), on the device that ours is on."""

    def __init__(self, checkpoint: DequantizedCheckpoint, device: torch.device) -> None:
        """VerifyError where transformers has no such model, or memory does not hold it."""
        self.device = device
        config = _config(checkpoint)
        self.dtype = _dtype(checkpoint, device)
        self._model = _make(config, self.dtype, device)
        self._fill(checkpoint)

    def _fill(self, checkpoint: DequantizedCheckpoint) -> None:
        state = self._model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        tied = bool(config_of(checkpoint).ties_head(checkpoint.has("lm_head.weight")))
        for name, target in state.items():
            source = "model.embed_tokens.weight" if name == "lm_head.weight" and tied else name
            target.copy_(_tensor(checkpoint, source, shapes))

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """float32 [T, V] on the CPU, one row after each token."""
        found: Tensor = self._model(torch.tensor([token_ids], device=self.device), use_cache=False).logits[0]
        return found.float().cpu()

    def first_layer_not_finite(self, token_ids: list[int]) -> int | None:
        """The decoder layer after which the hidden state is not finite; None where all are."""
        with torch.inference_mode():
            ids = torch.tensor([token_ids], device=self.device)
            states = self._model(ids, use_cache=False, output_hidden_states=True).hidden_states
        return next((i for i, state in enumerate(states[1:]) if not bool(state.isfinite().all())), None)


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    raw = read_json(checkpoint.folder / "config.json")
    family = config_of(checkpoint).family.model_type
    for name in ("quantization_config", "model_type", "architectures", "torch_dtype", "dtype", "transformers_version"):
        raw.pop(name, None)
    if family == "internlm":  # whose own class is code that comes with a checkpoint
        bias = bool(raw.pop("bias", True))
        family, raw = "llama", raw | {"attention_bias": bias}
    try:
        return AutoConfig.for_model(family, **raw)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VerifyError(f"transformers makes no {family} of {checkpoint.folder}/config.json: {first}") from None


def _make(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        made: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation="eager"
        )
    return made.eval()


def _dtype(checkpoint: DequantizedCheckpoint, device: torch.device) -> torch.dtype:
    """float32 where there is room for it. VerifyError where there is none for 16 bits either."""
    config = config_of(checkpoint)
    layer = sum(math.prod(shape) for shape in _linear_shapes(checkpoint))
    count = layer + 2 * config.vocab_size * config.hidden_size
    room = torch.cuda.mem_get_info(device)[0] if backend_of(device).kind == "cuda" else host_memory()
    for dtype in (torch.float32, torch.bfloat16):
        if room is None or 1.15 * count * dtype.itemsize < room:
            return dtype
    raise VerifyError(
        f"transformers' model takes {2 * count / 2**30:.1f} GiB in 16 bits, and {(room or 0) / 2**30:.1f} GiB are free "
        f"on {device}; --device cpu, or a machine with more memory"
    )


def _linear_shapes(checkpoint: DequantizedCheckpoint) -> Iterator[tuple[int, int]]:
    for module in checkpoint.source.modules.values():
        yield module.out_features, module.in_features


def _tensor(checkpoint: DequantizedCheckpoint, name: str, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """By transformers' name, though the file may hold it as a part of another one, or leave out a bias of zeros."""
    if checkpoint.has(name):
        return checkpoint.tensor(name, shapes[name])
    module, _, kind = name.rpartition(".")
    parent, _, short = module.rpartition(".")
    if short in _FUSED:
        fused, parts = _FUSED[short]
        whole = f"{parent}.{fused}.{kind}"
        if checkpoint.has(whole):
            rows = [shapes[f"{parent}.{part}.{kind}"][0] for part in parts]
            at = parts.index(short)
            value = checkpoint.tensor(whole, (sum(rows), *shapes[name][1:]))
            return value[sum(rows[:at]) : sum(rows[: at + 1])]
    if kind == "bias":
        return torch.zeros(shapes[name])
    raise VerifyError(f"{checkpoint.folder} holds no {name}, which transformers' model needs; is the download whole?")
