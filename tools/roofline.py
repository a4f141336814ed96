"""What a checkpoint should reach on a card, in tokens per second, from bytes, instructions and clocks:

    python tools/roofline.py "RTX 4090" [--model llama-13b | FOLDER] [--batch 1,8,64] [--context 256]
    python tools/roofline.py --page [--check]      # writes, or checks, the table of cards in README.md

A step is its kernels one after another; a decode step of M sequences computes M rows:

    product, M <= 8      (bytes^4 + issue^4 + cached^4)^(1/4) + start
                         bytes = packed weights and scales / bandwidth
                         issue = weights / 4,096 * instructions / (SMs * clock * 1.57)
                         cached = bytes with the tokens that come with them / (SMs * clock * 19), without bulk copies
                         start = 2.0 us, 4.1 us without programmatic dependent launch: before 9.0, and on 12.0
    product, M > 8       (bytes^1.5 + products^1.5)^(1/1.5) + start   and the 16-bit head
                         products = 2 N K rows / rate
                         rows = sqrt(M^2 + 24^2) by wgmma, otherwise M in sixteens
                         start = 5.5 us by wgmma, otherwise 6.9 us
    attention            t + min(1.3 t, 10 us) + norm                 t = keys and values / (0.92 * bandwidth)
    norm                 2.0 us, 3.4 us before 9.0
    step                 50 us more

Where the numbers are from:

    bytes          the packed layout (kernels/layout.py) and the checkpoint's headers, without zero points, which would
                   be 1.5 % more; the KV cache's, in 16 bits, from its config
    cards          tools/cards.py: data sheets, and what a read reaches of the bandwidth
    instructions   GEMV_INSTRUCTIONS, to which tests/ext/test_budgets.py holds the compiler
    1.57           instructions an SM issues in a clock with one block of eight warps: a pair of strips of 4,096 k, 32
                   times 148 instructions, takes 3,000 clocks (docs/kernels-diary.md)
    rate           0.77 of the card's tensor rate by wgmma, as measured on an H200; by mma.sync 0.85 of a GeForce's and
                   0.65 of others', estimates
    powers and the other numbers: fitted to benchmarks/results/decode-nvidia-h200.json and gemm-nvidia-h200.json, and
                   to the code of 8.0 on an H200; tests/tools/test_roofline.py says how near they come, for every card
                   measured. 1.4 us of 3.4 and 6.9 lie between two kernels of a graph that do not overlap

Not in it: prefill, HTTP, power limits, cards with other clocks than the table's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptq_api.bench.synthetic import SHAPES, synthetic_checkpoint
from gptq_api.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.kernels.gemm import refusal
from gptq_api.kernels.layout import CHUNK_K, STRIP_ROWS, chunk_bytes
from gptq_api.model.modules import config_of, layer_prefix, modules
from gptq_api.model.stored import has_head

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.cards import CARDS, Card, find

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- cards: written by tools/roofline.py --page -->\n", "<!-- end of cards -->\n"
RESULTS = ROOT / "benchmarks" / "results"

GEMV_ROWS = 8
"""up to which products are the GEMV's"""
GEMV_INSTRUCTIONS = {80: 175, 89: 175, 90: 160, 100: 160, 120: 169}
"""architecture -> budget of the GEMV's loop for 4,096 weights and up to 8 rows"""
ISSUED = 1.57
START_US, GEMV_ALONE_US, TILES_US, BOUNDARY_US, STEP_US = 2.0, 4.1, 5.5, 1.4, 50.0
TOKEN_BYTES, PASS_BYTES, L2_BYTES = 256, 4 * 1056, 19
"""of a token in a chunk; of four strips' weights in it; of the L2 for an SM in a clock"""
WGMMA_ROWS, MMA_ROWS = 24, 16
ATTENTION_US = 10.0
CACHE_SHARE = 0.92
"""of what a read reaches: blocks of a cache lie scattered"""
MEMORY_SHARE = 0.9
"""of a card's memory that weights and cache may have (--gpu-memory-utilization)"""


@dataclass(frozen=True)
class Product:
    """A Linear of the forward pass."""

    in_features: int
    out_features: int
    packed_bytes: int
    quantized: bool = True


@dataclass(frozen=True)
class Model:
    """Of a checkpoint, what its speed depends on."""

    name: str
    layers: int
    products: tuple[Product, ...]
    """of all layers"""
    head: Product
    cache_bytes: int
    """of a token, in 16 bits"""
    embedding_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(product.packed_bytes for product in (*self.products, self.head)) + self.embedding_bytes


def model_of(checkpoint: Checkpoint, name: str) -> Model:
    """From its headers. ValueError for a Linear that the CUDA kernels do not take."""
    config = config_of(checkpoint)
    products = []
    for layer in range(config.num_hidden_layers):
        sums: dict[str, list[int]] = {}
        for module in modules(config):
            shape = checkpoint.modules.get(layer_prefix(layer) + module.name)
            if shape is None:
                raise ValueError(f"{layer_prefix(layer)}{module.name} is not quantized; only 4-bit Linears are known")
            k, n = shape.in_features, shape.out_features
            size = -1 if shape.num_groups == 1 else -(-k // shape.num_groups)
            if reason := refusal(shape.bits, k, n, size):
                raise ValueError(f"{layer_prefix(layer)}{module.name}: {reason}")
            num_bytes = chunk_bytes(size, has_zeros=False) * -(-k // CHUNK_K) * (n // STRIP_ROWS)
            joint = sums.setdefault(module.joins, [k, 0, 0])
            joint[1], joint[2] = joint[1] + n, joint[2] + num_bytes
        products += [Product(k, n, num_bytes) for k, n, num_bytes in sums.values()]
    hidden, vocab = config.hidden_size, config.vocab_size
    tied = config.ties_head(has_head(checkpoint))
    head = Product(hidden, vocab, 2 * hidden * vocab, quantized=False)
    cache_bytes = 2 * config.kv_elements_per_token
    embedding = 0 if tied else 2 * hidden * vocab
    return Model(name, config.num_hidden_layers, tuple(products), head, cache_bytes, embedding)


def open_model(name: str) -> Model:
    """A shape of gptq_api/bench/synthetic.py in groups of 128, or a checkpoint's folder. CheckpointError for
    what is neither."""
    if name not in SHAPES:
        return model_of(open_checkpoint(Path(name)), Path(name).name)
    with tempfile.TemporaryDirectory() as folder:
        return model_of(synthetic_checkpoint(name, Path(folder)), name)


@dataclass(frozen=True)
class Step:
    """The parts of a decode step, in us."""

    products: float
    attention: float
    norms: float
    head: float
    floor: float
    """what the bytes alone take"""
    fits: bool

    @property
    def us(self) -> float:
        return self.products + self.attention + self.norms + self.head + STEP_US


def boundary(card: Card) -> float:
    """Between two kernels, us."""
    return 0.0 if card.code >= 90 else BOUNDARY_US


def product_us(card: Card, product: Product, rows: int) -> float:
    """One product of so many rows."""
    read = product.packed_bytes / card.read_tb_s / 1e6
    if product.quantized and rows <= GEMV_ROWS:
        weights = product.in_features * product.out_features
        instructions = GEMV_INSTRUCTIONS[card.code]
        issue = weights / 4096 * instructions / (card.sms * card.ghz * 1e3 * ISSUED)
        if card.code in (90, 100):
            return float((read**4 + issue**4) ** 0.25) + START_US
        # Tokens come through the L2 with the weights, once for every pass of four strips.
        copied = product.packed_bytes * (1 + rows * TOKEN_BYTES / PASS_BYTES)
        cached = copied / (card.sms * card.ghz * 1e3 * L2_BYTES)
        return float((read**4 + issue**4 + cached**4) ** 0.25) + GEMV_ALONE_US
    by_wgmma = card.code == 90
    rows_paid = (rows**2 + WGMMA_ROWS**2) ** 0.5 if by_wgmma else -(-rows // MMA_ROWS) * MMA_ROWS
    products = 2 * product.in_features * product.out_features * rows_paid / card.reached_tflops / 1e6
    return float((read**1.5 + products**1.5) ** (1 / 1.5)) + TILES_US + (0 if by_wgmma else BOUNDARY_US)


def step_of(card: Card, model: Model, rows: int, context: int) -> Step:
    """A decode step of `rows` sequences of `context` tokens."""
    start = START_US + boundary(card)
    cache = rows * context * model.cache_bytes
    read = cache / card.read_tb_s / CACHE_SHARE / 1e6 / model.layers
    attention = model.layers * (read + min(1.3 * read, ATTENTION_US) + start)
    products = sum(product_us(card, product, rows) for product in model.products)
    head = product_us(card, model.head, rows)
    moved = model.weight_bytes - model.embedding_bytes + cache
    fits = model.weight_bytes + cache <= MEMORY_SHARE * card.memory_gb * 1e9
    return Step(products, attention, (2 * model.layers + 1) * start, head, moved / card.read_tb_s / 1e6, fits)


def measured(card: Card, model: str) -> dict[tuple[int, int], float]:
    """(batch, mean context) -> tokens a second that benchmarks/decode.py measured on such a card, in groups of 128;
    nothing where it was not run there."""
    file = RESULTS / f"decode-{card.called.lower().replace(' ', '-')}.json"
    if not file.exists():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8")).get(model, {"rows": []})["rows"]
    return {
        (row["batch"], row["context"] + row["new_tokens"] // 2): row["tok_s"]
        for row in rows
        if row["part"] == "decode" and row["variant"] == "g128" and "tok_s" in row
    }


def report(card: Card, model: Model, batches: list[int], context: int) -> Iterator[str]:
    """Lines for people: inputs, the formula, a row for each batch."""
    yield f"{card.name}: {card.sms} SMs at {card.ghz} GHz, {card.memory_gb} GB, {card.tb_s} TB/s nominal and"
    yield f"{card.read_tb_s:.2f} for reading, {card.tflops} TFLOP/s; code of {card.code / 10}:"
    yield f"{GEMV_INSTRUCTIONS[card.code]} instructions for 4,096 weights, {boundary(card)} us between two kernels"
    packed = sum(product.packed_bytes for product in model.products)
    yield f"{model.name}: {packed / 1e9:.2f} GB in 4 bits, head {model.head.packed_bytes / 1e9:.2f} GB,"
    yield f"{model.cache_bytes / 1e6:.3f} MB of cache a token, {context} tokens of context"
    assert __doc__ is not None
    yield __doc__.split("\n\n", 3)[3].split("Where the numbers")[0]
    yield "| batch | us a layer | products | attention | norms | head | a step, ms | by bytes | tok/s | measured |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    known = {
        batch: rate for (batch, mean), rate in measured(card, model.name).items() if context / 2 < mean < 2 * context
    }
    for batch in batches:
        step = step_of(card, model, batch, context)
        parts = (step.products, step.attention, step.norms, step.head, step.us, step.floor)
        cells = [f"{step.products / model.layers:.1f}", *(f"{us / 1e3:.2f}" for us in parts)]
        cells.append(f"{batch / step.us * 1e6:,.0f}" if step.fits else "does not fit")
        yield f"| {batch} | {' | '.join(cells)} | {known.get(batch, '')} |"


PAGE_COLUMNS = (("llama-7b", 1), ("llama-13b", 1), ("llama-70b", 1), ("llama-13b", 64))
PAGE_CONTEXT = 256
"""about that of benchmarks/decode.py: 128 tokens in, and on average half of 128 or 256 out"""
PAGE_HEAD = """| card | | 7B | 13B | 70B | 13B, 64 users |
|---|---|---|---|---|---|"""


def page() -> str:
    """The table of cards: a measured figure, or else the formula's."""
    models = {name: open_model(name) for name, _ in PAGE_COLUMNS}
    lines = [PAGE_HEAD]
    for card in CARDS:
        known = {name: measured(card, name) for name in models}
        cells = []
        for name, batch in PAGE_COLUMNS:
            rates = [rate for (rows, context), rate in known[name].items() if rows == batch and context <= PAGE_CONTEXT]
            step = step_of(card, models[name], batch, PAGE_CONTEXT)
            expected = f"{batch / step.us * 1e6:,.0f}" if step.fits else ""
            cells.append(f"**{rates[0]:,.0f}** ({expected})" if rates else expected)
        is_rehearsal = card.called.endswith("sm80")
        if any(known.values()):
            how = "the rehearsal" if is_rehearsal else "measured"
        elif is_rehearsal:
            continue
        else:
            how = "rehearsed" if card.code == 80 else "expected"
        lines.append(f"| {card.name} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_page(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + page() + END + rest.split(END)[1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", nargs="?", help=", ".join(card.name for card in CARDS))
    parser.add_argument("--model", default="llama-13b", help=f"{', '.join(SHAPES)}, or a checkpoint's folder")
    parser.add_argument("--batch", default="1,8,16,32,64", help="sequences, separated by commas")
    parser.add_argument("--context", type=int, default=PAGE_CONTEXT, help="tokens of each sequence")
    parser.add_argument("--page", action="store_true", help="write the table of README.md")
    parser.add_argument("--check", action="store_true", help="with --page: only say whether it is up to date")
    args = parser.parse_args(arguments)
    if args.page:
        current = README.read_text(encoding="utf-8")
        wanted = with_page(current)
        if args.check:
            return int(current != wanted)
        README.write_text(wanted, encoding="utf-8")
        return 0
    if args.card is None:
        parser.error("name a card, or --page")
    try:
        batches = [int(batch) for batch in args.batch.split(",")]
        if min(*batches, args.context) < 1:
            raise ValueError(f"--batch {args.batch}, --context {args.context}: at least 1")
        lines = list(report(find(args.card), open_model(args.model), batches, args.context))
    except (ValueError, CheckpointError) as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
