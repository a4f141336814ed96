"""A loaded model becomes a runner on CUDA: what its kernels take, and who gets how much memory."""

from __future__ import annotations

import numpy as np
import torch

from gptq_api.config import Settings
from gptq_api.kernels import decode_attention, gemm, ops, prefill_attention
from gptq_api.model.cache_plan import cache_dtype, cache_memory, does_not_fit, plan_cache
from gptq_api.model.config import LlamaConfig
from gptq_api.model.cuda_cache import CudaKVCache
from gptq_api.model.cuda_inputs import StepInputs, StepShape, num_words, write_idle
from gptq_api.model.cuda_llama import CudaLlama
from gptq_api.model.cuda_runner import CudaRunner, state_bytes
from gptq_api.model.llama import Llama

_GRAPH_BYTES = 256 * 2**20
"""left free for captured graphs and for what libraries allocate late"""


def refusal(config: LlamaConfig, block_size: int) -> str | None:
    """Why the CUDA kernels do not serve such a model; None where they do."""
    for name, width in (
        ("hidden_size", config.hidden_size),
        ("width of all heads", config.num_attention_heads * config.head_dim),
    ):
        if width % 8 or width > ops.MAX_NORM_WIDTH:
            return f"{name} {width}; they take multiples of 8 up to {ops.MAX_NORM_WIDTH}"
    if config.head_dim not in decode_attention.HEAD_DIMS:
        return f"heads of {config.head_dim}; attention takes {', '.join(map(str, decode_attention.HEAD_DIMS))}"
    return gemm.unavailable_reason() or prefill_attention.refusal(config.head_dim, block_size)


def make_cuda_runner(
    settings: Settings, model: Llama, max_model_len: int, max_num_batched_tokens: int, dtype: torch.dtype
) -> CudaRunner:
    """For what `refusal` has nothing against. ConfigError where the memory does not suffice."""
    config, device, num_seqs = model.config, model.embedding.device, settings.max_num_seqs
    kv_dtype = cache_dtype(settings, device, dtype)
    try:
        before = torch.cuda.memory_allocated(device)
        cuda = CudaLlama(model, max(max_num_batched_tokens, num_seqs), num_seqs, max_model_len, dtype)
        transient = _largest_step(cuda, config, settings, max_num_batched_tokens, kv_dtype)
        state = state_bytes(num_seqs, max_num_batched_tokens, max_model_len, settings.block_size)
        workspace = torch.cuda.memory_allocated(device) - before + transient + state
        memory = cache_memory(settings, device, _GRAPH_BYTES + transient + state)
        num_blocks, max_model_len = plan_cache(settings, config, device, kv_dtype, max_model_len, memory)
        cache = CudaKVCache(config, num_blocks, settings.block_size, kv_dtype, device)
    except torch.cuda.OutOfMemoryError:
        raise does_not_fit(settings, device) from None
    runner = CudaRunner(cuda, cache, num_seqs, max_num_batched_tokens, max_model_len, workspace)
    runner.warm_up()
    return runner


@torch.inference_mode()
def _largest_step(
    model: CudaLlama, config: LlamaConfig, settings: Settings, num_rows: int, kv_dtype: torch.dtype
) -> int:
    """Bytes that the largest step allocates while it runs. A small one follows: between them they compile all that is
    compiled at first use."""
    num_seqs, device = settings.max_num_seqs, model.device
    history = torch.zeros(num_seqs, 1, dtype=torch.int32, device=device)
    cache = CudaKVCache(config, 1, settings.block_size, kv_dtype, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    tiles = num_rows // prefill_attention.TILE_ROWS + num_seqs
    for shape in (StepShape(num_rows, num_seqs, 1, tiles), StepShape(1, 1, 1, 1)):
        host = np.zeros(num_words(shape), np.int32)
        write_idle(StepInputs.over(host, shape))
        inputs = StepInputs.over(torch.from_numpy(host).to(device), shape)
        model.forward(inputs, history, cache.layers, decode=False)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
