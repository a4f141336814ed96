"""Several ranks on CUDA: exchanges bring every word, and answers have the bits of one GPU. Where there is one GPU only,
the ranks share it, as far as that goes: what waits for one rank must not hold what the other needs. So kernels may not
begin beside the end of those before them, blocks that wait are few, and no graph of many rows is captured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_api.kernels import gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ranks that share a GPU take turns by kernels")
ROOT = Path(__file__).parents[3]

EXCHANGES = """
import random, sys, threading
import torch
from gptq_api.kernels import exchange as kernels, ops
from gptq_api.kernels.exchange import Exchange
from gptq_api.model.shard import Shard
from gptq_api.runner.ranks import RankGroup

size, rounds, through_host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "through the host"
kernels.STAGE = 1 << 19  # many rows go in several pieces
group = RankGroup(size)
devices = [rank % torch.cuda.device_count() for rank in range(size)]
generator = torch.Generator().manual_seed(1)
WIDTHS = {"x": (528, torch.float16, 16), "wide": (7 * 4096, torch.bfloat16, 16), "logits": (4099, torch.float32, 16)}
inputs = {
    name: torch.randn(4, 96, width, generator=generator).to(dtype) for name, (width, dtype, unit) in WIDTHS.items()
}
order = torch.randperm(528, generator=generator).to(torch.int32)
plan = random.Random(3)
steps = [(plan.choice(list(WIDTHS)), plan.choice([1, 2, 7, 8, 33, 96]), plan.randrange(4), plan.random() < 0.5)
         for _ in range(rounds)]

def work(rank):
    torch.cuda.set_device(devices[rank])
    exchange = Exchange(rank, size, group.ranks[rank].each, through_host)
    stream, delays = torch.cuda.Stream(), random.Random(rank)
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    with torch.cuda.stream(stream):
        places, mine, whole = {}, {}, {}
        for name, (width, dtype, unit) in WIDTHS.items():
            parts = [Shard(r, size).of(width, unit) for r in range(size)]
            places[name] = exchange.place(torch.zeros(96, width, dtype=dtype, device="cuda"), parts)
            whole[name] = inputs[name].cuda()
            mine[name] = whole[name][:, :, parts[rank].start:parts[rank].stop].contiguous()
        index, weight, normed = order.cuda(), whole["x"][0, 0].contiguous(), torch.zeros_like(whole["x"][0])
        columns_of_x = slice(places["x"].columns[rank].start, places["x"].columns[rank].stop)
        torch.cuda.synchronize()
        exchange.go_live()
        for name, rows, which, in_place in steps:
            if delays.random() < 0.1:
                torch.cuda._sleep(delays.randrange(200_000))
            place, part = places[name], mine[name][which, :rows]
            expected = whole[name][which, :rows]
            if name == "x" and not in_place and exchange.takes_index(place, rows):
                got = exchange.all_gather(place, part, index)[:, index.long()]
            else:
                if in_place:
                    columns = place.columns[rank]
                    target = place.own[:rows, columns.start:columns.stop]
                    part = target.copy_(part)
                got = exchange.all_gather(place, part)
            wrong += (got.view(torch.int16) != expected.view(torch.int16)).sum()
            if name == "x":
                part = places["x"].own[:rows, columns_of_x]
                part.copy_(mine["x"][(which + 1) % 4, :rows])
                perm = index if in_place else None
                got = exchange.all_gather_norm(places["x"], rows, weight, 1e-5, normed[:rows], perm)
                stream_now = whole["x"][(which + 1) % 4, :rows]
                expected = ops.rms_norm(stream_now, weight, 1e-5, torch.empty_like(stream_now), perm)
                wrong += (got.view(torch.int16) != expected.view(torch.int16)).sum()
                wrong += (places["x"].own[:rows].view(torch.int16) != stream_now.view(torch.int16)).sum()
            # What is read above may be written by the next but one exchange of the same place: two others in between.
            exchange.all_gather(places["x"], mine["x"][0, :1])
        stream.synchronize()
    assert exchange.who_is_missing() is None
    return int(wrong)

print(sum(group.run(work)))
"""

BITS = """
import sys
import torch
from gptq_api.kernels import exchange as kernels
from gptq_api.kernels.exchange import Exchange
from gptq_api.model.modules import config_of
from gptq_api.runner.cuda import backend
from gptq_api.runner.load import load_ranks, load_runner, open_model
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.types import SamplingParams
from tests.runner.cpu.test_equal_bits import COMPANY, NUM_BLOCKS, answers

model, *flags = sys.argv[1:]
if "host" in flags:
    backend.peer_refusal = lambda devices: "as on cards without peer access"
invariant, fp8 = "invariant" in flags, "fp8" in flags
options = LoadOptions(model_path=model, device="cuda", num_threads=1, max_num_seqs=COMPANY, num_blocks=NUM_BLOCKS,
                      batch_invariant=invariant, kv_cache_dtype="fp8" if fp8 else "auto")
whole = load_runner(options)
checkpoint = open_model(options)
devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(2)]
shared = len(set(devices)) == 1
if shared:  # a block waits, instead of one for each row, which is more than leaves room for a product
    kernels.FEW, normalizes = 8 * 1024, Exchange.normalizes
    Exchange.normalizes = lambda exchange, place, rows: rows <= 8 and normalizes(exchange, place, rows)
parts, *_ = load_ranks(options, checkpoint, config_of(checkpoint), devices)

def logits(runner, rows):
    ids = [(7 * i) % (runner.vocab_size - 3) + 3 for i in range(rows)]
    solo = Solo(ids, SamplingParams(max_tokens=1), list(range(-(-rows // runner.block_size))))
    found, _ = runner.logits(step_of([solo], [rows]), every_row=True)
    return found.cpu()

for rows in (1, 8, *((33, 200, 700) if invariant else ())):
    assert torch.equal(logits(parts, rows), logits(whole, rows)), rows
# By default a sum of more than 8 rows is cut where that is fastest, which depends on how many outputs there are.
for num in (1, 8, *(() if shared else (COMPANY,))) if invariant else ():
    for _ in range(3):  # kernel by kernel, captured, replayed
        expected, _ = answers(whole, range(num), budget=200)
        found, _ = answers(parts, range(num), budget=200)
        assert found == expected, num
print("equal")
"""

DRAFTS = """
import sys
import torch
from gptq_api.model.modules import config_of
from gptq_api.runner.load import load_ranks, open_model
from gptq_api.runner.options import LoadOptions
from tests.support.draft_models import KINDS, NUM_BLOCKS, answers

model, draft = sys.argv[1:]
devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(2)]

def loaded(**more):
    options = LoadOptions(model_path=model, device="cuda", num_threads=1, max_num_seqs=8, num_blocks=NUM_BLOCKS,
                          batch_invariant=True, **more)
    checkpoint = open_model(options)
    return load_ranks(options, checkpoint, config_of(checkpoint), devices)

plain, _, _ = answers(loaded()[0], KINDS)
runner, _, beside = loaded(draft_model=draft)
assert "beside rank 0" in beside.put_beside(runner)
for times in (1, 2):  # the second time behind cached prefixes
    drafted, scheduler, _ = answers(runner, KINDS, times=times)
    assert drafted == plain and scheduler.counters.draft_tokens > 0
if model == draft:
    assert scheduler.counters.accepted_tokens > 0.9 * scheduler.counters.draft_tokens
print("equal")
"""

SOAK = """
import random, sys
from pathlib import Path
import torch
from gptq_api.bench import synthetic
from gptq_api.kernels.exchange import Exchange
from gptq_api.model.modules import config_of
from gptq_api.runner.load import load_ranks
from gptq_api.runner.options import LoadOptions
from tests.support.soak import cycle, num_blocks, repeated

folder, num_layers, layers, steps = Path(sys.argv[1]), int(sys.argv[2]), 16, 64
shape = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=8,
             num_key_value_heads=4, vocab_size=2048)
synthetic.SHAPES["narrow"] = {**synthetic.SHAPES["llama-7b"], **shape}
checkpoint = synthetic.synthetic_checkpoint("narrow", folder, act_order=True)
delays = [random.Random(rank) for rank in range(2)]

def late(method):
    def delayed(exchange, *args, **named):
        # What is captured keeps its delays, which are others in each graph and on each rank.
        if delays[exchange.rank].random() < 0.05:
            torch.cuda._sleep(delays[exchange.rank].randrange(100_000))
        return method(exchange, *args, **named)
    return delayed

def before(rank):
    if delays[rank].random() < 0.1:
        torch.cuda._sleep(delays[rank].randrange(400_000))

Exchange.all_gather, Exchange.all_gather_norm = late(Exchange.all_gather), late(Exchange.all_gather_norm)
options = LoadOptions(model_path=str(folder), device="cuda", max_num_seqs=8, num_blocks=num_blocks(steps, 16))
devices = [torch.device("cuda", rank) for rank in range(2)]
runner, *_ = load_ranks(options, checkpoint, config_of(checkpoint), devices)
done, wrong = repeated(runner, cycle(steps, runner.vocab_size, runner.block_size), num_layers // layers, before)
print(f"{done * layers >= num_layers} {wrong}")
"""

STOPPED = """
import sys, time
import torch
from gptq_api.kernels import exchange
from gptq_api.model.modules import config_of
from gptq_api.runner.load import load_ranks, open_model
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.ranks import RankError
from gptq_api.runner.solo import lone_step

options = LoadOptions(model_path="demo", device="cuda", num_blocks=100, max_num_seqs=4)
checkpoint = open_model(options)
devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(2)]
runner, *_ = load_ranks(options, checkpoint, config_of(checkpoint), devices)
runner.collect(runner.launch(lone_step(5, 3, runner.block_size)))
exchange.PATIENT_LIMIT_S = exchange.LIMIT_S
runner.ranks[1].launch = lambda step: None
began = time.monotonic()
try:
    runner.collect(runner.launch(lone_step(5, 3, runner.block_size)))
except RankError as error:
    print(f"{time.monotonic() - began < 10} {error}", flush=True)
import os
os._exit(0)
"""


def run(code: str, *arguments: str, size: int = 2, limit_s: float = 110) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    if torch.cuda.device_count() < size:
        # A kernel that is loaded when it is first used waits until the device is idle, and so for what waits for it.
        env |= {"GPTQ_CUDA_OVERLAP": "0", "CUDA_MODULE_LOADING": "EAGER"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit_s, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("how", ["straight", "through the host"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_word_arrives(size: int, how: str) -> None:
    assert run(EXCHANGES, str(size), "2000", how, size=size) == "0"


@pytest.mark.parametrize("flags", [(), ("invariant",), ("invariant", "fp8"), ("invariant", "host")], ids=" ".join)
def test_the_demo_has_the_bits_of_one_gpu(flags: tuple[str, ...]) -> None:
    assert run(BITS, "demo", *flags) == "equal"


@pytest.mark.parametrize("name", ["act-order", "8 bits", "one group"])
def test_random_models_have_the_bits_of_one_gpu(name: str, tmp_path: Path) -> None:
    """Larger than the demo, so that kernels take clusters, segments of k and all their tiles."""
    from tests.support.checkpoints import Recipe, random_model, write_checkpoint

    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4}
    more = {
        "act-order": {"act_order": True, "group_size": 128, "sym": False, "vocab_size": 2048},
        "8 bits": {"bits": 8, "group_size": 128, "act_order": True, "vocab_size": 2048},
        "one group": {"vocab_size": 2051, "tie": True, "group_size": -1},
    }[name]
    recipe = Recipe(**size, **more, max_position_embeddings=1024)  # type: ignore[arg-type]
    folder = write_checkpoint(tmp_path, random_model(recipe))
    assert run(BITS, str(folder), "invariant") == "equal"


@TWO_GPUS
@pytest.mark.parametrize("draft", ["itself", "a head"])
def test_a_draft_model_beside_rank_0_changes_no_bit(draft: str, tmp_path: Path) -> None:
    """A head reads what both ranks have added to the stream."""
    from tests.runner.cuda.test_eagle_head import HEAD, SERVED
    from tests.support.checkpoints import random_model, write_checkpoint
    from tests.support.eagle_heads import random_head, write_head

    folder = write_checkpoint(tmp_path / "served", random_model(SERVED))
    beside = folder if draft == "itself" else write_head(tmp_path / "head", random_head(HEAD))
    assert run(DRAFTS, str(folder), str(beside)) == "equal"


@TWO_GPUS
def test_a_million_layers_have_their_bits_whichever_rank_is_late(tmp_path: Path) -> None:
    """Decode steps of one to eight sequences, and now and then their prompts: a minute or two."""
    assert run(SOAK, str(tmp_path), "1000000", limit_s=300) == "True 0"


def test_a_rank_that_stops_is_told_by_name() -> None:
    assert run(STOPPED) == "True rank 1 did not answer rank 0 in time, and has stopped"
