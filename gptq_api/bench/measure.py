"""One row, measured through the runner that serves: `python -m gptq_api.bench.measure`, a Job on standard input, a Row
on standard output. A process each, so that memory is one model's; exit status 1 with a sentence on standard error."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn import functional

from gptq_api.bench.row import EXIT_NO_ROOM, EXIT_TOLD, Decoding, Job, Row, TooLargeError
from gptq_api.bench.synthetic import synthetic_checkpoint
from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gptq_api.checkpoint.dense import dequantized, open_dense
from gptq_api.checkpoint.summary import summarise
from gptq_api.errors import UserError
from gptq_api.model.config import LlamaConfig
from gptq_api.model.modules import config_of
from gptq_api.runner.backends import backend_of, resolve_device
from gptq_api.runner.load import make_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.memory import host_memory
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.samples import encode_documents, read_documents, spread, windows
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import SamplingParams

_LONGEST_WINDOW = 2048
_CHUNK = 512
"""tokens computed at once: logits of all of them are in memory"""
_WARM_UP = 4
_TOKENS, _FEW_TOKENS = 128, 32
_BATCHES = (1, 8, 64)
_FEW_STEPS = 32
"""of batches, whose steps are longer"""
_PATIENCE_S = 60.0
"""for one batch that nobody asked for"""
_LONG_STEP = 10**9
"""weights from which 64 sequences on a CPU take minutes"""
_BLOCK_SIZE = 16
_GREEDY = SamplingParams(max_tokens=1, temperature=0)


def measure(job: Job) -> Row:
    """Load, decode, predict. Raises UserError."""
    if job.synthetic is None:
        return _measure(job, *_open(job, Path(job.folder)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = synthetic_checkpoint(
            job.synthetic,
            Path(folder),
            group_size=job.group_size,
            act_order=job.act_order,
            dense=job.kind == "dense",
        )
        _check_room(job, checkpoint)
        return _measure(job, checkpoint, checkpoint)


def _on_cpu(device: torch.device) -> bool:
    return backend_of(device).kind == "cpu"


def _check_room(job: Job, checkpoint: Checkpoint) -> None:
    """Linux gives more than it has, and ends the process in the middle. TooLargeError."""
    room, store = host_memory(), checkpoint.store
    needed = sum(store.numel(name) * (2 if store.is_float(name) else 4) for name in store.names)
    if _on_cpu(resolve_device(job.device)) and room is not None and needed > room:
        raise TooLargeError(f"{job.name} takes {needed / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB of memory are free")


def _measure(job: Job, source: Checkpoint, checkpoint: Checkpoint) -> Row:
    """`source` is what is on disk, `checkpoint` what is to be run."""
    options = LoadOptions(
        model_path=job.folder,
        device=job.device,
        dtype=job.dtype,
        num_threads=job.num_threads,
        kv_cache_dtype=job.kv_cache_dtype,
        block_size=_BLOCK_SIZE,
        max_num_seqs=1,
        packed_cache="off",
    )
    device = resolve_device(options.device)
    started = time.monotonic()
    config = config_of(checkpoint)
    limit = config.max_position_embeddings
    window = job.context or min(_LONGEST_WINDOW, limit)
    prompt_tokens = job.prompt_tokens or max(1, min(_TOKENS, limit // 4))
    few = job.synthetic is not None and _on_cpu(device)
    num_tokens = job.num_tokens or min(_FEW_TOKENS if few else _TOKENS, max(1, limit - prompt_tokens - _WARM_UP))
    decoded = prompt_tokens + num_tokens + _WARM_UP
    longest = max(decoded, window if job.text else 0)
    if longest > limit:
        raise CheckpointError(
            f"{job.name} has a context of {limit} tokens, and {longest} are asked for; lower --context, "
            "--prompt-tokens or --num-tokens"
        )
    batches = sorted(set(job.batches or _batches(config, device, decoded)))
    num_blocks = max(-(-longest // _BLOCK_SIZE), max(batches) * -(-decoded // _BLOCK_SIZE))
    options = replace(options, num_blocks=num_blocks, max_num_seqs=max(batches))
    texts = _texts(job, checkpoint.folder, window, config.vocab_size)
    runner = make_runner(options, checkpoint, device)
    load_seconds = time.monotonic() - started
    decoding: list[Decoding] = []
    for batch in batches:
        began = time.monotonic()
        decoding.append(_decoding(runner, job, batch, prompt_tokens, num_tokens))
        if job.batches is None and 8 * (time.monotonic() - began) > _PATIENCE_S:
            break  # the next one takes eight times as long, where the work and not the weights take the time
    perplexity, predicted = _perplexity(runner, texts) if texts else (None, 0)
    bits, sizes, act_order = _quantization(source, job.kind)
    resident, peak = backend_of(device).memory_in_use(device)
    return Row(
        name=job.name,
        kind=job.kind,
        shape=[config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size],
        bits=bits,
        group_sizes=sizes,
        act_order=act_order,
        device=backend_of(device).device_name(device),
        dtype=runner.dtype,
        threads=job.num_threads,
        weights_mib=runner.weight_bytes / 2**20,
        resident_mib=resident / 2**20,
        peak_mib=peak / 2**20,
        load_seconds=load_seconds,
        seconds_per_token=decoding[0].seconds_per_step / decoding[0].batch,
        decoded_tokens=num_tokens,
        context_tokens=prompt_tokens,
        perplexity=perplexity,
        perplexity_tokens=predicted,
        window=window if job.text else None,
        repeats=job.repeats,
        decoding=decoding,
    )


def _open(job: Job, folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """(as it is on disk, as it is to be run)."""
    if job.kind == "dense":
        source = open_dense(folder)
        return source, source
    source = open_checkpoint(folder, None if job.ckpt is None else Path(job.ckpt))
    return source, dequantized(source) if job.kind == "dequantized" else source


def _texts(job: Job, folder: Path, window: int, num_rows: int) -> list[list[int]]:
    if job.text is None:
        return []
    path, tokenizer = Path(job.text), load_tokenizer(folder)
    documents = read_documents(path)
    chats = any(isinstance(document, list) for document in documents)
    template = load_chat_template(folder, tokenizer) if chats else None
    found = windows(encode_documents(documents, path, tokenizer, template, num_rows), window)
    return found if job.num_windows is None else spread(found, min(job.num_windows, len(found)))


def _batches(config: LlamaConfig, device: torch.device, num_tokens: int) -> list[int]:
    """1, 8 and 64, as far as their caches take no more than a quarter of the memory; 64 only where a step is short."""
    sequence = config.kv_elements_per_token * 4 * num_tokens
    on_cpu = _on_cpu(device)
    room = (host_memory() or 2**40) if on_cpu else torch.cuda.mem_get_info(device)[1]
    parameters = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    most = 8 if on_cpu and parameters > _LONG_STEP else 64
    return [batch for batch in _BATCHES if batch == 1 or (batch <= most and batch * sequence <= room // 4)]


def _solo(token_ids: list[int], num_tokens: int, seat: int = 0) -> Solo:
    """With a block table of its own: nobody else is in its part of the cache."""
    blocks = -(-num_tokens // _BLOCK_SIZE)
    return Solo(token_ids, _GREEDY, list(range(seat * blocks, (seat + 1) * blocks)), seat)


def _decoding(runner: LoadedRunner, job: Job, batch: int, prompt_tokens: int, num_tokens: int) -> Decoding:
    """Steps of a batch, sampling included; each repeat begins behind the same prompts, which are computed once."""
    steps = num_tokens if batch == 1 else min(num_tokens, _FEW_STEPS)
    total = prompt_tokens + steps + _WARM_UP
    prompts, first = [], []
    for seat in range(batch):
        prompts.append([(i + 131 * seat) * 7919 % runner.vocab_size for i in range(1, prompt_tokens + 1)])
        solo, found = _solo(prompts[-1], total, seat), []
        while solo.num_pending_tokens:
            found = runner.collect(runner.launch(step_of([solo], [min(_CHUNK, solo.num_pending_tokens)]))).tokens
        first += found
    repeats = [_steps(runner, job, prompts, first, steps) for _ in range(job.repeats)]
    medians = [statistics.median(seconds) for seconds in repeats]
    middle = statistics.median(itertools.chain(*repeats))
    return Decoding(batch, middle, (max(medians) - min(medians)) / middle)


def _steps(runner: LoadedRunner, job: Job, prompts: list[list[int]], first: list[int], num_tokens: int) -> list[float]:
    """Seconds of each step, without those that warm up; the prompts are in the cache, and `first` follows them."""
    total = len(prompts[0]) + num_tokens + _WARM_UP
    solos = [_solo(list(prompt), total, seat) for seat, prompt in enumerate(prompts)]
    for solo in solos:
        solo.num_computed_tokens = len(solo.token_ids)
    tokens, times = first, []
    launched: deque[Any] = deque()
    for step in range(num_tokens + _WARM_UP):
        if step == 0 or not runner.lookahead:
            _append(solos, tokens, job)
        # A runner that looks ahead has the token before we do, as in the engine.
        launched.append(runner.launch(step_of(solos, [1] * len(solos))))
        if len(launched) > runner.lookahead:
            tokens = runner.collect(launched.popleft()).tokens
            times.append(time.perf_counter())
            if runner.lookahead:
                _append(solos, tokens, job)
    while launched:
        runner.collect(launched.popleft())
    return [b - a for a, b in itertools.pairwise(times[_WARM_UP - 1 :])]


def _append(solos: list[Solo], tokens: list[int], job: Job) -> None:
    if min(tokens) < 0:
        raise CheckpointError(f"{job.name}: the logits are not finite; the weights are corrupt")
    for solo, token in zip(solos, tokens, strict=True):
        solo.token_ids.append(token)


def _perplexity(runner: LoadedRunner, texts: list[list[int]]) -> tuple[float, int]:
    """(exp of the mean negative log-likelihood of every token but the windows' first, number of these tokens)."""
    total, num = 0.0, 0
    for ids in texts:
        solo = _solo(ids, len(ids))
        while solo.num_pending_tokens:
            start = solo.num_computed_tokens
            logits, _ = runner.logits(step_of([solo], [min(_CHUNK, len(ids) - start)]), every_row=True)
            targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)], device=logits.device)
            total += float(functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
        num += len(ids) - 1
    return math.exp(min(total / num, 700.0)), num


def _quantization(source: Checkpoint, kind: str) -> tuple[list[int], list[int], str]:
    if kind != "gptq":
        return [], [], "no"
    summary = summarise(source)
    count, total = summary.num_act_order, summary.num_modules
    act_order = "yes" if count == total else "no" if count == 0 else f"{count} of {total}"
    return sorted(summary.bits), sorted(summary.group_sizes), act_order


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        row = measure(job)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_NO_ROOM if isinstance(error, TooLargeError) else EXIT_TOLD
    except MemoryError:
        print("there is not enough memory for this model", file=sys.stderr)
        return EXIT_TOLD
    sys.stdout.buffer.write(msgspec.json.encode(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
