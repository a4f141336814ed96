"""A checkpoint becomes a runner on one of the devices there are."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, Expected, open_checkpoint
from gptq_api.checkpoint.identity import Identity, identity
from gptq_api.checkpoint.safetensors_file import system_error
from gptq_api.errors import ConfigError
from gptq_api.model.config import LlamaConfig
from gptq_api.model.eagle import check_head, load_head
from gptq_api.model.loader import LoadReport, load_llama
from gptq_api.model.modules import config_of
from gptq_api.model.plan import plan_serving
from gptq_api.model.shard import WHOLE, Shard
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.backends import RunnerBackend, choose_backend, resolve_device
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.cores import allowed_cpus, num_cores, numa_note
from gptq_api.runner.cuda.backend import refusal
from gptq_api.runner.draft_model import (
    DraftModel,
    checkpoint_path,
    described,
    draft_options,
    head_options,
    make_drafter,
    no_drafts,
    open_draft,
    refused_by_name,
)
from gptq_api.runner.drafter import DraftRunner
from gptq_api.runner.facts import model_facts
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.memory import NOTHING_BESIDE, Beside, longest_text
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.parallel import ParallelRunner, rank_devices
from gptq_api.runner.ranks import RankGroup
from gptq_api.runner.solo import lone_step

_log = logging.getLogger(__name__)
_SMALL_MODEL_BYTES = 64 * 2**20


def load_runner(options: LoadOptions) -> LoadedRunner:
    """Load the checkpoint the options name and make it ready to step.

    CheckpointError for what is wrong with the checkpoint, ConfigError for options that do not fit it or the machine.
    """
    device = resolve_device(options.device)
    return make_runner(options, open_model(options), device)


def open_model(options: LoadOptions) -> Checkpoint:
    """The checkpoint, its headers read, as the options name and expect it."""
    expected = Expected(options.gptq_wbits, options.gptq_groupsize, options.gptq_act_order)
    return open_checkpoint(checkpoint_path(options.model_path), options.gptq_ckpt, expected)


def identify(options: LoadOptions) -> Identity:
    """Which checkpoint the options name. CheckpointError where there is none."""
    return identity(checkpoint_path(options.model_path), options.gptq_ckpt)


def make_runner(options: LoadOptions, checkpoint: Checkpoint, device: torch.device) -> LoadedRunner:
    """`load_runner` for a checkpoint that is open, quantized or not."""
    started = time.monotonic()
    threads = 1
    if device.type == "cpu":
        # Each rank is a thread of its own.
        threads = 1 if options.tensor_parallel_size > 1 else options.num_threads or _default_threads(checkpoint)
        torch.set_num_threads(threads)
        native.use_threads(threads)
    config = config_of(checkpoint)
    runner: LoadedRunner
    if options.tensor_parallel_size > 1:
        runner, report, draft = load_ranks(options, checkpoint, config, rank_devices(options, config, device))
    else:
        backend = choose_backend(options, checkpoint, config, device)
        backend.cache_dtype(options.kv_cache_dtype)  # a refusal comes before the weights are read
        max_model_len = longest_text(options, config)
        draft = None if options.draft_model is None else Draft.opened(options, config, backend, max_model_len)
        runner, report = _loaded(options, checkpoint, config, backend, draft)
    for warning in report.warnings:
        _log.warning("%s", warning)
    _self_check(runner, checkpoint)
    if options.tensor_parallel_size == 1:
        backend.keep()
    name = "demo" if options.model_path == "demo" else checkpoint_path(options.model_path).name
    facts = _described(checkpoint, config, report, runner)
    if draft is not None:
        facts += f"; {draft.put_beside(runner)}"
    seconds = time.monotonic() - started
    if device.type == "cpu" and threads > 1 and (note := numa_note(allowed_cpus())):
        facts += f"; {note}"
    packed = ", as packed by an earlier start" if report.num_kept == sum(report.kernels.values()) else ""
    runner.facts = model_facts(checkpoint, config, report, runner)
    runner.description = f"{name}: {facts}; loaded in {seconds:.1f} s{packed}"
    return runner


def load_ranks(
    options: LoadOptions, checkpoint: Checkpoint, config: LlamaConfig, devices: list[torch.device]
) -> tuple[ParallelRunner, LoadReport, Draft | None]:
    """The model on several devices: each rank's thread reads and loads its own shard, all at the same time. Beside the
    first is the draft model, where there is one, on its way."""
    group = RankGroup(len(devices))
    # Refusals come before the weights are read.
    backends = [
        choose_backend(options, checkpoint, config, device, rank=rank)
        for device, rank in zip(devices, group.ranks, strict=True)
    ]
    backends[0].cache_dtype(options.kv_cache_dtype)
    draft = None
    if options.draft_model is not None:
        draft = Draft.opened(options, config, backends[0], longest_text(options, config))

    def load(rank: int) -> tuple[LoadedRunner, LoadReport]:
        if devices[rank].type == "cuda":
            torch.cuda.set_device(devices[rank])
        beside = draft if rank == 0 else None
        return _loaded(options, checkpoint, config, backends[rank], beside, group.ranks[rank].shard)

    loaded = group.run(load)
    # What one of them alone has seen is said as well.
    warnings = tuple(dict.fromkeys(warning for _, report in loaded for warning in report.warnings))
    report = replace(loaded[0][1], warnings=warnings)
    return ParallelRunner(group, [runner for runner, _ in loaded]), report, draft


def _loaded(
    options: LoadOptions,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    backend: RunnerBackend,
    draft: Draft | None,
    shard: Shard = WHOLE,
) -> tuple[LoadedRunner, LoadReport]:
    """On one device, with room for the draft model."""
    max_model_len = longest_text(options, config)
    with _enough_memory(checkpoint):
        weights, report = load_llama(checkpoint, config, max_model_len, backend, shard)
    beside = NOTHING_BESIDE if draft is None else draft.load(weights)
    return backend.runner(weights, options, max_model_len, beside), report


@contextmanager
def _enough_memory(checkpoint: Checkpoint) -> Iterator[None]:
    """The host's memory refused in the middle of loading is told as what it is, with what was being loaded."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        refused = system_error(error)
        if refused is None or refused.errno != errno.ENOMEM:
            raise
        size = sum(file.stat().st_size for file in checkpoint.files) / 2**20
        raise CheckpointError(
            f"{checkpoint.files[0]}: there is not enough memory to load its {size:.0f} MiB of weights; free some, "
            "raise the limit this process runs under (ulimit -v), or serve a smaller model"
        ) from None


class Draft:
    """A draft model on its way."""

    def __init__(self, options: LoadOptions, draft: DraftModel, backend: RunnerBackend) -> None:
        self.model, self.backend, self._options = draft, backend, options
        self._make: Callable[[LoadedRunner], DraftRunner] | None = None

    @classmethod
    def opened(cls, options: LoadOptions, served: LlamaConfig, backend: RunnerBackend, max_model_len: int) -> Draft:
        """ConfigError where it can not draft for the served model, which `backend` runs."""
        device = backend.device
        if backend.kind != device.type:
            raise no_drafts(options, "it runs in torch on CUDA")
        draft = open_draft(options, served, max_model_len)
        own = draft_options(options, backend.draft_rows)
        if draft.head is not None:
            own = head_options(options, backend.draft_rows, backend.dtype)
        reason = refusal(draft.config, options.block_size) if device.type == "cuda" else None
        if reason is not None:
            raise ConfigError(
                f"--draft-model {options.draft_model}: the CUDA kernels do not serve it ({reason}); use another one"
            )
        return cls(options, draft, choose_backend(own, draft.checkpoint, draft.config, device, drafts=True))

    @property
    def token_bytes(self) -> int:
        """Of its cache, and of features."""
        config, kv_type = self.model.config, self.backend.cache_dtype(self._options.kv_cache_dtype)
        features = 0 if self.model.head is None else config.hidden_size * self.backend.dtype.itemsize
        return config.kv_elements_per_token * kv_type.itemsize + features

    @property
    def weight_bytes(self) -> int:
        """From the headers. CheckpointError where a tensor is missing or misshapen."""
        draft = self.model
        if draft.head is not None:
            return check_head(draft.checkpoint, draft.head)
        return plan_serving(draft.checkpoint, draft.config, self.backend).weight_bytes

    def load(self, served: LlamaWeights) -> Beside:
        """Its weights; what it will take beside the served model's cache. `served`: whose embedding a head may read."""
        draft, own = self.model, draft_options(self._options, self.backend.draft_rows)
        if draft.head is not None:
            with refused_by_name(self._options), _enough_memory(draft.checkpoint):
                head = load_head(draft.checkpoint, draft.head, served, draft.max_model_len, self.backend)
            beside, self._make = self.backend.head_runner(head, own, draft.max_model_len)
            return beside
        with refused_by_name(self._options), _enough_memory(draft.checkpoint):
            weights, report = load_llama(draft.checkpoint, draft.config, draft.max_model_len, self.backend)
        for warning in report.warnings:
            _log.warning("draft model: %s", warning)
        beside, self._make = self.backend.draft_runner(weights, own, draft.max_model_len)
        return beside

    def put_beside(self, served: LoadedRunner) -> str:
        """Let it draft; a sentence for the log."""
        assert self._make is not None
        if not served.max_draft_rows:
            raise no_drafts(self._options, "cuBLAS multiplies by a part of its weights")
        ranks = served.ranks if isinstance(served, ParallelRunner) else []
        runner = self._make(ranks[0] if ranks else served)
        with refused_by_name(self._options):
            _self_check(runner, self.model.checkpoint, runner.ahead)
        self.backend.keep()
        drafter = make_drafter(runner, served, self.backend.draft_rows, self.backend.draft_call_ms)
        served.drafter = drafter
        return described(self.model, drafter, runner, " beside rank 0" if ranks else "")


def _default_threads(checkpoint: Checkpoint) -> int:
    """All physical cores, but one for a model whose step is milliseconds: it would gain less than a factor of two alone
    on the machine, and lose a factor of ten where its threads wait at every barrier for a core that the API process has
    (measured)."""
    packed = sum(m.in_features * m.out_features * m.bits // 8 for m in checkpoint.modules.values())
    return 1 if packed < _SMALL_MODEL_BYTES else num_cores(allowed_cpus())


def _self_check(runner: LoadedRunner, checkpoint: Checkpoint, ahead: int = 0) -> None:
    """One token through the whole model: warms it up, and a broken file is told here and not in the answers. `ahead`:
    of a draft model's runner."""
    step = lone_step(min(1, runner.vocab_size - 1), 1, runner.block_size, ahead)
    if runner.collect(runner.launch(step)).tokens == [-1]:
        raise CheckpointError(f"{checkpoint.files[0]}: the logits of one token are not finite; the weights are corrupt")


def _described(checkpoint: Checkpoint, config: LlamaConfig, report: LoadReport, runner: LoadedRunner) -> str:
    bits = "/".join(str(b) for b in sorted({m.bits for m in checkpoint.modules.values()}))
    kernels = ", ".join(f"{count} x {name}" for name, count in report.kernels.items())
    workspace = f", workspace {runner.workspace_bytes / 2**20:.0f} MiB" if runner.workspace_bytes else ""
    return (
        f"{config.family.title}, {bits}-bit GPTQ ({checkpoint.layout}), {runner.dtype}; {kernels}; "
        f"weights {runner.weight_bytes / 2**20:.0f} MiB, KV cache {runner.cache_bytes / 2**20:.0f} MiB "
        f"({runner.num_blocks * runner.block_size} tokens){workspace}{_of_ranks(runner)}"
    )


def _of_ranks(runner: LoadedRunner) -> str:
    """What stands where, and what is left there."""
    if not isinstance(runner, ParallelRunner):
        return _in_use(torch.device(runner.device))
    parts = [
        f"rank {rank} on {one.device}: weights {one.weight_bytes / 2**20:.0f} MiB, KV cache "
        f"{one.cache_bytes / 2**20:.0f} MiB{_in_use(torch.device(one.device)).replace(';', ',')}"
        for rank, one in enumerate(runner.ranks)
    ]
    return "; " + "; ".join(parts)


def _in_use(device: torch.device) -> str:
    """What is not in that sum as well: CUDA itself, its kernels, graphs, and other processes."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; {(total - free) / 2**20:.0f} of the GPU's {total / 2**20:.0f} MiB in use"
