"""From `--draft-model` to a `ModelDrafter`: what it has to be, its memory beside the served model's, what it costs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gptq_api.checkpoint.dense import open_dense
from gptq_api.errors import ConfigError
from gptq_api.model.config import LlamaConfig, read_config
from gptq_api.model.eagle import EagleConfig, check_head, is_head, read_head
from gptq_api.model.modules import config_of
from gptq_api.on_disk import is_there
from gptq_api.runner.drafter import DraftRunner, ModelDrafter
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import lone_step

_log = logging.getLogger(__name__)
MOST_PADDING = 1024
"""rows by which two vocabularies of the same tokens differ: they are filled up to a multiple of something"""
MAX_SEQS = 4
"""that are drafted for at once: of more, a row is worth more than a guess (`scheduler/speculation.py`)"""
_TIMED_ROWS = 16


@dataclass(frozen=True)
class DraftModel:
    """A checkpoint that may draft for the served one."""

    name: str
    checkpoint: Checkpoint
    config: LlamaConfig
    max_model_len: int
    head: EagleConfig | None = None
    """of an EAGLE-3 head, whose `config` is that of its layer"""

    @property
    def title(self) -> str:
        """For people."""
        return self.config.family.title if self.head is None else "EAGLE-3 head"


def checkpoint_path(name: str) -> Path:
    """A folder, or a file in one, or the model in the package."""
    if name == "demo":
        from gptq_api.demo import DEMO_PATH

        return Path(DEMO_PATH)
    return Path(name).expanduser()


def draft_path(options: LoadOptions) -> Path:
    """The folder that is meant. ConfigError where there is none."""
    assert options.draft_model is not None
    path = checkpoint_path(options.draft_model)
    if not path.exists():
        raise ConfigError(
            f"--draft-model {path} does not exist; name the folder of a small model with the served one's vocabulary"
        )
    return path


def open_draft(options: LoadOptions, served: LlamaConfig, max_model_len: int) -> DraftModel:
    """The checkpoint, its headers read. `max_model_len`: of the served model. ConfigError for what can not draft."""
    path = draft_path(options)
    folder = path if path.is_dir() else path.parent
    name = "demo" if options.draft_model == "demo" else path.name
    with refused_by_name(options):
        if is_there(folder / "config.json") and is_head(folder):
            head = read_head(folder, served.num_hidden_layers)
            _check_sizes(options, head, served)
            checkpoint = open_dense(folder, None if path == folder else path)
            check_head(checkpoint, head)
            length = min(max_model_len, head.llama.max_position_embeddings)
            return DraftModel(name, checkpoint, head.llama, length, head)
        checkpoint = _open(path)
        config = config_of(checkpoint)
    if abs(config.vocab_size - served.vocab_size) >= MOST_PADDING:
        raise ConfigError(
            f"--draft-model {options.draft_model} has a vocabulary of {config.vocab_size}, the served model of "
            f"{served.vocab_size}; it has to be of the same family, with the same tokens"
        )
    return DraftModel(name, checkpoint, config, min(max_model_len, config.max_position_embeddings))


def _check_sizes(options: LoadOptions, head: EagleConfig, served: LlamaConfig) -> None:
    for what, its, ours in (
        ("hidden_size", head.target_hidden_size, served.hidden_size),
        ("vocab_size", head.llama.vocab_size, served.vocab_size),
    ):
        if its != ours:
            raise ConfigError(
                f"--draft-model {options.draft_model} is an EAGLE-3 head for a model with {what} {its}, the served one "
                f"has {ours}; take the head that was made for this model"
            )


def vocabulary_sizes(options: LoadOptions) -> tuple[int, int] | None:
    """Rows of (the served model, the draft model). None where a config.json is wrong, which loading tells."""
    try:
        served, draft = (
            path if path.is_dir() else path.parent
            for path in (checkpoint_path(options.model_path), draft_path(options))
        )
        config = read_config(served)
        if is_there(draft / "config.json") and is_head(draft):
            return config.vocab_size, read_head(draft, config.num_hidden_layers).llama.vocab_size
        return config.vocab_size, read_config(draft).vocab_size
    except CheckpointError:
        return None


@contextmanager
def refused_by_name(options: LoadOptions) -> Iterator[None]:
    """What is wrong with a checkpoint is said of the setting that names it."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"--draft-model {options.draft_model}: {error}") from None


def _open(path: Path) -> Checkpoint:
    """Quantized to GPTQ or not at all."""
    folder = path if path.is_dir() else path.parent
    if not is_there(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json; copy it from the model the checkpoint was made of")
    try:
        return open_checkpoint(path)
    except CheckpointError as refusal:
        try:
            return open_dense(folder, None if path == folder else path)
        except CheckpointError:
            raise refusal from None


def draft_options(options: LoadOptions, max_rows: int) -> LoadOptions:
    """What loading the draft model is told: seats for few, steps of so many rows, one device. The size of the cache is
    the served model's, whatever these say."""
    return replace(
        options,
        max_model_len=None,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=max_rows,
        batch_invariant=False,
        tensor_parallel_size=1,
        draft_model=None,
    )


def head_options(options: LoadOptions, max_rows: int, dtype: torch.dtype) -> LoadOptions:
    """The same for an EAGLE-3 head, which computes in the served model's type: it reads what that one leaves."""
    name = str(dtype).removeprefix("torch.")
    return replace(draft_options(options, max_rows), dtype=name, lm_head_bits=16, packed_cache="off")


def make_drafter(runner: DraftRunner, served: LoadedRunner, max_rows: int, call_ms: float) -> ModelDrafter:
    """With its costs measured."""
    plain, one = _decode_ms(served), _decode_ms(runner, runner.ahead)
    row = _row_ms(runner, one)
    return ModelDrafter(
        runner,
        max_seqs=MAX_SEQS,
        max_rows=max_rows,
        step_cost=one / plain,
        row_cost=row / plain,
        call_cost=call_ms / plain,
    )


def no_drafts(options: LoadOptions, why: str) -> ConfigError:
    """The served model takes none."""
    return ConfigError(
        f"--draft-model {options.draft_model}: the served model computes several rows with other bits than one "
        f"({why}), so that drafts would change its tokens; leave it out"
    )


def described(draft: DraftModel, drafter: ModelDrafter, runner: DraftRunner, where: str) -> str:
    """For the log. `where`: beside which rank it is; empty where there is but one."""
    name = draft.name + where
    if draft.head is not None:
        return _head_described(name, draft.head, drafter, runner)
    bits = "/".join(str(b) for b in sorted({m.bits for m in draft.checkpoint.modules.values()}))
    short = "" if runner.max_model_len == draft.max_model_len else f" up to {runner.max_model_len} tokens"
    return (
        f"draft model {name}: {draft.config.family.title}, {f'{bits}-bit GPTQ' if bits else 'unquantized'}, "
        f"{runner.dtype}{short}; weights {runner.weight_bytes / 2**20:.0f} MiB, KV cache "
        f"{runner.cache_bytes / 2**20:.0f} MiB; a token of it takes {drafter.step_cost:.2f} of a step"
    )


def _head_described(name: str, head: EagleConfig, drafter: ModelDrafter, runner: DraftRunner) -> str:
    taps = ", ".join(map(str, head.taps))
    features = runner.num_blocks * runner.block_size * head.llama.hidden_size * getattr(torch, runner.dtype).itemsize
    return (
        f"draft model {name}: EAGLE-3 head for {head.draft_vocab_size} tokens, reads the stream before layers {taps}, "
        f"{runner.dtype}, up to {runner.max_model_len} tokens; weights {runner.weight_bytes / 2**20:.0f} MiB, KV cache "
        f"{runner.cache_bytes / 2**20:.0f} MiB, features {features / 2**20:.0f} MiB; a token of it takes "
        f"{drafter.step_cost:.2f} of a step"
    )


def _decode_ms(runner: LoadedRunner, ahead: int = 0) -> float:
    """A step of one row."""
    if runner.prompt_costs is not None:
        return runner.prompt_costs.decode_ms
    return min(_step_ms(runner, 1, ahead) for _ in range(2))


def _row_ms(runner: DraftRunner, decode_ms: float) -> float:
    """What a row of a prompt adds."""
    if runner.prompt_costs is not None:
        return runner.prompt_costs.row_ms
    rows = min(_TIMED_ROWS, runner.max_model_len - runner.ahead)
    return max(0.0, _step_ms(runner, rows, runner.ahead) - decode_ms) / max(1, rows - 1)


def _step_ms(runner: LoadedRunner, rows: int, ahead: int) -> float:
    step = lone_step(min(1, runner.vocab_size - 1), rows, runner.block_size, ahead)
    began = time.perf_counter()
    runner.collect(runner.launch(step))
    return 1e3 * (time.perf_counter() - began)
