"""A step in, sampled tokens out; and how a checkpoint becomes a runner."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, Expected, open_checkpoint
from gptq_api.config import BenchSettings, ConfigError, QuantizeSettings, Settings
from gptq_api.layers.attention import KVCache, Span, plan_attention
from gptq_api.layers.sampler import sample
from gptq_api.layers.seats import Seat, Seats
from gptq_api.model import cuda_load
from gptq_api.model.cache_plan import cache_dtype, cache_memory, does_not_fit, plan_cache
from gptq_api.model.config import LlamaConfig, read_config
from gptq_api.model.llama import Llama
from gptq_api.model.loaded import LoadedRunner
from gptq_api.model.loader import LoadReport, load_llama
from gptq_api.model.solo import Solo, step_of
from gptq_api.step import Sampled, Step
from gptq_api.types import SamplingParams

_log = logging.getLogger(__name__)
_SMALL_MODEL_BYTES = 64 * 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """A loaded model and its KV cache. Not thread-safe: one caller steps it."""

    lookahead = 0
    row_multiple = 1

    def __init__(self, model: Llama, cache: KVCache, max_model_len: int, dtype: torch.dtype) -> None:
        self._model, self._cache, self._seats = model, cache, Seats()
        self._queries_per_kv = model.config.num_attention_heads // model.config.num_key_value_heads
        self.max_model_len = max_model_len
        self.vocab_size = model.config.vocab_size
        self.block_size = cache.block_size
        self.num_blocks, self.cache_bytes = cache.num_blocks, cache.num_bytes
        self.device = str(model.embedding.device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.weight_bytes, self.workspace_bytes = model.num_bytes, 0
        self.eos_token_ids = model.config.eos_token_ids
        self.description = ""

    @torch.inference_mode()
    def launch(self, step: Step) -> Sampled:
        """Compute the step's new tokens and sample where it says so. On the CPU all is done when it returns.

        K and V of all new tokens are written in each layer before attention reads, so sequences of one step may share
        blocks that are filled in it. Token ids must be below vocab_size and block tables long enough.
        """
        seats = self._seats.take_in(step)
        if not any(step.num_sampled):
            if seats:
                self._forward(step, seats)
            return Sampled([0] * len(seats), [])
        logits, sampling = self._forward(step, seats)
        tokens, logprobs = sample(logits, [seats[i] for i in sampling])
        for i, token in zip(sampling, tokens, strict=True):
            seats[i].token_ids.append(max(token, 0))
            if token < 0:
                self._cache.scrub(seats[i].block_table)
        found = {place: logprob for place, logprob in enumerate(logprobs) if logprob is not None}
        return Sampled(step.num_sampled, tokens, found)

    def collect(self, launched: Sampled) -> Sampled:
        """What a launched step sampled."""
        return launched

    @torch.inference_mode()
    def logits(self, step: Step, every_row: bool = False) -> tuple[Tensor, list[int]]:
        """Run the model without sampling: (float32 [S, V], the entries of the S sequences that would sample).

        With `every_row`, the rows of all new tokens in the step's order; for evaluation.
        """
        return self._forward(step, self._seats.take_in(step), every_row)

    def _forward(self, step: Step, seats: list[Seat], every_row: bool = False) -> tuple[Tensor, list[int]]:
        assert max(step.num_sampled) <= 1, "drafted tokens are for runners that draft"
        spans = [
            Span(start, n, seat.block_table)
            for seat, start, n in zip(seats, step.num_computed, step.num_new, strict=True)
        ]
        plan = plan_attention(spans, self._cache, self._queries_per_kv, self._model.windows)
        ids: list[int] = []
        last_row: dict[int, int] = {}
        first_row: dict[int, int] = {}
        for i in plan.order:
            start, n = spans[i].num_computed, spans[i].num_tokens
            first_row[i] = len(ids)
            ids.extend(seats[i].token_ids[start : start + n])
            if step.num_sampled[i]:
                last_row[i] = len(ids) - 1
        sampling = sorted(last_row)
        if every_row:
            wanted = [first_row[i] + k for i in range(len(spans)) for k in range(spans[i].num_tokens)]
        else:
            wanted = [last_row[i] for i in sampling]
        device = self._model.embedding.device
        rows = torch.tensor(wanted, dtype=torch.int64).to(device) if wanted else None
        token_ids_tensor = torch.tensor(ids, dtype=torch.int64).to(device)
        return self._model.forward(token_ids_tensor, self._cache, plan, rows), sampling


def load_runner(settings: Settings) -> LoadedRunner:
    """Load the checkpoint the settings name and make it ready to step.

    CheckpointError for what is wrong with the checkpoint, ConfigError for settings that do not fit it or the machine;
    both are ValueErrors with one sentence for the user.
    """
    device = resolve_device(settings)
    expected = Expected(settings.gptq_wbits, settings.gptq_groupsize, settings.gptq_act_order)
    return make_runner(settings, open_checkpoint(model_path(settings), settings.gptq_ckpt, expected), device)


def make_runner(settings: Settings, checkpoint: Checkpoint, device: torch.device) -> LoadedRunner:
    """`load_runner` for a checkpoint that is open, quantized or not."""
    started = time.monotonic()
    if device.type == "cpu":
        torch.set_num_threads(settings.num_threads or _default_threads(checkpoint))
    config = read_config(checkpoint.folder)
    dtype = resolve_dtype(settings, device, checkpoint)
    if device.type == "cuda" and dtype != torch.float32:
        reason = cuda_load.refusal(config, settings.block_size)
        if reason is not None:
            _log.warning("the CUDA kernels do not serve this: %s. It runs slowly, in float32", reason)
            dtype = torch.float32
    cache_dtype(settings, device, dtype)  # a refusal comes before the weights are read
    max_model_len = settings.max_model_len or config.max_position_embeddings
    model, report = load_llama(checkpoint, config, max_model_len, device, dtype)
    runner: LoadedRunner
    if device.type == "cuda" and dtype != torch.float32:
        runner = cuda_load.make_cuda_runner(settings, model, max_model_len, token_budget(settings, device), dtype)
    else:
        cache, max_model_len = _allocate_cache(settings, config, device, dtype, max_model_len)
        runner = ModelRunner(model, cache, max_model_len, dtype)
    for warning in report.warnings:
        _log.warning("%s", warning)
    _self_check(runner, checkpoint)
    name = "demo" if settings.model_path == "demo" else model_path(settings).name
    seconds = time.monotonic() - started
    runner.description = f"{name}: {_described(checkpoint, config, report, runner)}; loaded in {seconds:.1f} s"
    return runner


def _default_threads(checkpoint: Checkpoint) -> int:
    """All cores, but one for a model whose step is milliseconds: it would gain less than a factor of two alone on the
    machine, and lose a factor of ten where its threads wait at every barrier for a core that the API process has
    (measured)."""
    packed = sum(m.in_features * m.out_features * m.bits // 8 for m in checkpoint.modules.values())
    return 1 if packed < _SMALL_MODEL_BYTES else len(os.sched_getaffinity(0))


def token_budget(settings: Settings, device: torch.device) -> int:
    """Tokens computed in one step."""
    return settings.max_num_batched_tokens or (512 if device.type == "cpu" else 2048)


def model_path(settings: Settings) -> Path:
    """The checkpoint folder the settings mean."""
    if settings.model_path == "demo":
        from gptq_api.demo import DEMO_PATH

        return Path(DEMO_PATH)
    return Path(settings.model_path).expanduser()


def resolve_dtype(settings: Settings, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is bfloat16 on the CPU and the checkpoint's own half type on CUDA. float16 is refused on the CPU."""
    if device.type == "cpu" and settings.dtype == "float16":
        raise ConfigError("--dtype float16 has no fast product on the CPU; use bfloat16 (fast) or float32 (exact)")
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    if device.type == "cpu":
        return torch.bfloat16
    return checkpoint.float_dtype if checkpoint.float_dtype != torch.float32 else torch.float16


def resolve_device(settings: Settings | QuantizeSettings | BenchSettings) -> torch.device:
    """`auto` is the first CUDA device where there is one. ConfigError where CUDA was asked for and is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is available to torch; use --device cpu")
    wants_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if wants_cuda else torch.device("cpu")


def _allocate_cache(
    settings: Settings, config: LlamaConfig, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> tuple[KVCache, int]:
    """(cache, max_model_len it serves)."""
    memory = cache_memory(settings, device, 0)
    num_blocks, max_model_len = plan_cache(settings, config, device, dtype, max_model_len, memory)
    size = settings.block_size
    shape = (config.num_hidden_layers, num_blocks, size, config.num_key_value_heads, config.head_dim)
    try:
        return KVCache(*shape, dtype, device), max_model_len
    except (RuntimeError, OSError):
        raise does_not_fit(settings, device) from None


def _self_check(runner: LoadedRunner, checkpoint: Checkpoint) -> None:
    """One token through the whole model: warms it up, and a broken file is told here and not in the answers."""
    token = min(1, runner.vocab_size - 1)
    step = step_of([Solo([token], SamplingParams(max_tokens=1, temperature=0), [0])], [1])
    if runner.collect(runner.launch(step)).tokens == [-1]:
        raise CheckpointError(f"{checkpoint.files[0]}: the logits of one token are not finite; the weights are corrupt")


def _described(checkpoint: Checkpoint, config: LlamaConfig, report: LoadReport, runner: LoadedRunner) -> str:
    bits = "/".join(str(b) for b in sorted({m.bits for m in checkpoint.modules.values()}))
    paths = ", ".join(f"{count} x {name}" for name, count in report.paths.items())
    workspace = f", workspace {runner.workspace_bytes / 2**20:.0f} MiB" if runner.workspace_bytes else ""
    return (
        f"{config.family.title}, {bits}-bit GPTQ ({checkpoint.layout}), {runner.dtype}; {paths}; "
        f"weights {runner.weight_bytes / 2**20:.0f} MiB, KV cache {runner.cache_bytes / 2**20:.0f} MiB "
        f"({runner.num_blocks * runner.block_size} tokens){workspace}"
    )
